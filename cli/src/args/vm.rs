//! `bell vm …`.

use std::path::PathBuf;
use std::time::Duration;

use bellwether_types::{Arbiter, DiskSpec, NicSpec, RestartPolicy};
use clap::{Args, Subcommand};

use super::{RuleArgs, SetArgs};
use crate::parse;

#[derive(Subcommand, Debug)]
pub enum VmCommand {
    /// Define a VM, from options or from a file
    ///
    /// A file has the keys name, memory, vcpus, kernel, initrd, cmdline, disks (path, format, read_only), nics (bridge, mac),
    /// possible_owners, priority, restart, preferred_owners, failback, anti_affinity, start_after and
    /// restarts. Options on the command line go before the file.
    #[command(after_help = "Examples:\n  \
        bell vm create web-1 --memory 1G --vcpus 2 --kernel /srv/guests/web.elf \
        --disk path=/srv/bellwether/web-1.raw,format=raw --start\n  \
        bell vm create -f web-1.toml --start")]
    Create(Box<CreateArgs>),
    /// Change rules of a VM, whether it runs or not
    ///
    /// What is not named stays as it is; `none` takes a list away. A change moves no VM by itself:
    /// it counts from the next start, move or failover on. Only a failback policy can begin a move.
    #[command(after_help = "Examples:\n  \
        bell vm set web-1 --prefer n1,n2 --failback 22-6\n  \
        bell vm set web-1 --apart web:hard --after db-1 --restarts 3/10m\n  \
        bell vm set web-1 --owner none --priority 10")]
    Set(Box<SetArgs>),
    /// List the VMs
    #[command(after_help = "Example:\n  bell vm list")]
    List,
    /// Show everything about one VM
    #[command(after_help = "Example:\n  bell vm show web-1")]
    Show(VmName),
    /// Start a VM on the node that suits best, or on a given one
    #[command(after_help = "Example:\n  bell vm start web-1 --on n2")]
    Start(OnNode),
    /// Ask the guest to shut down
    #[command(after_help = "Example:\n  bell vm shutdown web-1")]
    Shutdown(VmName),
    /// Switch a VM off, as if its plug were pulled
    #[command(after_help = "Example:\n  bell vm stop web-1 --yes")]
    Stop(StopArgs),
    /// Halt a VM where it is, in memory
    #[command(after_help = "Example:\n  bell vm pause web-1")]
    Pause(VmName),
    /// Let a paused VM go on
    #[command(after_help = "Example:\n  bell vm resume web-1")]
    Resume(VmName),
    /// Move a running VM to another node, and print how long it stood still
    #[command(after_help = "Example:\n  bell vm migrate web-1 --to n3")]
    Migrate {
        /// Name or id
        vm: String,
        /// The node, by name or number; otherwise the planner chooses
        #[arg(long, value_name = "NODE")]
        to: Option<String>,
    },
    /// Write a VM with its memory to the storage and release its node
    #[command(after_help = "Example:\n  bell vm save web-1")]
    Save(VmName),
    /// Let a saved VM go on where it stopped, on any node
    #[command(after_help = "Example:\n  bell vm restore web-1 --on n1")]
    Restore(OnNode),
    /// Talk to the serial console; Ctrl-] leaves
    ///
    /// Without a terminal it copies: standard input to the guest, the guest's output to standard
    /// output, until the console ends, --until is seen, or --for has passed.
    #[command(after_help = "Examples:\n  bell vm console web-1\n  \
        bell vm console web-1 --until login: --for 30s")]
    Console(ConsoleArgs),
    /// Remove a stopped VM from the cluster; its disks stay where they are
    #[command(after_help = "Example:\n  bell vm delete web-1")]
    Delete(VmName),
}

#[derive(Args, Debug)]
pub struct VmName {
    /// Name or id
    pub vm: String,
}

#[derive(Args, Debug)]
pub struct OnNode {
    /// Name or id
    pub vm: String,
    /// The node, by name or number; otherwise the planner chooses
    #[arg(long, value_name = "NODE")]
    pub on: Option<String>,
}

#[derive(Args, Debug)]
pub struct StopArgs {
    /// Name or id
    pub vm: String,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
}

#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Letters, digits and hyphens; unique in the cluster
    #[arg(required_unless_present = "file")]
    pub name: Option<String>,
    /// Read the specification from a .toml or .json file
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Guest memory with a binary unit, like 256M or 1G
    #[arg(long, value_name = "SIZE", value_parser = parse::memory_mib, required_unless_present = "file")]
    pub memory: Option<u64>,
    /// The number of virtual processors [default: 1]
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// A bzImage (a distribution's vmlinuz), or an ELF image with a PVH entry; absolute, on storage that
    /// the nodes share
    #[arg(long, value_name = "PATH", required_unless_present = "file")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk for the kernel, absolute, on the same storage
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// A disk: path=PATH,format=raw[,readonly]; may be given several times
    #[arg(long = "disk", value_name = "DISK", value_parser = parse::disk)]
    pub disks: Vec<DiskSpec>,
    /// A network card: bridge=NAME[,mac=ADDRESS]; may be given several times
    #[arg(long = "nic", value_name = "NIC", value_parser = <NicSpec as std::str::FromStr>::from_str)]
    pub nics: Vec<NicSpec>,
    /// A node that may run it, by name or number; may be given several times [default: every node]
    #[arg(long = "owner", value_name = "NODE")]
    pub owners: Vec<String>,
    /// Higher is restarted first [default: 0]
    #[arg(long, value_name = "N")]
    pub priority: Option<u32>,
    /// What to do when its node fails: restart or never [default: restart]
    #[arg(long, value_name = "POLICY", value_parser = parse::restart_policy)]
    pub restart: Option<RestartPolicy>,
    /// Who decides whether it goes on where its node has lost its lease: storage or lease
    ///
    /// Under `storage`, the default, it goes on: nobody can take its locks while it lives. Under
    /// `lease` it stands still at the deadline, and is started elsewhere only with a fence proof that
    /// takes a hardware watchdog, a power switch or a person: `bell node show` says which proofs a
    /// node can yield.
    #[arg(long, value_name = "ARBITER", value_parser = parse::arbiter)]
    pub arbiter: Option<Arbiter>,
    /// Start it when it is made
    #[arg(long)]
    pub start: bool,
    #[command(flatten)]
    pub rules: RuleArgs,
}

#[derive(Args, Debug)]
pub struct ConsoleArgs {
    /// Name or id
    pub vm: String,
    /// Leave when this text has appeared
    #[arg(long, value_name = "TEXT")]
    pub until: Option<String>,
    /// Leave after so long
    #[arg(long = "for", value_name = "TIME", value_parser = parse::duration)]
    pub duration: Option<Duration>,
}
