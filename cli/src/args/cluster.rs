//! `bell cluster …` and `bell context …`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::ClusterSet;
use crate::parse;

#[derive(Subcommand, Debug)]
pub enum ClusterCommand {
    /// Make a new cluster whose first controller is this host
    ///
    /// Makes the cluster's certificate authority, the first controller's data directory and an
    /// administrator's identity, and adds a context for it. The shared storage has to be mounted
    /// already: it is never created.
    #[command(
        after_help = "Example:\n  bell cluster init --data-dir /var/lib/bellwether/controller \
        --address 10.0.0.1 --storage /srv/bellwether"
    )]
    Init(InitArgs),
    /// Make a token with which one host may join
    ///
    /// The token is good once. It is the only line on standard output.
    #[command(after_help = "Example:\n  bell cluster join-token --role agent --ttl 30m")]
    JoinToken {
        /// What the host will be
        #[arg(long, value_enum)]
        role: JoinRole,
        /// How long the token can be used
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse::duration)]
        ttl: Duration,
    },
    /// Change settings of the cluster; `bell cluster status` shows them
    ///
    /// What is not named stays as it is.
    #[command(after_help = "Examples:\n  bell cluster set --reserve-nodes 1\n  \
        bell cluster set --quarantine-after 3 --quarantine-window 1h --quarantine-time 1h")]
    Set(ClusterSet),
    /// Try what a failover relies on: storage, locks, clocks, watchdogs, power switches
    ///
    /// Each node writes a file on the shared storage and holds its lock while another one looks: a copy
    /// of the storage, or a mount whose locks stay on its host, is found out. Power switches are asked
    /// for their status. No VM is touched. Ends with 1 if something failed.
    #[command(after_help = "Example:\n  bell cluster validate")]
    Validate,
    /// Show the controllers, who leads, and how many nodes and VMs are up
    #[command(after_help = "Example:\n  bell cluster status")]
    Status,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum JoinRole {
    Controller,
    Agent,
}

impl JoinRole {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Agent => "agent",
        }
    }
}

#[derive(Args, Debug)]
pub struct InitArgs {
    /// Where the first controller keeps its files: empty or not there yet
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// The address at which the other hosts reach this one
    #[arg(long, value_name = "IP")]
    pub address: IpAddr,
    /// The name of this host [default: its host name]
    #[arg(long)]
    pub name: Option<String>,
    /// The name of the cluster, and of the new context unless --context gives another
    #[arg(long, value_name = "NAME", default_value = "bellwether")]
    pub cluster_name: String,
    /// The shared storage: mounted already, the same path on every host
    #[arg(long, value_name = "DIR", default_value = "/srv/bellwether")]
    pub storage: PathBuf,
    /// The port for administrators and nodes
    #[arg(long, value_name = "PORT", default_value = "7400", value_parser = parse::port)]
    pub api_port: u16,
    /// The port for the other controllers
    #[arg(long, value_name = "PORT", default_value = "7401", value_parser = parse::port)]
    pub raft_port: u16,
    /// The port for hosts that join
    #[arg(long, value_name = "PORT", default_value = "7402", value_parser = parse::port)]
    pub join_port: u16,
}

#[derive(Subcommand, Debug)]
pub enum ContextCommand {
    /// List the contexts; the current one is marked
    #[command(after_help = "Example:\n  bell context list")]
    List,
    /// Make a context the current one
    #[command(after_help = "Example:\n  bell context use lab")]
    Use { name: String },
    /// Show a context, the current one by default
    #[command(after_help = "Example:\n  bell context show lab")]
    Show { name: Option<String> },
    /// Add a context, or change the endpoints and the identity of one
    #[command(after_help = "Example:\n  bell context add lab --endpoint 10.0.0.1:7400 \
        --endpoint 10.0.0.2:7400 --identity /root/lab-admin")]
    Add(ContextAdd),
    /// Ask the cluster for its controllers and make all of them endpoints
    ///
    /// A new context knows only the first controller. After others have joined, this lets every
    /// later command go on when one of them is down.
    #[command(after_help = "Example:\n  bell context refresh")]
    Refresh { name: Option<String> },
    /// Forget a context; its identity stays on disk
    #[command(after_help = "Example:\n  bell context remove lab")]
    Remove { name: String },
}

#[derive(Args, Debug)]
pub struct ContextAdd {
    pub name: String,
    /// The API address of a controller; give as many as there are
    #[arg(long = "endpoint", value_name = "IP:PORT", required = true)]
    pub endpoints: Vec<SocketAddr>,
    /// The directory with ca.pem, cert.pem and key.pem of an administrator
    #[arg(long, value_name = "DIR")]
    pub identity: PathBuf,
    /// Make it the current one, too
    #[arg(long)]
    pub r#use: bool,
}
