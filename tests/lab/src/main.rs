//! `bellwether-lab`, which `cargo xtask lab` builds and starts.
#![forbid(unsafe_code)]
// A person reads what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use bellwether_lab::cluster;
use bellwether_lab::lab::{Lab, Plan};
use bellwether_lab::machine::Image;
use bellwether_lab::scenario::{Report, Runner, Scenario};
use bellwether_lab::shell;
use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask lab",
    about = "A cluster of real hosts on this machine, without any KVM of its own"
)]
struct Arguments {
    /// Directory with vmlinux, initrd and root.ext4.
    #[arg(long, env = "BELLWETHER_LAB_IMAGE", hide = true)]
    image: PathBuf,
    /// The file with our programs.
    #[arg(long, env = "BELLWETHER_LAB_LAYER", hide = true)]
    layer: PathBuf,
    /// Directory for disks and logs.
    #[arg(long, env = "BELLWETHER_LAB_DIR", hide = true)]
    directory: PathBuf,
    /// Directory of the standard scenarios.
    #[arg(long, env = "BELLWETHER_LAB_SCENARIOS", hide = true)]
    scenarios: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot the hosts, make a cluster of them, and take commands until the end of the input.
    ///
    /// A command is a step of a scenario (docs/lab.md), `on HOST COMMAND…`, `run FILE`, `list`,
    /// `down` or `help`. The lab ends with the input; `down` ends it too.
    #[command(
        after_help = "Example:\n  cargo xtask lab up\n  lab> on node1 bell node list\n  lab> power off node2\n  lab> list"
    )]
    Up(Nodes),
    /// Run scenarios on a fresh cluster, one after the other.
    #[command(
        after_help = "Example:\n  cargo xtask lab run power-loss freeze-and-thaw\n  cargo xtask lab run --standard --json"
    )]
    Run {
        #[command(flatten)]
        nodes: Nodes,
        /// Files, or names of standard scenarios.
        scenarios: Vec<String>,
        /// All standard scenarios.
        #[arg(long)]
        standard: bool,
        /// Print the reports as JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// Name the standard scenarios.
    Scenarios,
}

#[derive(Args, Clone, Copy)]
struct Nodes {
    /// How many hosts beside the storage host.
    #[arg(long, default_value_t = 3)]
    nodes: u8,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.command {
        Command::Up(nodes) => shell::run(&mut up(arguments, nodes.nodes)?),
        Command::Scenarios => {
            standard(arguments)?.iter().for_each(|name| println!("{name}"));
            Ok(())
        }
        Command::Run { nodes, scenarios, standard: all, json } => {
            let names = match all {
                true => standard(arguments)?,
                false => scenarios.clone(),
            };
            run_scenarios(arguments, nodes.nodes, &names, *json)
        }
    }
}

/// The names of the scenarios in the repository.
fn standard(arguments: &Arguments) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&arguments.scenarios)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "scenario") {
            names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

fn read(arguments: &Arguments, name: &str) -> Result<Scenario> {
    let own = arguments.scenarios.join(format!("{name}.scenario"));
    Scenario::read(if own.is_file() { &own } else { name.as_ref() })
}

fn up(arguments: &Arguments, nodes: u8) -> Result<Lab> {
    let image = Image { base: arguments.image.clone(), layer: arguments.layer.clone() };
    let mut lab = Lab::make(&Plan { nodes, image, directory: arguments.directory.clone() })?;
    eprintln!("the timeline of all hosts: {}", lab.timeline.path().display());
    for host in lab.hosts() {
        lab.switch_on(&host)?;
    }
    for host in lab.hosts() {
        lab.await_boot(&host)?;
    }
    eprintln!("{:>7.1} s  {} hosts are up", lab.timeline.now().as_secs_f64(), lab.hosts().len());
    cluster::form(&mut lab)?;
    eprintln!("{:>7.1} s  the cluster is formed", lab.timeline.now().as_secs_f64());
    Ok(lab)
}

fn run_scenarios(arguments: &Arguments, nodes: u8, names: &[String], json: bool) -> Result<()> {
    // Mistakes are found before anything is booted.
    let scenarios: Vec<Scenario> =
        names.iter().map(|name| read(arguments, name)).collect::<Result<_>>()?;
    if scenarios.is_empty() {
        bail!("which scenarios? `lab scenarios` names those of the standard set");
    }
    let mut lab = up(arguments, nodes)?;
    let mut reports = Vec::new();
    for scenario in &scenarios {
        let report = Runner::new(&mut lab).run(scenario);
        eprintln!("{}", line(&report));
        reports.push(report);
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    }
    let failed = reports.iter().filter(|report| !report.passed).count();
    match failed {
        0 => Ok(()),
        failed => bail!(
            "{failed} of {} scenarios failed; what all hosts said, in order: {}",
            reports.len(),
            lab.timeline.path().display()
        ),
    }
}

fn line(report: &Report) -> String {
    let verdict = if report.passed { "passed" } else { "FAILED" };
    let mut text = format!("{verdict}  {:<20} {:>6.1} s", report.scenario, report.seconds);
    for vm in &report.vms {
        text += &format!(
            "  silent {:.1} s, {} boots, {} records",
            vm.longest_silence_s, vm.boots, vm.records
        );
    }
    if let Some(failure) = &report.failure {
        text += &format!("\n        {failure}");
    }
    text
}
