//! Tasks: multi-step operations on one VM, kept in replicated state so that the next leader goes
//! on where the last one was. See [`crate::saga`] for what each step does.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_types::{Epoch, FenceProof, NodeId, StateFileRef, TaskId, VmId};
use serde::{Deserialize, Serialize};

use crate::state::Runner;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskKind {
    Start,
    Stop,
    /// Asks the guest to shut down.
    Shutdown,
    Migrate,
    Save,
    Restore,
    /// Brings a VM back whose node was lost.
    Failover,
    /// Records that a guest ended by itself.
    Settle,
    Delete,
}

impl TaskKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Shutdown => "shutdown",
            Self::Migrate => "migrate",
            Self::Save => "save",
            Self::Restore => "restore",
            Self::Failover => "failover",
            Self::Settle => "settle",
            Self::Delete => "delete",
        }
    }
}

/// What is asked of a new task.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TaskRequest {
    pub vm: VmId,
    pub kind: TaskKind,
    /// The node that the administrator named.
    pub node: Option<NodeId>,
    pub by: String,
}

/// One try to bring a VM up: a node and the epoch made for this try alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attempt {
    pub node: NodeId,
    pub epoch: Epoch,
}

/// Where a task stands. The drawing is in [`crate::saga`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Step {
    /// Find a node, or first a proof that the old runner is gone.
    Choose,
    Prepare(Attempt),
    /// The attempt's VMM takes the locks that the lost runner held: that is the fence proof.
    TakeOver(Attempt),
    /// The runner seals its state; in a migration the destination is prepared.
    Seal(Option<Attempt>),
    /// The destination reads the sealed file, all but the memory's content.
    Load(Attempt),
    /// The state says that the attempt runs the VM; `from` still has to let go.
    Activate {
        attempt: Attempt,
        from: Option<Runner>,
        file: Option<StateFileRef>,
    },
    /// It may run after all, so it must be proven gone before another try.
    Reap {
        attempt: Attempt,
        error: String,
    },
    /// The source takes its sealed VM back under a higher epoch.
    ClaimBack {
        source: Attempt,
        sealed: Epoch,
        file: StateFileRef,
        error: String,
    },
    /// Undo an attempt that never ran; then the task goes on or fails.
    Abandon {
        attempt: Attempt,
        error: String,
        then: Then,
    },
    AskGuest,
    AwaitGuest {
        until: u64,
    },
    /// The VMM ends; the reply is the proof.
    Release(Runner),
    /// The last traces on the storage go: state files and the claim.
    Purge(NodeId),
    /// The runner writes memory while its guest runs; in a migration the destination reads along.
    PreCopy(Option<Attempt>),
}

/// What comes after an abandoned attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Then {
    Retry,
    Fail,
    /// The proof was all that was wanted.
    Done,
}

impl Step {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Choose => "choose",
            Self::Prepare(_) => "prepare",
            Self::TakeOver(_) => "take-over",
            Self::Seal(_) => "seal",
            Self::Load(_) => "load",
            Self::Activate { .. } => "activate",
            Self::Reap { .. } => "reap",
            Self::ClaimBack { .. } => "claim-back",
            Self::Abandon { .. } => "abandon",
            Self::AskGuest => "ask-guest",
            Self::AwaitGuest { .. } => "await-guest",
            Self::Release(_) => "release",
            Self::Purge(_) => "purge",
            Self::PreCopy(_) => "pre-copy",
        }
    }

    /// The attempt under way: it uses memory on its node, and its VMM is no stray.
    pub fn attempt(&self) -> Option<Attempt> {
        match self {
            Self::Prepare(attempt) | Self::TakeOver(attempt) | Self::Load(attempt) => {
                Some(*attempt)
            }
            Self::Seal(attempt) | Self::PreCopy(attempt) => *attempt,
            Self::Activate { attempt, .. }
            | Self::Reap { attempt, .. }
            | Self::Abandon { attempt, .. } => Some(*attempt),
            Self::ClaimBack { source, .. } => Some(*source),
            Self::Choose
            | Self::AskGuest
            | Self::AwaitGuest { .. }
            | Self::Release(_)
            | Self::Purge(_) => None,
        }
    }
}

/// What happened outside that moves a task on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum StepEvent {
    Chosen {
        node: NodeId,
    },
    NoNode {
        reason: String,
    },
    /// The old runner is proven gone without a lock.
    Proven(FenceProof),
    /// The node was only silent: its VMM runs on under the same epoch.
    Reinstated,
    Prepared,
    /// Every lock of the VM is held by the attempt.
    Held,
    /// Somebody else holds a lock: the old runner lives.
    Busy {
        holder: String,
    },
    Sealed {
        file: StateFileRef,
        measures: Measures,
    },
    Loaded {
        measures: Measures,
    },
    Activated {
        measures: Measures,
    },
    ClaimedBack {
        measures: Measures,
    },
    Released {
        proof: FenceProof,
        reason: String,
    },
    /// The guest was asked to shut down, and has until then.
    Asked {
        until: u64,
    },
    GuestEnded,
    Purged,
    /// The step could not be done, and it is known that it was not.
    Failed {
        error: String,
        retry: Retry,
    },
    /// The node of the VM's runner was lost while the task worked.
    RunnerLost {
        node: NodeId,
    },
    /// The deadline of the step has passed.
    TimedOut,
    /// The planner has chosen, for this reason.
    Placed {
        node: NodeId,
        why: String,
    },
    /// Every lock of the VM is held by the attempt, and the claim says that the old runner has
    /// sealed the VM in this file and let go.
    HeldWithState {
        file: StateFileRef,
    },
    /// The guest can be stopped: what is left to write is small, or will not get smaller.
    PreCopied {
        measures: Measures,
    },
}

/// Whether another node could do better.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Retry {
    OtherNode,
    /// The fault goes with the VM or its file: no node can do it.
    Never,
}

/// Measured parts of a task: microseconds, or bytes where the name says so.
pub type Measures = BTreeMap<String, u64>;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Task {
    pub id: TaskId,
    pub kind: TaskKind,
    pub vm: VmId,
    pub vm_name: String,
    pub by: String,
    pub step: Step,
    /// Raised with every step, so that a result of an earlier step cannot be taken for this one's.
    pub step_no: u32,
    /// Not before this time.
    pub retry_at: u64,
    pub wanted: Option<NodeId>,
    pub tried: BTreeSet<NodeId>,
    /// Failed attempts so far.
    pub failures: u32,
    pub source: Option<NodeId>,
    pub destination: Option<NodeId>,
    pub proof: Option<FenceProof>,
    pub outcome: Option<Result<(), String>>,
    /// When the VM was last changed before this task, by the leader's clock then.
    pub since: u64,
    pub created_at: u64,
    pub ended_at: u64,
    pub measures: Measures,
    pub log: Vec<(u64, String)>,
}

/// How many lines a task's log keeps; a task that is retried for ever must not grow for ever.
const LOG_MAX: usize = 64;

impl Task {
    /// Whether it waits for a node or a proof, with nothing under way anywhere.
    pub fn is_waiting(&self) -> bool {
        self.step == Step::Choose && self.kind != TaskKind::Delete
    }

    pub(crate) fn say(&mut self, at: u64, text: impl Into<String>) {
        let text = text.into();
        if self.log.last().is_some_and(|(_, last)| *last == text) {
            return;
        }
        if self.log.len() == LOG_MAX {
            self.log.remove(LOG_MAX / 2);
        }
        self.log.push((at, text));
    }
}
