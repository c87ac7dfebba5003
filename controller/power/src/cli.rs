//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// What `--help` says first.
const ABOUT: &str = "\
Tries the power switch of a host, as the cluster uses it: any ClusterLabs fence agent.

A settings file (mode 0600) names the agent and what it is told; secrets reach it on standard input
only. For example n2.toml:

    agent = \"fence_ipmilan\"       # in /usr/sbin, from the package fence-agents
    off_ms = 40000                # how long `off` may take; a timeout is a failure
    status_ms = 10000
    confirm_ms = 5000             # how long the status may still say on afterwards
    [parameters]
    ip = \"10.0.9.2\"
    username = \"bellwether\"
    password = \"...\"
    lanplus = true";

#[derive(Debug, Parser)]
#[command(name = "bellwether-power", version, about = ABOUT, long_about = ABOUT, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Print one JSON object on standard output.
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what an agent takes, by its own metadata.
    #[command(after_help = "Example:\n  bellwether-power describe fence_ipmilan")]
    Describe {
        /// `fence_NAME` in /usr/sbin, or a path.
        agent: String,
    },
    /// Check the settings against the agent's metadata, and ask for the host's state.
    #[command(after_help = "Example:\n  bellwether-power check n2.toml")]
    Check { settings: PathBuf },
    /// Switch the host off, and prove it. Whatever runs there is lost.
    #[command(after_help = "Example:\n  bellwether-power off n2.toml --yes")]
    Off {
        settings: PathBuf,
        /// It is meant.
        #[arg(long, required = true)]
        yes: bool,
    },
    /// Switch the host on.
    #[command(after_help = "Example:\n  bellwether-power on n2.toml")]
    On { settings: PathBuf },
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
    fn a_host_is_not_switched_off_by_a_slip() {
        assert!(Cli::try_parse_from(["bellwether-power", "off", "n2.toml"]).is_err());
        assert!(Cli::try_parse_from(["bellwether-power", "off", "n2.toml", "--yes"]).is_ok());
    }
}
