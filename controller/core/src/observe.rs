//! What agents last reported. It lives in the leader's memory alone: a new leader knows nothing
//! until it has been told, and says so (`NoReport`), instead of taking silence for absence.

use std::collections::BTreeMap;

use bellwether_types::{BootId, Epoch, NodeId, VmId, VmState};

use crate::fence::Vigil;

/// One VMM incarnation as its agent sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmReport {
    pub vm: VmId,
    pub epoch: Epoch,
    pub state: VmState,
    pub reason: String,
    pub memory_loaded_bytes: u64,
    pub memory_total_bytes: u64,
}

/// The last report of one node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeReport {
    pub boot_id: BootId,
    /// The leader's clock when the report came in, milliseconds.
    pub heard_at: u64,
    /// Grows with every report of one boot, so that one that was held up is not taken for news.
    pub nonce: u64,
    pub vms: Vec<VmReport>,
}

/// The last reports of all nodes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Observed {
    pub nodes: BTreeMap<NodeId, NodeReport>,
    /// The times on which proofs by waiting rest; none in a memory that never led.
    pub vigil: Option<Vigil>,
}

impl Observed {
    /// Takes note of a report, unless a newer one of the same boot is known.
    pub fn take(&mut self, node: NodeId, report: NodeReport) {
        let newer = |known: &NodeReport| {
            known.boot_id == report.boot_id && report.nonce != 0 && known.nonce > report.nonce
        };
        if !self.nodes.get(&node).is_some_and(newer) {
            self.nodes.insert(node, report);
        }
    }
}

/// What is known of one incarnation of a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// It runs the guest, or holds it paused.
    Alive,
    /// It is there, and its guest has not begun, or stands sealed.
    Waiting,
    /// It has ended.
    Ended,
    /// The node has reported and did not name it.
    Absent,
    /// Its agent cannot say. That is no reason to do anything.
    Unsure,
    /// This leader has had no report of that node in that boot.
    NoReport,
}

impl Observed {
    /// The incarnation of a VM on a node, as last reported.
    pub fn report(&self, node: NodeId, vm: VmId, epoch: Epoch) -> Option<&VmReport> {
        self.nodes.get(&node)?.vms.iter().find(|report| report.vm == vm && report.epoch == epoch)
    }

    /// An agent has answered that it paused or resumed a guest; its next report would say so.
    pub fn note_paused(&mut self, node: NodeId, vm: VmId, epoch: Epoch, paused: bool) {
        let vms = self.nodes.get_mut(&node).map(|report| &mut report.vms);
        let known = vms.into_iter().flatten().find(|seen| seen.vm == vm && seen.epoch == epoch);
        if let Some(seen) = known.filter(|seen| life(seen.state) == Seen::Alive) {
            seen.state = if paused { VmState::Paused } else { VmState::Running };
        }
    }

    /// Whether a runner's guest is alive. Epochs are unique per VM and are given to one node only.
    pub fn vm(&self, vm: VmId, node: NodeId, boot: BootId, epoch: Epoch) -> Seen {
        match self.nodes.get(&node) {
            Some(report) if report.boot_id == boot => match self.report(node, vm, epoch) {
                Some(seen) => life(seen.state),
                None => Seen::Absent,
            },
            _ => Seen::NoReport,
        }
    }
}

fn life(state: VmState) -> Seen {
    match state {
        VmState::Running | VmState::Paused | VmState::Saving => Seen::Alive,
        VmState::Starting | VmState::Restoring | VmState::Saved | VmState::Stopping => {
            Seen::Waiting
        }
        VmState::Unknown => Seen::Unsure,
        VmState::Stopped | VmState::Failed => Seen::Ended,
    }
}
