//! Moves that the cluster begins: away from nodes that are drained, and back to nodes that a VM
//! prefers. Nothing else is moved. One planner serves all moves of a round, so that they do not
//! count on the same room.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_types::NodeId;

use super::{Need, begin, is_lost};
use crate::apply::is_due;
use crate::command::Change;
use crate::config::Timing;
use crate::planner::{Planner, Wish};
use crate::state::{Node, State, Vm};
use crate::task::TaskKind;

/// The moves that are to begin now, a few at a time for each node that VMs leave or go back to.
pub(super) fn moves(state: &State, timing: &Timing, now: u64) -> Vec<Change> {
    let draining = state.nodes.values().filter(|node| node.cordoned && node.is_online());
    let mut leaving: Vec<&Vm> = draining.flat_map(|node| state.vms_of(node.id)).collect();
    let mut returning: Vec<&Vm> = state
        .index
        .away()
        .filter_map(|id| state.vms.get(&id))
        .filter(|vm| is_away(vm, now))
        .collect();
    let paused: Vec<&Vm> = leaving.iter().copied().filter(|vm| vm.paused).collect();
    leaving.retain(|vm| may_move(state, vm, now));
    returning.retain(|vm| may_move(state, vm, now));
    let stays = paused.into_iter().filter_map(|vm| {
        let resume = format!("it is paused; resume it with `bell vm resume {}`", vm.spec.name);
        stays(vm, resume)
    });
    let stays: Vec<Change> = stays.collect();
    if leaving.is_empty() && returning.is_empty() {
        return stays;
    }
    leaving.sort_by_key(|vm| (std::cmp::Reverse(vm.spec.priority), vm.id));
    let mut round = Round::new(state, timing);
    let drains = leaving.into_iter().filter_map(|vm| round.drain(vm)).collect::<Vec<_>>();
    let failbacks = returning.into_iter().filter_map(|vm| round.failback(vm));
    stays.into_iter().chain(drains).chain(failbacks).collect()
}

/// Says why a VM does not leave, if that was not said.
fn stays(vm: &Vm, why: String) -> Option<Change> {
    let node = vm.place.runner()?.node;
    let is_news = vm.task.is_none() && vm.pending.is_none();
    is_news.then_some(Change::Stays { vm: vm.id, node, why })
}

fn may_move(state: &State, vm: &Vm, now: u64) -> bool {
    let runs = vm.place.runner().is_some_and(|runner| !is_lost(state, runner));
    runs && vm.task.is_none() && !vm.paused && is_due(vm.retry_at, now)
}

/// Whether a VM may go back now to a node that it likes better.
fn is_away(vm: &Vm, now: u64) -> bool {
    vm.is_away() && vm.rules.failback.allows(now)
}

struct Round<'a> {
    state: &'a State,
    planner: Planner<'a>,
    /// Moves under way from each node, and failbacks to each.
    moving: BTreeMap<NodeId, usize>,
    parallel: usize,
}

impl<'a> Round<'a> {
    fn new(state: &'a State, timing: &Timing) -> Self {
        let mut moving = BTreeMap::new();
        for task in state.active_tasks().filter(|task| task.kind == TaskKind::Migrate) {
            for node in task.source.into_iter().chain(task.wanted) {
                *moving.entry(node).or_default() += 1;
            }
        }
        Self { state, planner: Planner::new(state), moving, parallel: timing.drain_parallel }
    }

    /// Without a place for it, beginning a task would only fail it; then it says so.
    fn drain(&mut self, vm: &'a Vm) -> Option<Change> {
        let source = vm.place.runner()?.node;
        if self.is_busy(source) {
            return None;
        }
        let tried = BTreeSet::new();
        let leaving = Some(source);
        let wish = Wish { vm, wanted: None, tried: &tried, leaving, task: None };
        let node = match self.planner.choose(&wish) {
            Ok(choice) => choice.node,
            Err(none) => return stays(vm, none.why()),
        };
        self.planner.take(node, vm);
        *self.moving.entry(source).or_default() += 1;
        let name = self.state.node_name(source);
        Some(begin(vm, Need::new(TaskKind::Migrate, format!("{name} is drained")), None))
    }

    /// Back to the best of its preferred owners that can take it.
    fn failback(&mut self, vm: &'a Vm) -> Option<Change> {
        let here = vm.place.runner()?.node;
        let better = &vm.rules.preferred_owners[..vm.rules.preference(here)];
        let usable = |node: &&NodeId| self.state.nodes.get(node).is_some_and(Node::is_online);
        let node = *better.iter().filter(usable).find(|node| self.takes_back(vm, here, **node))?;
        self.planner.take(node, vm);
        *self.moving.entry(node).or_default() += 1;
        let name = self.state.node_name(node);
        let because = format!("it prefers {name}, which can take it again");
        Some(begin(vm, Need::new(TaskKind::Migrate, because), Some(node)))
    }

    /// Going back must not bring it together with VMs from which it had better stay apart.
    fn takes_back(&self, vm: &Vm, here: NodeId, node: NodeId) -> bool {
        let tried = BTreeSet::new();
        let wish = Wish { vm, wanted: Some(node), tried: &tried, leaving: Some(here), task: None };
        let neighbours = self.planner.neighbours_on(vm, here);
        let choice = self.planner.choose(&wish);
        !self.is_busy(node) && choice.is_ok_and(|choice| choice.neighbours <= neighbours)
    }

    fn is_busy(&self, node: NodeId) -> bool {
        self.moving.get(&node).is_some_and(|moving| *moving >= self.parallel)
    }
}
