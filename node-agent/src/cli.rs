//! The command line.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use bellwether_member::{JoinOptions, MemberConfig, MemberError, MemberRole, Ports};
use clap::{Args, Parser, Subcommand};

/// What `--help` says first.
const ABOUT: &str = "\
The agent of one Bellwether node: it runs the VMs that the cluster places here.

A host becomes a node in two steps. On any controller, or wherever `bell` is set up:

    bell cluster join-token --role agent

and on the host:

    bellwether-agent join --token TOKEN --data-dir /var/lib/bellwether/agent --address 10.0.0.7
    bellwether-agent run  --data-dir /var/lib/bellwether/agent

VMs outlive the agent: stopping, killing or upgrading it does not touch them, and the next agent
takes them up again.";

/// The command line of `bellwether-agent`.
#[derive(Debug, Parser)]
#[command(name = "bellwether-agent", version, about = ABOUT, long_about = ABOUT)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Become a node of a cluster, with a token from `bell cluster join-token --role agent`.
    ///
    /// Writes the data directory at once or not at all; a token serves once. Nothing runs
    /// afterwards: start the agent with `bellwether-agent run`.
    Join(JoinArgs),
    /// Run the agent. It ends on SIGTERM or Ctrl-C; the VMs go on.
    ///
    /// The log goes to the standard error output; RUST_LOG sets its level (default: info).
    Run(RunArgs),
    /// Start a session and become the given command (the agent starts VMMs with it).
    #[command(name = crate::launch::SHIM, hide = true)]
    ExecVmm {
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The token. It is a secret: prefer the environment variable where others can see processes.
    #[arg(long, env = "BELLWETHER_JOIN_TOKEN", hide_env_values = true)]
    pub token: String,
    /// Where this node's certificate, key and settings go: a directory that is empty or not there.
    #[arg(long)]
    pub data_dir: PathBuf,
    /// The address at which the controllers reach this host, without a port.
    #[arg(long)]
    pub address: IpAddr,
    /// What the node is called: letters, digits and hyphens. Default: the first label of the host's
    /// name.
    #[arg(long)]
    pub name: Option<String>,
    /// The TCP port on which this agent takes orders of the controllers.
    #[arg(long, default_value_t = Ports::default().agent)]
    pub agent_port: u16,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// The data directory that `join` wrote.
    #[arg(long)]
    pub data_dir: PathBuf,
    /// Settings (TOML), all of them optional: `vmm`, `runtime_dir` (/run/bellwether),
    /// `memory_reserve_mib` (512), `memory_mib`, `vcpu_overcommit` (4), `boot_id_path`,
    /// `renew_interval_ms` (a sixth of the lease), `status_interval_ms` (250). Default:
    /// `agent.toml` in the data directory, if it is there.
    #[arg(long)]
    pub config: Option<PathBuf>,
}

impl RunArgs {
    /// The file with the settings, if there is one.
    pub fn config_file(&self) -> Option<PathBuf> {
        let default = self.data_dir.join("agent.toml");
        self.config.clone().or_else(|| default.exists().then_some(default))
    }
}

/// Becomes a node.
pub async fn join(args: JoinArgs) -> Result<MemberConfig, MemberError> {
    bellwether_member::join(JoinOptions {
        token: args.token,
        data_dir: args.data_dir,
        name: args.name.unwrap_or_else(host_name),
        role: MemberRole::Agent,
        address: args.address,
        ports: Ports { agent: args.agent_port, ..Ports::default() },
    })
    .await
}

fn host_name() -> String {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    name.split('.').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_shows_both_steps() {
        let help = Cli::command().render_long_help().to_string();
        assert!(help.contains("bellwether-agent join --token TOKEN"), "{help}");
        assert!(!help.contains("exec-vmm"), "{help}");
    }
}
