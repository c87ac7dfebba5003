//! `bell what-if …` and `bell explain …`.

use clap::{Args, Subcommand};

use super::vm::CreateArgs;

#[derive(Subcommand, Debug)]
pub enum WhatIfCommand {
    /// These nodes lose power at once: which VM comes up where, when, and which does not
    #[command(
        after_help = "Examples:\n  bell what-if node-down n3\n  bell what-if node-down n3 --and n4"
    )]
    NodeDown(WhatIfNodes),
    /// These nodes are drained: where their VMs go, how long it takes, and what stays
    #[command(after_help = "Example:\n  bell what-if drain n2")]
    Drain(WhatIfNodes),
    /// This VM is created and started: where it goes, or why it is refused
    ///
    /// It takes what `bell vm create` takes. The files of the VM need not be there yet.
    #[command(after_help = "Example:\n  \
        bell what-if add-vm big --memory 64G --vcpus 8 --kernel /srv/guests/web.elf")]
    AddVm(Box<CreateArgs>),
}

#[derive(Args, Debug)]
pub struct WhatIfNodes {
    /// Name or number
    pub node: String,
    /// Another one at the same time; may be given several times
    #[arg(long, value_name = "NODE")]
    pub and: Vec<String>,
}

impl WhatIfNodes {
    pub fn all(&self) -> Vec<String> {
        std::iter::once(&self.node).chain(&self.and).cloned().collect()
    }
}

#[derive(Subcommand, Debug)]
pub enum ExplainCommand {
    /// Why a VM is where it is, and why it is not elsewhere
    #[command(after_help = "Example:\n  bell explain vm web-1")]
    Vm {
        /// Name or id
        vm: String,
    },
    /// Which events led to a task, and what decided each of its steps
    #[command(after_help = "Example:\n  bell explain task 42")]
    Task { id: u64 },
}
