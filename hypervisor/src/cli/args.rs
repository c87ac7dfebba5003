//! The arguments.

use std::path::PathBuf;

use bellwether_types::NicSpec;
use clap::{Parser, Subcommand, ValueEnum};

use super::disk::{DiskArg, MemoryMib, SerialArg};

/// Exit status, for `--help`.
const EXIT_STATUS: &str = "\
Exit status of run, restore and serve:
  0  the guest shut down, or the VMM was stopped in order (stop, SIGTERM, SIGINT)
  1  the VM could not be created or started; the message says why
  2  the command line is wrong
  3  the guest reset itself
  4  the guest caused a triple fault
  5  internal error: KVM cannot go on with the guest
Clients exit with 0 if the VMM did what was asked, else with 1.

Example: boot a guest, save it, and go on in a new process
  bellwether-vmm run --kernel guest.elf --memory 256M --disk path=disk.img,format=raw \\
      --serial file=serial.log --api-socket /run/vm1/api.sock &
  bellwether-vmm save --api-socket /run/vm1/api.sock --state-file /tmp/vm1.state --stop
  bellwether-vmm restore --state-file /tmp/vm1.state --disk path=disk.img,format=raw \\
      --serial file=serial.log --api-socket /run/vm1/api.sock";

/// The virtual machine monitor of Bellwether: one process runs one VM under KVM.
#[derive(Parser, Debug)]
#[command(version, about, after_help = EXIT_STATUS, max_term_width = 100)]
pub struct Args {
    /// What to log to standard error: error, warn, info, debug, or a filter such as
    /// `info,bellwether_vmm::lease=debug`.
    #[arg(long, global = true, env = "BELLWETHER_LOG", default_value = "warn")]
    pub log: String,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Boot a VM and stay in the foreground until it ends.
    Run(RunArgs),
    /// Start an empty VMM that waits on its API socket for Create. This is what an agent starts.
    Serve(ServeArgs),
    /// Go on with a saved VM in this process; the guest runs at once, its memory follows on demand.
    Restore(RestoreArgs),
    #[command(flatten)]
    Client(ClientCommand),
}

/// What a machine is made of.
#[derive(clap::Args, Debug)]
pub struct MachineArgs {
    /// The number of virtual processors, 1 to 64.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u32,
    /// A disk, once for each: path=FILE,format=raw[,readonly]
    #[arg(long = "disk", value_name = "DISK")]
    pub disks: Vec<DiskArg>,
    /// A network card, once for each: bridge=NAME[,mac=ADDRESS]. It is plugged into a Linux bridge that
    /// exists, which needs CAP_NET_ADMIN.
    #[arg(long = "nic", value_name = "NIC")]
    pub nics: Vec<NicSpec>,
    /// Where the serial output goes: stdio, or file=FILE to append to a file. Without it, only the
    /// console has it.
    #[arg(long, value_name = "stdio|file=FILE")]
    pub serial: Option<SerialArg>,
    /// The control socket; its directory is made with mode 0700 if it is missing.
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Where to record why the VMM ended. [default: exit.json beside the socket, if there is one]
    #[arg(long, value_name = "PATH")]
    pub exit_file: Option<PathBuf>,
    /// The claim file that makes this VMM the VM's one runner, on the storage of its disks. Without
    /// it only the disks are locked.
    #[arg(long, value_name = "PATH")]
    pub claim: Option<PathBuf>,
    /// How long to wait for the claim and the disk locks, milliseconds.
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub lock_wait_ms: u64,
    /// The epoch under which the VM runs. [default: 1, or one more than the state file's]
    #[arg(long, value_name = "N")]
    pub epoch: Option<u64>,
}

#[derive(clap::Args, Debug)]
pub struct RunArgs {
    /// A bzImage, such as a distribution's vmlinuz, or an ELF image with a PVH entry: an uncompressed
    /// vmlinux, or another PVH guest.
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// The initial RAM disk for the kernel.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The guest's memory, such as 256M or 4G; a plain number is MiB.
    #[arg(long, value_name = "SIZE")]
    pub memory: MemoryMib,
    /// The kernel's command line.
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub cmdline: String,
    /// The VM's identity, a UUID, which its state files carry. [default: a new one]
    #[arg(long, value_name = "UUID")]
    pub vm_id: Option<String>,
    #[command(flatten)]
    pub machine: MachineArgs,
}

