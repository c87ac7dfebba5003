//! `bellwether-lab`, which `cargo xtask lab` builds and starts.
#![forbid(unsafe_code)]
// A person reads what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::channel;

use anyhow::{Result, bail};
use bellwether_lab::door::{Visit, Wish};
use bellwether_lab::lab::{Lab, Plan};
use bellwether_lab::machine::Image;
use bellwether_lab::scenario::{Library, Report, Runner, Scenario};
use bellwether_lab::{cluster, shell, visitor};
use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask lab",
    about = "A cluster of real hosts on this machine, without any KVM of its own"
)]
struct Arguments {
    /// Directory with vmlinux, initrd and root.ext4.
    #[arg(long, env = "BELLWETHER_LAB_IMAGE", hide = true, default_value = "")]
    image: PathBuf,
    /// The file with our programs.
    #[arg(long, env = "BELLWETHER_LAB_LAYER", hide = true, default_value = "")]
    layer: PathBuf,
    /// Directory for disks and logs.
    #[arg(long, env = "BELLWETHER_LAB_DIR", hide = true)]
    directory: PathBuf,
    /// Directory of the scenarios that come with the source.
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
    /// `down` or `help`. Other terminals reach the lab with `lab list`, `lab ssh`, `lab do`.
    #[command(
        after_help = "Example:\n  cargo xtask lab up\n  on node1 bell node list\n  power off node2\n  list"
    )]
    Up {
        #[command(flatten)]
        nodes: Nodes,
        /// Leave it running in the background; `lab down` ends it.
        #[arg(long)]
        keep: bool,
        #[arg(long, hide = true, conflicts_with = "keep")]
        background: bool,
    },
    /// Run scenarios one after the other: in the lab that is up, or else on a cluster made for it.
    ///
    /// Nothing is left behind when all pass. When one fails, what all hosts said is in one file,
    /// in the order in which it happened; its path is printed.
    #[command(
        after_help = "Example:\n  cargo xtask lab run power-loss freeze-and-thaw\n  cargo xtask lab run --standard --json"
    )]
    Run {
        #[command(flatten)]
        nodes: Nodes,
        /// Files, or names as `lab scenarios` prints them.
        scenarios: Vec<String>,
        /// The standard set, which CI runs: tests/lab/scenarios/standard.
        #[arg(long, conflicts_with = "scenarios")]
        standard: bool,
        /// All scenarios.
        #[arg(long, conflicts_with_all = ["scenarios", "standard"])]
        all: bool,
        /// How often each of them is run.
        #[arg(long, default_value_t = 1)]
        times: u32,
        /// Print the reports as JSON on standard output.
        #[arg(long)]
        json: bool,
        /// Keep the timeline when all have passed, too.
        #[arg(long)]
        keep_timeline: bool,
    },
    /// Name the scenarios; those of the standard set have a star.
    Scenarios,
    /// Show the hosts of the lab that is up: power, and cables that are cut.
    List {
        #[arg(long)]
        json: bool,
    },
    /// Run a command in a host of the lab that is up, or open a root shell there.
    ///
    /// It goes over a port of the machine, so it works whatever the host's networks do.
    #[command(
        after_help = "Example:\n  cargo xtask lab ssh node1 bell vm list\n  cargo xtask lab ssh node2"
    )]
    Ssh {
        host: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Watch a host's serial console, and type there; Ctrl-] leaves it.
    Console { host: String },
    /// Do a step of a scenario in the lab that is up.
    #[command(
        after_help = "Example:\n  cargo xtask lab do power off node2\n  cargo xtask lab do expect node node2 is unknown"
    )]
    Do {
        #[arg(required = true, allow_hyphen_values = true)]
        step: Vec<String>,
    },
    /// End the lab that is up. Nothing of it is left.
    Down,
}

