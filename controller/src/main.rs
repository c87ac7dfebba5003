//! `bellwether-controller`: joins a cluster as a controller, and runs one.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::PathBuf;

use bellwether_member::{JoinOptions, MemberRole, Ports};
use clap::{Args, Parser, Subcommand};

/// Raft says ten times a second that another controller does not answer; its status says so, too.
const DEFAULT_LOG: &str = "info,openraft=warn,openraft::core::heartbeat=error";

/// One of the replicated controllers of a Bellwether cluster.
///
/// The first controller is made by `bell cluster init`; the others join it with a token. Three or
/// five controllers on different hosts survive the loss of one or two.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Serve. Logs go to standard error; RUST_LOG sets their level.
    #[command(
        after_help = "Example:\n  bellwether-controller run --data-dir /var/lib/bellwether/controller"
    )]
    Run {
        /// Made by `bell cluster init` or by `bellwether-controller join`.
        #[arg(long)]
        data_dir: PathBuf,
    },
    /// Become a controller of an existing cluster; then use `run`.
    #[command(after_help = "Example:\n  bell cluster join-token --role controller      (on an \
        administrator's machine)\n  bellwether-controller join --token bw1.… --address 192.0.2.12 \
        --data-dir /var/lib/bellwether/controller")]
    Join(Join),
}

#[derive(Args)]
struct Join {
    /// From `bell cluster join-token --role controller`; good for one host, once.
    #[arg(long, env = "BELLWETHER_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// Where identity and log are kept; empty or not there yet.
    #[arg(long)]
    data_dir: PathBuf,
    /// This host's IP address, as the other hosts reach it.
    #[arg(long)]
    address: IpAddr,
    /// This host's name; an agent on the same host takes the same. Default: the host name.
    #[arg(long)]
    name: Option<String>,
    /// Administration and nodes.
    #[arg(long, default_value_t = Ports::default().api)]
    api_port: u16,
    /// Other controllers.
    #[arg(long, default_value_t = Ports::default().raft)]
    raft_port: u16,
    /// Newcomers.
    #[arg(long, default_value_t = Ports::default().join)]
    join_port: u16,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    bellwether_pki::install_crypto_provider();
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(DEFAULT_LOG));
    let color = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(color)
        .with_writer(std::io::stderr)
        .init();
    match cli.command {
        Verb::Run { data_dir } => bellwether_controller::run(&data_dir).await,
        Verb::Join(args) => join(args).await,
    }
}

async fn join(args: Join) -> anyhow::Result<()> {
    let name = match args.name {
        Some(name) => name,
        // The first label, as the agent takes it: both have to come to the same name.
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")?
            .trim()
            .split('.')
            .next()
            .unwrap_or_default()
            .to_owned(),
    };
    let ports = Ports {
        api: args.api_port,
        raft: args.raft_port,
        join: args.join_port,
        ..Ports::default()
    };
    let options = JoinOptions {
        token: args.token,
        data_dir: args.data_dir.clone(),
        name,
        role: MemberRole::Controller,
        address: args.address,
        ports,
    };
    let member = bellwether_member::join(options).await?;
    tracing::info!(
        cluster = member.cluster_name,
        node_id = member.id.0,
        "joined; now: bellwether-controller run --data-dir {}",
        args.data_dir.display()
    );
    Ok(())
}
