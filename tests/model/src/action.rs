//! The transitions, with the names that the cores use.

use crate::config::FaultKind;
use crate::state::{Kind, Order};
use crate::words::{Boot, Epoch, NodeId, VmId};

/// One transition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// The leader commits something about a VM.
    Commit(VmId, Commit),
    /// It commits something about a node: `Change` in `controller/core/src/command.rs`.
    NodeUnknown(NodeId),
    NodeOnline(NodeId),
    RegisterNode(NodeId, Boot),
    /// The leader orders the release of a VMM that the state has no place for.
    ReleaseStray(VmId, NodeId, Epoch),
    /// An order arrives, and the agent carries it out.
    Deliver(VmId, Order),
    /// A VMM or its agent does something by itself.
    Vmm(VmId, NodeId, VmmAct),
    Fault(VmId, NodeId, FaultKind),
    /// Another controller comes to lead: what the old one had heard is gone.
    LeaderLost,
    /// A tick of real time passes.
    Tick,
    /// A node stamps a lease request.
    Ask(NodeId),
    /// The leader confirms with a quorum, after the request came in, and grants.
    Grant(NodeId),
    GrantArrives(NodeId),
}

/// `StepEvent`, `BeginTask`, and the order that `Choose` gives to a node that is back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Commit {
    BeginTask(Kind),
    RunnerLost,
    Reinstated,
    Proven(Proof),
    Chosen(NodeId),
    /// In `Choose`: the node is back and does not run the VM, so it is told to release it.
    GiveRelease,
    Prepared,
    Held {
        handed: Option<Epoch>,
    },
    Sealed,
    Loaded,
    Activated,
    ClaimedBack,
    Released,
    /// The leader finds that the watchdog has had its time; the proof is committed later.
    Fence,
    /// Of an attempt: `Busy`, or any other failure before a guest can have run.
    Failed,
    TimedOut,
}

/// Proofs that need neither a lock nor the agent's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proof {
    Rebooted,
    Watchdog,
}

/// What a VMM and its agent do without an order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmmAct {
    /// A VMM that was told to start has its locks, and runs the guest.
    Run,
    /// A start that was refused: the agent releases the VMM before it says so.
    GiveUp,
    /// The handover record, written under the claim's lock.
    HandOverRecord,
    /// The VMM of a guest that is handed over ends.
    LetGo,
    /// The node is heard again before it let go: the guest goes on.
    CallOff,
    /// A flaw: a sealed guest goes on by itself.
    GoOn,
}
