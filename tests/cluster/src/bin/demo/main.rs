//! The demonstration: three nodes on this machine run, move and rescue a real VM.
#![forbid(unsafe_code)]
// A person follows what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod report;
mod steps;

use std::process::ExitCode;

use anyhow::Result;
use bellwether_cluster_tests::{Cluster, Options};
use clap::Parser;

use report::Report;

/// Three nodes on this machine run, move and rescue a real VM.
#[derive(Parser)]
struct Cli {
    /// Print the measurements as one JSON object on standard output
    #[arg(long)]
    json: bool,
    /// Leave the cluster running at the end, and print how to talk to it
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut report = Report::new();
    let done = demonstrate(&cli, &mut report).await;
    if let Err(error) = &done {
        report.fail(&format!("{error:#}"));
    }
    report.print_table();
    if let Ok(Some(kept)) = done {
        eprintln!("{kept}");
    }
    if cli.json {
        println!("{}", report.to_json());
    }
    if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// With --keep it gives what a person needs to know about the cluster that is left.
async fn demonstrate(cli: &Cli, report: &mut Report) -> Result<Option<String>> {
    report.step("Three nodes: a controller and an agent each, mutual TLS between all of them");
    let cluster = Cluster::start(Options::default()).await?;
    report.say(&format!("the cluster works in {}", cluster.root().display()));
    let cluster = steps::all(cluster, report).await?;
    if cli.keep {
        return Ok(Some(keep(cluster)));
    }
    cluster.finish()?;
    report.check("nothing is left running and nothing is left behind", true)?;
    Ok(None)
}

fn keep(cluster: Cluster) -> String {
    let words = cluster.bell().words();
    let root = cluster.keep();
    let commands =
        ["cluster status", "node list", "vm list", "vm console web-1", "event list --follow"];
    let lines: String = commands.map(|command| format!("  {words} {command}\n")).concat();
    let own = std::env::current_exe().unwrap_or_default();
    let reaper = own.with_file_name("bellwether-test-reaper");
    format!(
        "\nThe cluster is up. Talk to it:\n\n{lines}\nEnd it and remove everything:\n\n  {} {} </dev/null\n",
        reaper.display(),
        root.display()
    )
}
