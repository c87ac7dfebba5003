//! The command line, and the help that teaches it.

mod cluster;
mod node;
mod rules;
mod vm;
mod watch;
mod why;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use cluster::{ClusterCommand, ContextAdd, ContextCommand, InitArgs, JoinRole};
pub use node::{ConfirmDown, NodeCommand};
pub use rules::{ClusterSet, RuleArgs, SetArgs};
pub use vm::{ConsoleArgs, CreateArgs, OnNode, StopArgs, VmCommand, VmName};
pub use watch::{EventCommand, EventList, TaskCommand};
pub use why::{ExplainCommand, WhatIfCommand};

use crate::exit::EXIT_CODES;
use crate::parse;

/// Administers a Bellwether cluster: its nodes, its virtual machines, what happens to them.
///
/// A command that starts a task waits for its end and shows each step; with --no-wait it prints the
/// task's number and returns. The cluster to talk to is the current context (`bell context list`).
#[derive(Parser, Debug)]
#[command(name = "bell", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Tables for people, or JSON with stable keys for programs
    #[arg(short, long, value_enum, default_value = "table", global = true)]
    pub output: Format,
    /// Wait for the task that the command starts (this is the default)
    #[arg(long, global = true, conflicts_with = "no_wait")]
    pub wait: bool,
    /// Print the number of the task and return at once
    #[arg(long, global = true)]
    pub no_wait: bool,
    /// Give up after so long, e.g. 30s; an answer is otherwise awaited 15s, a task without limit
    #[arg(long, value_name = "TIME", value_parser = parse::duration, global = true)]
    pub timeout: Option<Duration>,
    /// The context to use instead of the current one
    #[arg(long, value_name = "NAME", global = true)]
    pub context: Option<String>,
    /// The file with the contexts [default: ~/.config/bellwether/bell.toml]
    #[arg(long, value_name = "FILE", env = "BELLWETHER_CONFIG", global = true)]
    pub config: Option<PathBuf>,
}

/// How results are written to standard output.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    Table,
    Json,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Make a cluster, let hosts join it, see how it is
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// The hosts: see them, empty them for maintenance, declare one dead
    #[command(subcommand)]
    Node(NodeCommand),
    /// The virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// What the cluster is doing and has done
    #[command(subcommand)]
    Task(TaskCommand),
    /// What would happen, by the real planner on a copy of the cluster's state
    ///
    /// Nothing is changed. Times are those of the cluster's settings and of what its tasks have
    /// measured; a guest's boot and a storage that keeps a dead node's locks come on top.
    #[command(subcommand)]
    WhatIf(WhatIfCommand),
    /// Why things are as they are: a VM's place, a task's decisions
    #[command(subcommand)]
    Explain(ExplainCommand),
    /// What a cluster would do in a scenario from a file: faults and commands, in virtual time
    ///
    /// Needs no cluster. The real decision code runs on simulated hosts, networks and storage; minutes
    /// take milliseconds, and the same file always gives the same log. Each line of the log is a
    /// decision with its time and its reason. docs/scenarios.md describes the file; a small one:
    ///
    ///     nodes 3 memory 16G vcpus 8
    ///     storage nfs lease 10s
    ///     vm web memory 4G prefer n1 failback immediately on n1
    ///     at 10s power off n1 for 1m
    ///     at 30s bell vm set web --priority 10
    ///     expect web runs on n2,n3 by 40s
    ///
    /// The exit code is 0 when all that the file expects was so, and 1 when something was not.
    #[command(
        verbatim_doc_comment,
        after_help = "Examples:\n  bell simulate power-cut.scenario\n  \
                      bell simulate power-cut.scenario -o json"
    )]
    Simulate {
        /// The scenario
        file: PathBuf,
    },
    /// What happened, in the order in which it happened
    #[command(subcommand)]
    Event(EventCommand),
    /// Which clusters this command knows
    #[command(subcommand)]
    Context(ContextCommand),
    /// Print completions for a shell
    #[command(
        after_help = "Example:\n  bell completions bash > ~/.local/share/bash-completion/completions/bell"
    )]
    Completions { shell: clap_complete::Shell },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_that_parses() {
        fn leaves(command: &clap::Command, found: &mut Vec<clap::Command>) {
            match command.has_subcommands() {
                true => command.get_subcommands().for_each(|sub| leaves(sub, found)),
                false => found.push(command.clone()),
            }
        }
        let mut all = Vec::new();
        leaves(&Cli::command(), &mut all);
        assert!(all.len() > 25);
        for command in all {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let lines: Vec<_> = help.lines().filter_map(|l| l.strip_prefix("  bell ")).collect();
            assert!(help.starts_with("Example") && !lines.is_empty(), "{}", command.get_name());
            for line in lines {
                let line = line.split([';', '|', '>', '#']).next().unwrap_or(line);
                let words = std::iter::once("bell").chain(line.split_whitespace());
                let parsed = Cli::try_parse_from(words);
                assert!(parsed.is_ok(), "{line}: {}", parsed.err().unwrap());
            }
        }
    }

    #[test]
    fn waiting_is_the_default_and_cannot_be_wanted_both_ways() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.global.no_wait);
        assert!(!parse("bell vm start web-1").unwrap());
        assert!(!parse("bell vm start web-1 --wait").unwrap());
        assert!(parse("bell vm start web-1 --no-wait").unwrap());
        assert!(parse("bell --no-wait vm start web-1").unwrap());
        assert!(parse("bell vm start web-1 --wait --no-wait").is_err());
    }
}
