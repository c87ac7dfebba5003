//! The proof `power`: which hosts a leader switches off, and what it knows of their switches.
//!
//! ```text
//!   a silent node's VM under the lease arbiter waits for a proof
//!     --> the leader asks the node's fence agent: `off`, then `status`
//!           off -----------> SwitchedOff: the proof for all that ran in that boot
//!           anything else -> shown as the reason; asked again after a pause; other proofs go on
//! ```
//!
//! A VM under the storage arbiter needs none of this: its takeover waits for what the storage gives
//! up, and the storage does so neither sooner nor later for a host without power.

use std::collections::BTreeSet;

use bellwether_types::{Arbiter, BootId, NodeId};

use crate::observe::Observed;
use crate::state::{Liveness, Place, State};

/// The pause after a switch that gave no proof, milliseconds.
const AGAIN_MS: u64 = 15_000;

/// What a leader knows of one node's power switch; in its memory alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PowerSwitch {
    /// The fence agent's name.
    pub device: String,
    /// The host is being switched off.
    pub is_switching: bool,
    /// Its newest word, and when that was: whether the host has power, or why it cannot say.
    pub said: Option<(u64, Result<bool, String>)>,
}

impl PowerSwitch {
    /// A switch that nobody has asked yet.
    pub fn new(device: String) -> Self {
        Self { device, is_switching: false, said: None }
    }

    /// Why there is no proof by it now; none while there may be one soon.
    pub(crate) fn failure(&self) -> Option<&str> {
        match &self.said {
            Some((_, Err(reason))) if !self.is_switching => Some(reason),
            _ => None,
        }
    }

    fn is_due(&self, now: u64) -> bool {
        match &self.said {
            Some((at, Err(_))) => !self.is_switching && now >= at.saturating_add(AGAIN_MS),
            _ => !self.is_switching,
        }
    }
}

/// What a fence agent answered, without an error, on the way to the proof.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SwitchAnswer {
    /// It says that it has switched the host off.
    Off,
    /// The word of its `status`.
    Status { is_on: bool },
}

/// What follows such an answer. After an error nothing does: there is no proof.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SwitchStep {
    AskStatus,
    /// The same after a pause: hosts take their time to go off.
    AskAgain,
    Proven,
    /// It said that it switched the host off, and goes on saying that it is on.
    StillOn,
}

/// The way from an `off` that succeeded to the proof: only a `status` behind it gives one. `after_ms`
/// is the time since the `off`, and `confirm_ms` how long the host may be said to be on.
pub fn switch_step(answer: SwitchAnswer, after_ms: u64, confirm_ms: u64) -> SwitchStep {
    match answer {
        SwitchAnswer::Off => SwitchStep::AskStatus,
        SwitchAnswer::Status { is_on: false } => SwitchStep::Proven,
        SwitchAnswer::Status { is_on: true } if after_ms < confirm_ms => SwitchStep::AskAgain,
        SwitchAnswer::Status { is_on: true } => SwitchStep::StillOn,
    }
}

/// The hosts that are to be switched off now, with the boot that a VM waits for.
pub fn to_switch_off(state: &State, observed: &Observed, now: u64) -> BTreeSet<(NodeId, BootId)> {
    let can = |(id, _): &(NodeId, BootId)| {
        observed.switches.get(id).is_some_and(|switch| switch.is_due(now))
    };
    awaited(state).into_iter().filter(can).collect()
}

/// Whether a VM waits for this boot of a silent host to end.
pub fn is_awaited(state: &State, node: NodeId, boot_id: BootId) -> bool {
    awaited(state).contains(&(node, boot_id))
}

fn awaited(state: &State) -> BTreeSet<(NodeId, BootId)> {
    let waits = |task: &crate::Task| {
        let vm = state.vms.get(&task.vm).filter(|vm| vm.arbiter() == Arbiter::Lease)?;
        match &vm.place {
            Place::Revoked(old) if task.proof.is_none() => Some((old.node, old.boot_id)),
            _ => None,
        }
    };
    let is_silent = |(id, boot): &(NodeId, BootId)| {
        state.nodes.get(id).is_some_and(|node| {
            node.boot_id == Some(*boot) && matches!(node.liveness, Liveness::Unknown { .. })
        })
    };
    state.active_tasks().filter_map(waits).filter(is_silent).collect()
}
