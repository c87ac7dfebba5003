//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// What `--help` says first.
const ABOUT: &str = "\
The fencer of one Bellwether node: it acts when agent, controllers or network do not.

It ends VMMs that run on though their lease is over, and, where a watchdog is configured, has the host
reset if even that does not help. VMs whose arbiter is the storage, which today are all, depend
on neither: for them losing the lease stops nothing, and the watchdog is off unless you switch it
on in fencer.toml.

It is a process of its own, locked into memory and scheduled in real time. It handles no signal:
however it ends, an armed watchdog stays armed and resets the host if no other fencer comes in time.";

/// The command line of `bellwether-fencer`.
#[derive(Debug, Parser)]
#[command(name = "bellwether-fencer", version, about = ABOUT, long_about = ABOUT, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the fencer; only `stop` ends it in order. The log goes to standard error.
    #[command(after_help = "Example:\n  bellwether-fencer run")]
    Run(Config),
    /// Check the settings and what this host has, without arming anything.
    #[command(after_help = "Example:\n  bellwether-fencer check --json")]
    Check(Report),
    /// Show what the running fencer told the agent, and whether it yields a fence proof.
    #[command(after_help = "Example:\n  bellwether-fencer status --json")]
    Status(Report),
    /// Disarm the watchdog and end the fencer; refused while VMs of this host depend on the lease.
    #[command(after_help = "Example:\n  bellwether-fencer stop")]
    Stop(Config),
}

#[derive(Debug, Args)]
pub struct Config {
    /// Settings (TOML), all of them optional.
    #[arg(long, value_name = "FILE", default_value = "/etc/bellwether/fencer.toml")]
    pub config: PathBuf,
}

#[derive(Debug, Args)]
pub struct Report {
    #[command(flatten)]
    pub config: Config,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
