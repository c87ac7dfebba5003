//! What the leader starts by itself: it compares what the cluster wants with what agents report,
//! and says which commands follow. Pure; the shell calls it on every change and on a timer.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_types::{BootId, Epoch, NodeId, VmId};

use crate::apply::is_due;
use crate::command::Change;
use crate::config::Timing;
use crate::observe::{Observed, Seen};
use crate::planner::{self, Wish};
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
    let mut idle: Vec<&Vm> = state.vms.values().filter(|vm| vm.task.is_none()).collect();
    idle.sort_by_key(|vm| (std::cmp::Reverse(vm.spec.priority), vm.id));
    for vm in &idle {
        if let Some(kind) = needed(state, observed, vm, leading_since, now) {
            changes.push(begin(vm, kind));
        }
    }
    changes.extend(drains(state, timing, &idle, now));
    changes
}

fn begin(vm: &Vm, kind: TaskKind) -> Change {
    Change::BeginTask(TaskRequest { vm: vm.id, kind, node: None, by: BY_CLUSTER.into() })
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
) -> Option<TaskKind> {
    match &vm.place {
        Place::Runner(runner) => match is_lost(state, runner) {
            true => Some(TaskKind::Failover),
            // A stop was under way when the node was lost for a while.
            false if vm.desired == Desired::Stopped => Some(TaskKind::Stop),
            false => ended(observed, vm, runner, leading_since).then_some(TaskKind::Settle),
        },
        Place::Revoked(_) => Some(TaskKind::Failover),
        Place::Stopped if vm.desired == Desired::Running && is_due(vm.retry_at, now) => {
            Some(TaskKind::Start)
        }
        Place::Sealed { .. } if vm.desired == Desired::Running && is_due(vm.retry_at, now) => {
            Some(TaskKind::Restore)
        }
        Place::Stopped | Place::Sealed { .. } => None,
    }
}

/// The runner's node is not heard from, is fenced, or has rebooted since.
fn is_lost(state: &State, runner: &Runner) -> bool {
    state
        .nodes
        .get(&runner.node)
        .is_none_or(|node| !node.is_online() || node.boot_id != Some(runner.boot_id))
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

/// VMs leave nodes that an administrator wants empty, a few at a time.
fn drains(state: &State, timing: &Timing, idle: &[&Vm], now: u64) -> Vec<Change> {
    let mut moving: BTreeMap<NodeId, usize> = BTreeMap::new();
    for task in state.active_tasks() {
        if let Some(source) = task.source.filter(|_| task.kind == TaskKind::Migrate) {
            *moving.entry(source).or_default() += 1;
        }
    }
    let mut changes = Vec::new();
    for vm in idle {
        let Some(runner) = vm.place.runner().filter(|runner| !is_lost(state, runner)) else {
            continue;
        };
        let cordoned = state.nodes.get(&runner.node).is_some_and(|node| node.cordoned);
        let under_way = moving.entry(runner.node).or_default();
        let ready = cordoned && !vm.paused && is_due(vm.retry_at, now);
        if ready && *under_way < timing.drain_parallel && has_room(state, vm, runner.node) {
            *under_way += 1;
            changes.push(begin(vm, TaskKind::Migrate));
        }
    }
    changes
}

/// Whether the planner would find a place; without one, beginning a task would only fail it.
fn has_room(state: &State, vm: &Vm, leaving: NodeId) -> bool {
    let tried = BTreeSet::new();
    let wish = Wish { vm, wanted: None, tried: &tried, leaving: Some(leaving), task: None };
    planner::choose(state, &wish).is_ok()
}

/// The VMs that a node may run now, for the answer to its lease request.
pub fn grants(state: &State, node: NodeId, boot_id: BootId) -> Vec<(VmId, Epoch)> {
    let runs = |vm: &Vm| match vm.place.runner() {
        Some(runner) if runner.node == node && runner.boot_id == boot_id => {
            Some((vm.id, runner.epoch))
        }
        _ => None,
    };
    state.vms.values().filter_map(runs).collect()
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
    let mut strays = Vec::new();
    for (node, report) in &observed.nodes {
        for seen in &report.vms {
            if !is_expected(state, *node, seen.vm, seen.epoch) {
                strays.push(Stray { node: *node, vm: seen.vm, epoch: seen.epoch });
            }
        }
    }
    strays
}

fn is_expected(state: &State, node: NodeId, vm: VmId, epoch: Epoch) -> bool {
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
