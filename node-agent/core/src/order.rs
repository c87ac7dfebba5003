//! The orders of the controller as values, what the agent does about them, and how they end.

use bellwether_types::{Arbiter, BootId, Epoch, Handover, StateFileRef, VmId};

use crate::refusal::Refusal;

/// What the controller's leader wants of one VM on this node (see `agent.proto`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Order {
    /// Create the VMM; nothing runs and nothing is locked.
    Prepare {
        arbiter: Arbiter,
    },
    /// Take the claim and the disk locks: the proof that no other VMM can write.
    TakeOver,
    /// Load a sealed state file, without running it.
    LoadState {
        hash: [u8; 32],
    },
    /// Run the guest.
    Activate {
        /// The state file from which it goes on; none when it boots.
        hash: Option<[u8; 32]>,
    },
    /// Write memory into the state file while the guest runs.
    PreCopy,
    /// End that, and remove the file.
    EndPreCopy,
    /// Load parts of a file that is not sealed yet.
    LoadAhead,
    /// Stop the guest and seal its state on the storage.
    Seal,
    /// Run a guest that was sealed here, under the order's higher epoch.
    ClaimBack {
        sealed_epoch: Epoch,
    },
    /// Make sure that no VMM of this epoch or a lower one runs here, ever again.
    Release,
    /// Record in the claim that the sealed guest is let go, and end its VMM. No controller orders
    /// this: the node does, when it is cut off.
    HandOver,
    Pause,
    Resume,
    Shutdown,
    /// Attach to the serial console.
    Console,
    /// Remove state files that nobody needs; this is about the storage more than about a VMM.
    RemoveState,
}

impl Order {
    /// The word in messages, logs and failpoints.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Prepare { .. } => "prepare",
            Self::TakeOver => "take-over",
            Self::LoadState { .. } => "load-state",
            Self::Activate { .. } => "activate",
            Self::PreCopy => "pre-copy",
            Self::EndPreCopy => "end-pre-copy",
            Self::LoadAhead => "load-ahead",
            Self::Seal => "seal",
            Self::ClaimBack { .. } => "claim-back",
            Self::Release => "release",
            Self::HandOver => "hand-over",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Shutdown => "shutdown",
            Self::Console => "console",
            Self::RemoveState => "remove-state",
        }
    }
}

/// An order with who gives it and which runner it is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stamped {
    /// The Raft term of the leader.
    pub term: u64,
    /// The task on whose behalf; 0 for none.
    pub task: u64,
    pub epoch: Epoch,
    /// The boot of the host for which the order was decided.
    pub boot: BootId,
    pub order: Order,
}

impl Stamped {
    /// An order that arrives in another boot than it was meant for is refused: the floor that
    /// would have refused it went with the boot (docs/model.md, `OrdersWithoutBoot`).
    pub fn check_boot(&self, vm: VmId, here: BootId) -> Result<(), Refusal> {
        let (order, meant) = (self.order.word(), self.boot);
        match meant == here {
            true => Ok(()),
            false => Err(Refusal::OtherBoot { vm, order, meant, here }),
        }
    }
}

/// Microseconds of an activation; see `ActivateTimings` in `vm.proto`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ActivateTimings {
    pub lock_us: u64,
    pub resume_us: u64,
    pub running_at_ns: u64,
}

/// Microseconds of a save; see `SaveTimings` in `vm.proto`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SaveTimings {
    pub stop_us: u64,
    pub save_us: u64,
    pub seal_us: u64,
    pub bytes_written: u64,
    pub stopped_at_ns: u64,
}

/// A sealed state file and how long it took.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedState {
    pub file: StateFileRef,
    pub timings: SaveTimings,
}

impl SealedState {
    /// A file that a later agent knows; how long it took is forgotten.
    pub fn told_again(file: StateFileRef) -> Self {
        Self { file, timings: SaveTimings::default() }
    }
}

/// What an order brought about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Prepared {
        prepare_us: u64,
    },
    TakenOver {
        /// What came with the claim.
        handover: Option<Handover>,
    },
    Loaded {
        load_us: u64,
    },
    Activated(ActivateTimings),
    Sealed(SealedState),
    ClaimedBack(ActivateTimings),
    /// How the VMM ended; `none` when there was none.
    Released {
        reason: String,
    },
    /// Pause, resume and shutdown have nothing to tell.
    Done,
    /// The VMM is gone, the guest never ran under the order's epoch, and it never will.
    GivenUp,
}

/// What the shell does about an admitted order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Nothing: the order has been carried out before, and this was the answer.
    Answer(Answer),
    /// Create a VMM. `replace` names an incarnation that has to be killed, reaped and cleaned up
    /// before: one that never ran a guest, or whose process has ended.
    Prepare {
        replace: Option<Epoch>,
    },
    Lock,
    /// Hand out the connection: loading takes long, and nothing depends on it.
    LoadAhead,
    Load,
    Start,
    /// Make sure that the storage is there, and hand out the connection: it takes minutes.
    PreCopy,
    EndPreCopy,
    Save,
    ClaimBack,
    /// Stop, kill and reap the VMM; the raised floor is made durable before the answer.
    Release,
    /// The guest cannot run and has not run, for this reason: release its VMM, so that it never
    /// will.
    GiveUp(&'static str),
    HandOver,
    Pause,
    Resume,
    Shutdown,
    Console,
    RemoveState,
}

/// How the execution of an action ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Done(Answer),
    /// It did not happen, and the VMM is as it was before. For a Prepare: there is no VMM.
    Failed,
    /// It may have happened or may still happen: the VMM did not answer in time. Its status
    /// decides, before anything else is admitted.
    Unknown,
}
