//! What is said over the network and over the sockets of VMMs: the messages of `proto/` as values.

use std::path::PathBuf;

use bellwether_agent_core::{Answer, Stamped, VmmSight};
use bellwether_core::command::{Change, Registration};
use bellwether_core::fence::Promise;
use bellwether_core::observe::VmReport;
use bellwether_core::{Outcome, TaskKind, Vm};
use bellwether_types::{Arbiter, BootId, Epoch, NodeId, StateFileRef, VmId};

use crate::raft;

/// The codes of gRPC that are used.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Code {
    Unavailable,
    DeadlineExceeded,
    Unknown,
    Aborted,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    DataLoss,
    Internal,
}

/// An answer that is an error.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    pub code: Code,
    pub message: String,
}

impl Status {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Why a call has no answer of the other side's making.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CallError {
    /// The other side answered with an error.
    Status(Status),
    /// The connection broke, or was never there.
    Lost,
    Timeout,
}

impl CallError {
    /// As gRPC shows it to the caller.
    pub fn status(self) -> Status {
        match self {
            Self::Status(status) => status,
            Self::Lost => Status::new(Code::Unavailable, "the connection was lost"),
            Self::Timeout => Status::new(Code::DeadlineExceeded, "no answer in time"),
        }
    }
}

#[derive(Clone, Debug)]
pub enum Request {
    Raft(raft::Message),
    Api(Box<Api>),
    Order(Box<Order>),
    Vmm(VmmCall),
}

impl Request {
    /// The same as the network delivers it a second time.
    pub fn repeated(&self) -> Self {
        match self {
            Self::Api(api) => Self::Api(Box::new(Api { operation: None, ..Api::clone(api) })),
            other => other.clone(),
        }
    }
}

#[derive(Clone, Debug)]
pub enum Response {
    Api(ApiReply),
    Order(OrderReply),
    Vmm(VmmReply),
}

/// A request at a controller's API port.
#[derive(Clone, Debug)]
pub struct Api {
    /// A controller passed it on.
    pub forwarded: bool,
    /// Which of the callers' operations it is, for the oracle; a repetition is nobody's.
    pub operation: Option<u64>,
    pub call: ApiCall,
}

#[derive(Clone, Debug)]
pub enum ApiCall {
    Register {
        registration: Registration,
        vms: Vec<VmReport>,
    },
    Renew {
        node: NodeId,
        boot_id: BootId,
        nonce: u64,
        vms: Vec<VmReport>,
        watchdog: Promise,
    },
    /// A person's command that is one change of the state.
    Change(Change),
    /// A person's command that begins a task.
    Begin {
        vm: VmId,
        kind: TaskKind,
        node: Option<NodeId>,
    },
    SetPaused {
        vm: VmId,
        paused: bool,
    },
    /// How a VM is.
    Show {
        vm: VmId,
    },
}

#[derive(Clone, Debug)]
pub enum ApiReply {
    Registered {
        lease_ms: u64,
    },
    /// Not registered: the cluster knows this boot, which has to be named.
    Known {
        boot_id: BootId,
    },
    Renewed {
        nonce: u64,
        lease_ms: u64,
        term: u64,
        /// The leader's clock when a quorum had confirmed it.
        pulse_ms: u64,
        grants: Vec<(VmId, Epoch)>,
        register: bool,
    },
    /// The outcome, and the place in the log that it came from.
    Done {
        outcome: Outcome,
        index: u64,
    },
    /// The VM, and the last entry that the state had applied.
    Shown {
        vm: Option<Box<Vm>>,
        index: u64,
    },
}

/// An order at an agent's port.
#[derive(Clone, PartialEq, Debug)]
pub struct Order {
    pub vm: VmId,
    pub stamped: Stamped,
    pub details: Details,
}

/// What an order needs besides its stamp.
#[derive(Clone, PartialEq, Debug)]
pub enum Details {
    Prepare,
    TakeOver { wait_ms: u64 },
    LoadState { file: StateFileRef },
    Activate { wait_ms: u64 },
    Seal,
    ClaimBack { file: StateFileRef },
    RemoveState { purge: bool },
    Plain,
}

#[derive(Clone, Debug)]
pub enum OrderReply {
    Answer(Answer),
    /// An answer of a release, with the boot that gives it.
    Released {
        reason: String,
        boot_id: BootId,
    },
    NotHeld {
        holder: String,
    },
    Removed,
}

/// A call on a VMM's socket.
#[derive(Clone, Debug)]
pub enum VmmCall {
    Create {
        arbiter: Arbiter,
    },
    Lock {
        epoch: Epoch,
        wait_ms: u64,
    },
    Load {
        file: StateFileRef,
    },
    Start {
        epoch: Epoch,
        wait_ms: u64,
        consume: bool,
    },
    Pause,
    Resume,
    /// Answered when the guest may be stopped; nothing depends on it.
    PreCopy,
    Save {
        generation: u64,
    },
    /// Record in the claim that what was sealed is let go.
    HandOver,
    Shutdown,
    Stop,
    Status,
}

#[derive(Clone, Debug)]
pub enum VmmReply {
    Done,
    Status(VmmSight),
    Saved { file: StateFileRef },
}

/// The path of a VM's claim on the storage.
pub fn claim_path(vm: VmId) -> String {
    format!("claims/{vm}.claim")
}

/// The path of a VM's only disk.
pub fn disk_path(vm: VmId) -> String {
    format!("disks/{vm}.raw")
}

/// The path of a sealed state, named as the product names it.
pub fn state_path(vm: VmId, epoch: Epoch, generation: u64) -> PathBuf {
    format!("state/{vm}.{epoch}.{generation}.state").into()
}