#[derive(clap::Args, Debug)]
pub struct ServeArgs {
    /// The control socket; its directory is made with mode 0700 if it is missing.
    #[arg(long, value_name = "PATH")]
    pub api_socket: PathBuf,
    /// Where to record why the VMM ended. [default: exit.json beside the socket]
    #[arg(long, value_name = "PATH")]
    pub exit_file: Option<PathBuf>,
}

#[derive(clap::Args, Debug)]
pub struct RestoreArgs {
    /// The sealed state file.
    #[arg(long, value_name = "FILE", required_unless_present = "tail", conflicts_with = "tail")]
    pub state_file: Option<PathBuf>,
    /// Instead of a file: the control socket of a running VMM. Its guest is saved with pre-copy, its
    /// memory is loaded here while it is written, and the guest goes on here; that VMM ends.
    #[arg(long, value_name = "SOCKET", requires = "directory")]
    pub tail: Option<PathBuf>,
    /// With --tail: the directory for the state file, seen by both VMMs.
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
    #[command(flatten)]
    pub pre_copy: PreCopyArgs,
    /// Remove the state file when all memory has been loaded from it.
    #[arg(long)]
    pub consume: bool,
    /// Restore paused: build and load everything, and wait for `resume`.
    #[arg(long)]
    pub paused: bool,
    #[command(flatten)]
    pub machine: MachineArgs,
}

#[derive(clap::Args, Debug)]
pub struct SocketArg {
    /// The VMM's control socket.
    #[arg(long, value_name = "PATH")]
    pub api_socket: PathBuf,
}

#[derive(Subcommand, Debug)]
pub enum ClientCommand {
    /// Print the VMM's state as JSON.
    Status(SocketArg),
    /// Stop the guest's processors and disks until `resume`.
    Pause(SocketArg),
    /// Let a paused guest go on, or claim a saved one back.
    Resume(SocketArg),
    /// Save the VM into a sealed state file. The guest stays stopped, its disks locked, until
    /// `resume` or `stop`; after an error it goes on.
    Save(SaveArgs),
    /// Press the power button; a guest that listens shuts down.
    Shutdown(SocketArg),
    /// End the VMM at once, in order: disks are flushed and unlocked.
    Stop(SocketArg),
    /// Attach to the serial console: its recent output, what comes, and input from stdin.
    Console(SocketArg),
}

#[derive(clap::Args, Debug)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["state_file", "directory"]))]
pub struct SaveArgs {
    #[command(flatten)]
    pub socket: SocketArg,
    /// The file to save into; it must not exist.
    #[arg(long, value_name = "FILE")]
    pub state_file: Option<PathBuf>,
    /// The directory to save into, as <vm>.<epoch>.<generation>.state
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// Write memory while the guest runs, and stop it only for what changed last; progress goes to
    /// standard error.
    #[arg(long)]
    pub precopy: bool,
    #[command(flatten)]
    pub pre_copy: PreCopyArgs,
    /// Stop the VMM after the save, so that the VM can be restored elsewhere.
    #[arg(long)]
    pub stop: bool,
}

/// How to pre-copy; without a pre-copy it means nothing.
#[derive(clap::Args, Clone, Debug)]
pub struct PreCopyArgs {
    /// How long a pre-copied guest may stand still, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 50)]
    pub downtime_ms: u32,
    /// When the guest dirties memory faster than the storage takes it: `finish` with the longer
    /// outage that is predicted, or `give-up` and let the guest run.
    #[arg(long, value_name = "WHAT", default_value = "finish")]
    pub if_stuck: IfStuck,
    /// The most to write a second while the guest runs, MiB.
    #[arg(long, value_name = "MIB")]
    pub rate_mib_s: Option<u64>,
}

/// What to do when a pre-copy cannot converge.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfStuck {
    Finish,
    GiveUp,
}