#[derive(Args, Clone, Copy)]
struct Nodes {
    /// How many hosts beside the storage host, 1 to 5.
    #[arg(long, default_value_t = 3)]
    nodes: u8,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<i32> {
    let directory = &arguments.directory;
    match &arguments.command {
        Command::Up { nodes, keep: true, .. } => {
            let count = nodes.nodes.to_string();
            visitor::start(directory, &["up", "--background", "--nodes", &count])?;
            println!("the lab runs in the background; `cargo xtask lab down` ends it");
            Ok(0)
        }
        Command::Up { nodes, background, .. } => keep_up(arguments, nodes.nodes, *background),
        Command::Scenarios => {
            library(arguments)?.print(&mut std::io::stdout())?;
            Ok(0)
        }
        Command::Run { .. } => run_scenarios(arguments),
        Command::List { json } => {
            visitor::command(directory, if *json { "list --json" } else { "list" })
        }
        Command::Ssh { host, command } if command.is_empty() => visitor::shell(directory, host),
        Command::Ssh { host, command } => visitor::exec(directory, host, command),
        Command::Console { host } => visitor::console(directory, host),
        Command::Do { step } => visitor::command(directory, &step.join(" ")),
        Command::Down => visitor::command(directory, "down"),
    }
}

fn library(arguments: &Arguments) -> Result<Library> {
    Library::read(&arguments.scenarios)
}

fn up(arguments: &Arguments, nodes: u8) -> Result<Lab> {
    if let Some(visit) = Visit::find(&arguments.directory)? {
        bail!("a lab is up already (process {}); `lab down` ends it", visit.notice.pid);
    }
    let image = Image { base: arguments.image.clone(), layer: arguments.layer.clone() };
    let mut lab = Lab::make(&Plan { nodes, image, directory: arguments.directory.clone() })?;
    eprintln!("the timeline of all hosts: {}", lab.timeline.path().display());
    for host in lab.hosts() {
        lab.switch_on(&host)?;
    }
    for host in lab.hosts() {
        lab.await_boot(&host)?;
    }
    say(&lab, &format!("{} hosts are up", lab.hosts().len()));
    cluster::form(&mut lab)?;
    say(&lab, "the cluster is formed");
    Ok(lab)
}

fn say(lab: &Lab, text: &str) {
    eprintln!("{:>7.1} s  {text}", lab.timeline.now().as_secs_f64());
}

fn keep_up(arguments: &Arguments, nodes: u8, background: bool) -> Result<i32> {
    let mut lab = up(arguments, nodes)?;
    let (sender, requests) = channel();
    if !background {
        println!("{}", shell::HELP);
        shell::read_input(&sender);
    }
    lab.open_door(sender)?;
    shell::serve(&mut lab, &requests)?;
    lab.forget_timeline();
    Ok(0)
}

fn run_scenarios(arguments: &Arguments) -> Result<i32> {
    let Command::Run { nodes, scenarios, standard, all, times, json, keep_timeline } =
        &arguments.command
    else {
        return Ok(1);
    };
    let library = library(arguments)?;
    let names = match (all, standard) {
        (true, _) => library.names(),
        (_, true) => library.standard.clone(),
        _ => scenarios.clone(),
    };
    // Mistakes are found before anything is booted.
    let once: Vec<Scenario> = names.iter().map(|name| library.find(name)).collect::<Result<_>>()?;
    if once.is_empty() {
        bail!("which scenarios? `lab scenarios` names those that come with the source");
    }
    let scenarios: Vec<&Scenario> = (0..*times).flat_map(|_| &once).collect();
    let mut place = Place::find(arguments, nodes.nodes)?;
    let mut reports = Vec::new();
    for scenario in scenarios {
        let report = place.run(scenario)?;
        eprintln!("{}", report.line());
        reports.push(report);
    }
    if *json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    }
    place.conclude(&reports, *keep_timeline)
}

/// Where scenarios run.
enum Place {
    Own(Box<Lab>),
    Visited(Visit),
}

impl Place {
    fn find(arguments: &Arguments, nodes: u8) -> Result<Self> {
        match Visit::find(&arguments.directory)? {
            Some(visit) => {
                eprintln!("in the lab that is up (process {})", visit.notice.pid);
                Ok(Self::Visited(visit))
            }
            None => Ok(Self::Own(Box::new(up(arguments, nodes)?))),
        }
    }

    fn run(&mut self, scenario: &Scenario) -> Result<Report> {
        match self {
            Self::Own(lab) => Ok(Runner::new(lab).run(scenario)),
            Self::Visited(visit) => {
                let line = format!("run {}", scenario.path.display());
                let outcome = visit.ask(&Wish::Command { line })?;
                match serde_json::from_str(&outcome.stdout) {
                    Ok(report) => Ok(report),
                    Err(_) => bail!("{}", outcome.stderr.trim()),
                }
            }
        }
    }

    fn conclude(self, reports: &[Report], keep_timeline: bool) -> Result<i32> {
        let failed = reports.iter().filter(|report| !report.passed).count();
        let verdict = format!("{failed} of {} runs failed", reports.len());
        match self {
            Self::Own(lab) if failed == 0 => {
                if !keep_timeline {
                    lab.forget_timeline();
                }
            }
            Self::Own(lab) => {
                let path = lab.timeline.path().display();
                bail!("{verdict}; what all hosts said, in order: {path}")
            }
            Self::Visited(_) if failed > 0 => bail!("{verdict}"),
            Self::Visited(_) => {}
        }
        Ok(0)
    }
}
