//! What agents last reported. It lives in the leader's memory alone: a new leader knows nothing
//! until it has been told, and says so (`NoReport`), instead of taking silence for absence.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_types::{BootId, Epoch, NodeId, VmId, VmState};

use crate::fence::Vigil;
use crate::power::PowerSwitch;
use crate::reconcile::is_expected;
use crate::state::State;

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
    /// The power switches that this leader can use.
    pub switches: BTreeMap<NodeId, PowerSwitch>,
    /// By node, what of its last report does not fit the state of that moment.
    doubts: BTreeMap<NodeId, Doubts>,
}

/// What a report and the state disagree about. Planning looks at these and at nothing else that
/// was reported, so that a round costs nothing where all is well; the next report, which follows
/// soon, shows what the state has changed since. A doubt is no verdict: whoever acts looks again.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Doubts {
    /// VMs that the node is to run, and is not reported to.
    missing: BTreeSet<VmId>,
    /// Incarnations that the state has no place for.
    surplus: BTreeSet<(VmId, Epoch)>,
}

impl Observed {
    /// Takes note of a report, unless a newer one of the same boot is known. Answers whether it
    /// says anything that the last one did not.
    pub fn take(&mut self, node: NodeId, report: NodeReport, state: &State) -> bool {
        let newer = |known: &NodeReport| {
            known.boot_id == report.boot_id && report.nonce != 0 && known.nonce > report.nonce
        };
        let known = self.nodes.get(&node);
        if known.is_some_and(newer) {
            return false;
        }
        let same = |known: &NodeReport| known.boot_id == report.boot_id && known.vms == report.vms;
        let is_news = !known.is_some_and(same);
        let doubts = Doubts::of(node, &report, state);
        let doubted = self.doubts.get(&node).is_some_and(|known| *known != doubts);
        match doubts == Doubts::default() {
            true => drop(self.doubts.remove(&node)),
            false => drop(self.doubts.insert(node, doubts)),
        }
        self.nodes.insert(node, report);
        is_news || doubted
    }

    /// Forgets everything: a new leader knows nothing until it has been told.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// VMs that may have ended, as of the last reports.
    pub(crate) fn missing(&self) -> impl Iterator<Item = VmId> {
        self.doubts.values().flat_map(|doubts| doubts.missing.iter().copied())
    }

    /// Incarnations that may be nobody's, as of the last reports.
    pub(crate) fn surplus(&self) -> impl Iterator<Item = (NodeId, VmId, Epoch)> {
        let of_node = |(node, doubts): (&NodeId, &Doubts)| {
            let node = *node;
            doubts.surplus.iter().map(move |(vm, epoch)| (node, *vm, *epoch)).collect::<Vec<_>>()
        };
        self.doubts.iter().flat_map(of_node)
    }
}

impl Doubts {
    fn of(node: NodeId, report: &NodeReport, state: &State) -> Self {
        let lives: BTreeSet<(VmId, Epoch)> = report
            .vms
            .iter()
            .filter(|seen| matches!(life(seen.state), Seen::Alive | Seen::Unsure))
            .map(|seen| (seen.vm, seen.epoch))
            .collect();
        let runs = state.vms_of(node).filter_map(|vm| Some((vm.id, vm.place.runner()?)));
        let missing = runs
            .filter(|(_, runner)| runner.boot_id == report.boot_id)
            .filter(|(vm, runner)| !lives.contains(&(*vm, runner.epoch)));
        let surplus = report.vms.iter().map(|seen| (seen.vm, seen.epoch));
        Self {
            missing: missing.map(|(vm, _)| vm).collect(),
            surplus: surplus.filter(|(vm, epoch)| !is_expected(state, node, *vm, *epoch)).collect(),
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
