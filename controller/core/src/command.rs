//! Commands: the only way to change the replicated state. Each carries the time and the
//! identities that the leader stamped into it, so that `apply` is deterministic.
//!
//! The encoding in the log is versioned by the order of variants: new ones go to the end.

use std::path::PathBuf;

use bellwether_types::{
    Arbiter, BootId, ClusterId, ClusterPatch, MemberRole, NodeId, Ports, TaskId, VmId, VmPatch,
    VmRules, VmSpec,
};
use serde::{Deserialize, Serialize};

use crate::fence::NodeWatchdog;
use crate::state::{Member, VmSpecV1};
use crate::task::{StepEvent, TaskRequest};

/// One change, with the leader's clock in milliseconds since 1970.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Command {
    pub at: u64,
    pub change: Change,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Change {
    InitCluster {
        id: ClusterId,
        name: String,
        storage: PathBuf,
        first: Member,
    },
    CreateToken {
        hash: [u8; 32],
        role: MemberRole,
        expires_at: u64,
    },
    RedeemToken {
        hash: [u8; 32],
        role: MemberRole,
        name: String,
        address: String,
        ports: Ports,
    },
    RegisterNode(Registration),
    /// The node was not heard from; ignored when it registered under another boot meanwhile.
    NodeUnknown {
        node: NodeId,
        boot_id: BootId,
    },
    /// The node was heard from again, in the same boot.
    NodeOnline {
        node: NodeId,
        boot_id: BootId,
    },
    Cordon {
        node: NodeId,
        cordoned: bool,
    },
    /// A person asserts that the node is down.
    ConfirmDown {
        node: NodeId,
        who: String,
    },
    /// Of format 1; `DefineVm` took its place.
    CreateVm {
        id: VmId,
        spec: VmSpecV1,
    },
    BeginTask(TaskRequest),
    /// A task goes a step further. Ignored when the task is no longer at `step_no`.
    Advance {
        task: TaskId,
        step_no: u32,
        event: StepEvent,
    },
    SetPaused {
        vm: VmId,
        paused: bool,
    },
    /// A new VM with its rules.
    DefineVm {
        id: VmId,
        spec: VmSpec,
        rules: VmRules,
    },
    /// Changes rules of a VM, whether it runs or not.
    SetVm {
        vm: VmId,
        patch: VmPatch,
    },
    SetCluster {
        patch: ClusterPatch,
    },
    /// A quarantine has passed, or a person ends it.
    LiftQuarantine {
        node: NodeId,
        by: String,
    },
    /// The cluster begins a task by itself, for this reason.
    Begin {
        request: TaskRequest,
        because: String,
    },
    /// What a node's agent says of its watchdog.
    NoteWatchdog {
        node: NodeId,
        said: NodeWatchdog,
    },
    /// A new VM with its rules, under this arbiter.
    DefineVmUnder {
        id: VmId,
        spec: VmSpec,
        rules: VmRules,
        arbiter: Arbiter,
    },
    /// A fence agent has switched a node's host off, and its status then said so.
    SwitchedOff {
        node: NodeId,
        boot_id: BootId,
        device: String,
    },
    /// A VM stays on a node that is drained, for this reason.
    Stays {
        vm: VmId,
        node: NodeId,
        why: String,
    },
}

impl Change {
    /// The VM that this can change; no command changes two.
    pub(crate) fn vm(&self, state: &crate::State) -> Option<VmId> {
        match self {
            Self::CreateVm { id, .. }
            | Self::DefineVm { id, .. }
            | Self::DefineVmUnder { id, .. } => Some(*id),
            Self::BeginTask(request) | Self::Begin { request, .. } => Some(request.vm),
            Self::Advance { task, .. } => state.tasks.get(task).map(|task| task.vm),
            Self::SetPaused { vm, .. } | Self::SetVm { vm, .. } | Self::Stays { vm, .. } => {
                Some(*vm)
            }
            Self::InitCluster { .. }
            | Self::CreateToken { .. }
            | Self::RedeemToken { .. }
            | Self::RegisterNode(_)
            | Self::NodeUnknown { .. }
            | Self::NodeOnline { .. }
            | Self::Cordon { .. }
            | Self::ConfirmDown { .. }
            | Self::SetCluster { .. }
            | Self::LiftQuarantine { .. }
            | Self::NoteWatchdog { .. }
            | Self::SwitchedOff { .. } => None,
        }
    }
}

/// What an agent says of its host when it registers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Registration {
    pub node: NodeId,
    pub name: String,
    pub boot_id: BootId,
    pub address: String,
    pub agent_port: u16,
    pub memory_mib: u64,
    pub vcpus: u32,
    pub version: String,
    /// The boot of this node that the cluster knew before. A registration that does not name it may
    /// be older than that boot, and says nothing.
    pub replaces: Option<BootId>,
}

/// What a command came to. A refusal is an outcome, not an error.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    Done,
    /// It was so already, or is about something that has passed; nothing was changed.
    Unchanged,
    Task(TaskId),
    Member(u64),
    Rejected(Rejection),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum RejectionKind {
    NotFound,
    AlreadyExists,
    /// The state does not allow it now.
    Conflict,
    Invalid,
    Denied,
}

/// Why a command was refused, in words for an administrator.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct Rejection {
    pub kind: RejectionKind,
    pub text: String,
}

impl Rejection {
    pub(crate) fn new(kind: RejectionKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }
    pub(crate) fn not_found(text: impl Into<String>) -> Self {
        Self::new(RejectionKind::NotFound, text)
    }
    pub(crate) fn conflict(text: impl Into<String>) -> Self {
        Self::new(RejectionKind::Conflict, text)
    }
    pub(crate) fn denied(text: impl Into<String>) -> Self {
        Self::new(RejectionKind::Denied, text)
    }
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::new(RejectionKind::Invalid, text)
    }
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.change)
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}
