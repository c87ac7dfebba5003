//! `bell task …` and `bell event …`.

use clap::{Args, Subcommand};

#[derive(Subcommand, Debug)]
pub enum TaskCommand {
    /// List the tasks that are under way
    #[command(after_help = "Example:\n  bell task list --all")]
    List {
        /// The ended ones, too
        #[arg(long)]
        all: bool,
    },
    /// Show one task: its steps, its measures, why it failed
    #[command(after_help = "Example:\n  bell task show 42")]
    Show { id: u64 },
}

#[derive(Subcommand, Debug)]
pub enum EventCommand {
    /// List what happened
    #[command(
        after_help = "Examples:\n  bell event list --follow\n  bell event list --after 120 -o json"
    )]
    List(EventList),
}

#[derive(Args, Debug)]
pub struct EventList {
    /// Go on with what happens from now on
    #[arg(short, long)]
    pub follow: bool,
    /// Only events after this number
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub after: u64,
}
