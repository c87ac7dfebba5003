//! What the leader starts by itself: it compares what the cluster wants with what agents report,
//! and says which commands follow. Pure; the shell calls it on every change and on a timer.

mod moves;
mod placing;

use std::collections::BTreeSet;

use bellwether_types::{BootId, Epoch, NodeId, VmId};

use crate::apply::is_due;
use crate::command::Change;
use crate::config::Timing;
use crate::observe::{Observed, Seen};
use crate::state::{Desired, Liveness, Node, Place, Runner, State, Vm};
use crate::task::{Step, TaskKind, TaskRequest};

/// The name under which the cluster itself asks for tasks.
pub const BY_CLUSTER: &str = "cluster";

/// How long a report may take to catch up with a commit, milliseconds: a VM is taken for gone only
/// if a report that came in this long after its last change does not show it alive.
const REPORT_LAG_MS: u64 = 2_000;

/// The commands that follow from what is wanted and what is seen. `leading_since` is when this
/// leader began: it cannot have heard from anybody before.
pub fn plan(
    state: &State,
    observed: &Observed,
    timing: &Timing,
    leading_since: u64,
    now: u64,
) -> Vec<Change> {
    let mut changes: Vec<Change> = state
        .nodes
        .values()
        .filter_map(|n| silence(observed, timing, leading_since, now, n))
        .collect();
    changes.extend(state.nodes.values().filter_map(|node| served(state, node, now)));
    let idle = candidates(state, observed).into_iter().filter_map(|id| state.vms.get(&id));
    let need = |vm| needed(state, observed, vm, leading_since, now).map(|need| (vm, need));
    let mut needs: Vec<(&Vm, Need)> =
        idle.filter(|vm| vm.task.is_none()).filter_map(need).collect();
    needs.sort_by_key(|(vm, _)| (std::cmp::Reverse(vm.spec.priority), vm.id));
    changes.extend(needs.into_iter().map(|(vm, need)| begin(vm, need, None)));
    changes.extend(moves::moves(state, timing, now));
    changes.extend(placing::placements(state, observed, now));
    changes
}

/// The VMs that may need a task: all that are not where they are to be, that lost their runner, or
/// that a report misses. Every other one is left alone, however many there are.
fn candidates(state: &State, observed: &Observed) -> BTreeSet<VmId> {
    let lost = state.index.runners().filter(|(node, boot)| is_lost_boot(state, *node, *boot));
    let lost = lost.flat_map(|(node, _)| state.vms_of(node).map(|vm| vm.id));
    lost.chain(state.index.unsettled()).chain(observed.missing()).collect()
}

/// A task that a VM needs, and what asks for it.
struct Need {
    kind: TaskKind,
    because: String,
}

impl Need {
    fn new(kind: TaskKind, because: impl Into<String>) -> Self {
        Self { kind, because: because.into() }
    }
}

fn begin(vm: &Vm, need: Need, node: Option<NodeId>) -> Change {
    let request = TaskRequest { vm: vm.id, kind: need.kind, node, by: BY_CLUSTER.into() };
    Change::Begin { request, because: need.because }
}

/// The end of a quarantine whose time has passed.
fn served(state: &State, node: &Node, now: u64) -> Option<Change> {
    let until = node.quarantined_until?;
    // Another leader's clock may have written it: longer than the longest is over, too.
    let over = until <= now || until - now > state.settings.quarantine_s * 1_000;
    over.then(|| Change::LiftQuarantine { node: node.id, by: BY_CLUSTER.into() })
}

/// Whether a node is still as silent as when a plan wanted to call it unknown.
pub fn is_silent(
    state: &State,
    observed: &Observed,
    timing: &Timing,
    leading_since: u64,
    now: u64,
    node: NodeId,
) -> bool {
    let node = state.nodes.get(&node);
    node.is_some_and(|node| silence(observed, timing, leading_since, now, node).is_some())
}

/// A node that was silent for too long becomes unknown: never dead.
fn silence(
    observed: &Observed,
    timing: &Timing,
    leading_since: u64,
    now: u64,
    node: &Node,
) -> Option<Change> {
    let boot_id = node.boot_id.filter(|_| node.liveness == Liveness::Online)?;
    let reported = observed.nodes.get(&node.id).map_or(0, |report| report.heard_at);
    let heard = reported.max(leading_since);
    let silent = now.saturating_sub(heard) > timing.suspect_after_ms;
    silent.then_some(Change::NodeUnknown { node: node.id, boot_id })
}

/// The task that a VM without one needs, if any.
fn needed(
    state: &State,
    observed: &Observed,
    vm: &Vm,
    leading_since: u64,
    now: u64,
) -> Option<Need> {
    match &vm.place {
        Place::Runner(runner) => match is_lost(state, runner) {
            true => Some(Need::new(TaskKind::Failover, loss(state, runner))),
            // A stop was under way when the node was lost for a while.
            false if vm.desired == Desired::Stopped => {
                Some(Need::new(TaskKind::Stop, "it is wanted stopped, and runs"))
            }
            false => ended(observed, vm, runner, leading_since).then(|| {
                let node = state.node_name(runner.node);
                Need::new(TaskKind::Settle, format!("{node} reports that its VMM has ended"))
            }),
        },
        Place::Revoked(runner) => Some(Need::new(TaskKind::Failover, loss(state, runner))),
        Place::Stopped if vm.desired == Desired::Running && is_due(vm.retry_at, now) => {
            Some(Need::new(TaskKind::Start, "it is wanted running, and runs nowhere"))
        }
        Place::Sealed { .. } if vm.desired == Desired::Running && is_due(vm.retry_at, now) => {
            Some(Need::new(TaskKind::Restore, "it is wanted running, and its memory is in a file"))
        }
        Place::Stopped | Place::Sealed { .. } => None,
    }
}

