//! The agent of one Bellwether node.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use bellwether_agent::cli::{Cli, Command, RunArgs, join};
use bellwether_agent::config::AgentConfig;
use bellwether_agent::{agent, launch};
use clap::Parser;
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

/// What is still under way at the end gets this long.
const SHUTDOWN_MAX: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    match Cli::parse().command {
        // This process is about to be a VMM: it must be nothing else before.
        Command::ExecVmm { command } => report(Err(launch::become_vmm(&command).into())),
        other => report(start(other)),
    }
}

fn start(command: Command) -> anyhow::Result<()> {
    bellwether_pki::install_crypto_provider();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    if bellwether_failpoint::active() {
        tracing::warn!("failpoints are set: this agent serves a test");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?;
    let result = carry_out(&runtime, command);
    // A thread that waits for dead storage must not keep the agent from ending.
    runtime.shutdown_timeout(SHUTDOWN_MAX);
    result
}

fn carry_out(runtime: &Runtime, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Join(args) => {
            let data_dir = args.data_dir.clone();
            let member = runtime.block_on(join(args)).map_err(|error| {
                let remedy = error.remedy().map(|remedy| format!("; {remedy}")).unwrap_or_default();
                anyhow::anyhow!("{error}{remedy}")
            })?;
            tracing::info!(
                node_id = %member.id,
                name = member.name,
                cluster = member.cluster_name,
                "joined; next: bellwether-agent run --data-dir {}",
                data_dir.display()
            );
            Ok(())
        }
        Command::Run(args) => runtime.block_on(run(args)),
        Command::ExecVmm { .. } => Ok(()),
    }
}

async fn run(args: RunArgs) -> anyhow::Result<()> {
    let config = AgentConfig::load(args.config_file().as_deref())?;
    agent::run(&args.data_dir, config).await
}

#[allow(clippy::print_stderr, reason = "the last word of a command to whoever started it")]
fn report(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bellwether-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
