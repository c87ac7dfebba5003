//! What the driver is asked.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bellwether_memory::{AheadStats, LazyEvent, Piece};
use bellwether_types::{BootId, Epoch, NodeId, StateFileRef, VmId, VmSpec};
use tokio::sync::oneshot;

use super::VmmError;
use crate::board::Sealed;
use crate::kvm::GuestEnd;
use crate::lease::Arbiter;
use crate::machine::SerialOutput;
use crate::precopy::{Options, Watched};

/// Everything that a machine is built from.
#[derive(Clone, Debug)]
pub struct CreateConfig {
    pub vm_id: VmId,
    pub spec: VmSpec,
    pub claim_path: Option<PathBuf>,
    pub node_id: NodeId,
    pub boot_id: BootId,
    pub arbiter: Arbiter,
    pub lease_path: Option<PathBuf>,
    pub serial: SerialOutput,
}

/// How long an activation took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Activated {
    pub lock_us: u64,
    pub resume_us: u64,
    /// CLOCK_BOOTTIME at the first `KVM_RUN`; 0 if the guest is held by something else.
    pub running_at_ns: u64,
}

/// Where an answer goes.
pub struct Reply<T>(oneshot::Sender<Result<T, VmmError>>);

impl<T> Reply<T> {
    pub fn new() -> (Self, oneshot::Receiver<Result<T, VmmError>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(sender), receiver)
    }

    /// Answers; whoever asked may have gone.
    pub(super) fn send(self, answer: Result<T, VmmError>) {
        if let Err(error) = &answer {
            tracing::warn!(%error, "command failed");
        }
        let _asker_gone = self.0.send(answer);
    }
}

/// A request, or an event of the machine.
pub enum Command {
    Create(Box<CreateConfig>, Reply<()>),
    Lock {
        epoch: u64,
        wait: Duration,
        reply: Reply<()>,
    },
    /// Loads parts of a file that is not sealed yet.
    LoadAhead {
        path: PathBuf,
        epoch: Epoch,
        generation: u64,
        pieces: Vec<Piece>,
        reply: Reply<AheadStats>,
    },
    /// Answers with the time that it took, in microseconds.
    Load {
        file: StateFileRef,
        reply: Reply<u64>,
    },
    Start {
        epoch: u64,
        wait: Duration,
        consume: bool,
        reply: Reply<Activated>,
    },
    Pause(Reply<()>),
    Resume(Reply<()>),
    Save {
        directory: PathBuf,
        generation: u64,
        reply: Reply<Sealed>,
    },
    HandOver(Reply<()>),
    /// Answers when it has started, with where to watch it.
    PreCopy(Options, Reply<Arc<Watched>>),
    AbortPreCopy(Reply<()>),
    /// A pre-copy has ended by itself.
    PreCopyEnded,
    Shutdown(Reply<()>),
    /// Answers with the reason, after the locks are released.
    Stop(Reply<String>),
    /// The lease ran out and the guest is at rest, or it came back to a guest without locks.
    LeaseChanged,
    Memory(LazyEvent),
    Ended(GuestEnd),
    /// SIGTERM or SIGINT.
    Signal,
}