/// How a runner was lost, in words.
fn loss(state: &State, runner: &Runner) -> String {
    let name = state.node_name(runner.node);
    match state.nodes.get(&runner.node).map(|node| &node.liveness) {
        Some(Liveness::Online) => {
            let node = state.nodes.get(&runner.node);
            match node.is_some_and(|node| node.boot_id == Some(runner.boot_id)) {
                true => format!("nobody may run it since {name} lost it"),
                false => format!("{name} has rebooted under it"),
            }
        }
        Some(Liveness::Fenced { proof }) => format!("{name} is fenced ({proof})"),
        _ => format!("{name} is not heard from"),
    }
}

/// The runner's node is not heard from, is fenced, or has rebooted since.
fn is_lost(state: &State, runner: &Runner) -> bool {
    is_lost_boot(state, runner.node, runner.boot_id)
}

fn is_lost_boot(state: &State, node: NodeId, boot_id: BootId) -> bool {
    let node = state.nodes.get(&node);
    node.is_none_or(|node| !node.is_online() || node.boot_id != Some(boot_id))
}

/// The agent is there and says that the runner is not.
fn ended(observed: &Observed, vm: &Vm, runner: &Runner, leading_since: u64) -> bool {
    // The last change may carry another leader's clock; this leader's own beginning never does.
    let settled_at = vm.changed_at.max(leading_since) + REPORT_LAG_MS;
    match observed.vm(vm.id, runner.node, runner.boot_id, runner.epoch) {
        Seen::Ended => true,
        // A report can be older than the commit that made this runner.
        Seen::Absent | Seen::Waiting => {
            observed.nodes.get(&runner.node).is_some_and(|report| report.heard_at > settled_at)
        }
        Seen::Alive | Seen::Unsure | Seen::NoReport => false,
    }
}

/// The VMs that a node may run now, for the answer to its lease request.
pub fn grants(state: &State, node: NodeId, boot_id: BootId) -> Vec<(VmId, Epoch)> {
    let runs = |vm: &Vm| match vm.place.runner() {
        Some(runner) if runner.boot_id == boot_id => Some((vm.id, runner.epoch)),
        _ => None,
    };
    state.vms_of(node).filter_map(runs).collect()
}

/// An incarnation that nobody counts on: left over from an abandoned attempt or a lost node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Stray {
    pub node: NodeId,
    pub vm: VmId,
    pub epoch: Epoch,
}

/// Incarnations that agents report and that the state has no place for. Releasing one is always
/// safe: nothing allows it to run. The state must be at least as new as the reports: a leader asks
/// only after it has applied everything that was committed before its term.
pub fn strays(state: &State, observed: &Observed) -> Vec<Stray> {
    let surplus = observed.surplus().map(|(node, vm, epoch)| Stray { node, vm, epoch });
    let still = |stray: &Stray| {
        observed.report(stray.node, stray.vm, stray.epoch).is_some()
            && !is_expected(state, stray.node, stray.vm, stray.epoch)
    };
    surplus.filter(still).collect()
}

/// The strays of one VM on one node, by the node's last report and the state as it is now.
pub fn strays_of(state: &State, observed: &Observed, node: NodeId, vm: VmId) -> Vec<Stray> {
    let report = observed.nodes.get(&node);
    let seen = report.into_iter().flat_map(|report| &report.vms).filter(|seen| seen.vm == vm);
    let stray = seen.map(|seen| Stray { node, vm, epoch: seen.epoch });
    stray.filter(|stray| !is_expected(state, node, vm, stray.epoch)).collect()
}

/// Whether the state has a place for an incarnation.
pub(crate) fn is_expected(state: &State, node: NodeId, vm: VmId, epoch: Epoch) -> bool {
    let Some(vm) = state.vms.get(&vm) else {
        return false;
    };
    let here = |runner: &Runner| runner.node == node && runner.epoch == epoch;
    let placed = match &vm.place {
        Place::Stopped => false,
        Place::Runner(runner) | Place::Revoked(runner) => here(runner),
        Place::Sealed { sealer, .. } => vm.task.is_some() && sealer.as_ref().is_some_and(here),
    };
    let task = vm.task.and_then(|id| state.tasks.get(&id));
    let attempted = task
        .and_then(|task| task.step.attempt())
        .is_some_and(|attempt| attempt.node == node && attempt.epoch == epoch);
    // A source that lets go under a running task is that task's business.
    let letting_go = task.is_some_and(|task| match &task.step {
        Step::Activate { from: Some(from), .. } => here(from),
        Step::Release(runner) => here(runner),
        Step::ClaimBack { source, sealed, .. } => source.node == node && *sealed == epoch,
        _ => false,
    });
    placed || attempted || letting_go
}
