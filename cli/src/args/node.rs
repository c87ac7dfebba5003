//! `bell node …`.

use clap::{Args, Subcommand};

#[derive(Subcommand, Debug)]
pub enum NodeCommand {
    /// List the nodes with what they have and what they run
    #[command(after_help = "Example:\n  bell node list")]
    List,
    /// Show everything about one node
    #[command(after_help = "Example:\n  bell node show n1")]
    Show(NodeName),
    /// Move all VMs away and place none there, for maintenance
    ///
    /// Waits until the node is empty, and shows which VMs are still there and what holds them up.
    /// The drain goes on when the waiting ends; `bell node resume` calls it off.
    #[command(
        after_help = "Examples:\n  bell node drain n1\n  bell node drain n1 --timeout 10m\n  bell node drain n1 --no-wait"
    )]
    Drain(NodeName),
    /// Let a drained node run VMs again
    #[command(after_help = "Example:\n  bell node resume n1")]
    Resume(NodeName),
    /// Let a node in quarantine get new VMs again, and forget how often it was lost
    ///
    /// A node that is lost again and again gets no new VMs for a while; the VMs on it stay. At most
    /// a quarter of the nodes is in quarantine. `bell cluster set` changes after how many losses.
    #[command(after_help = "Example:\n  bell node unquarantine n1")]
    Unquarantine(NodeName),
    /// Assert that an unknown node is switched off, so that its VMs may start elsewhere
    ///
    /// The cluster cannot check this assertion: on this word alone it starts the node's VMs
    /// elsewhere. A runner that still lives keeps the locks of its disks, so that the start waits
    /// for it. Assert it only when the node is really off.
    #[command(
        after_help = "Examples:\n  bell node confirm-down n1\n  bell node confirm-down n1 --confirm n1"
    )]
    ConfirmDown(ConfirmDown),
}

#[derive(Args, Debug)]
pub struct NodeName {
    /// Name or number
    pub node: String,
}

#[derive(Args, Debug)]
pub struct ConfirmDown {
    /// Name or number
    pub node: String,
    /// The node's name once more, instead of typing it when asked
    #[arg(long, value_name = "NAME")]
    pub confirm: Option<String>,
}
