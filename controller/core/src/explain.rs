//! Why a VM is where it is and not elsewhere, and what led to a task and to its decisions.

use std::collections::BTreeSet;

use bellwether_types::{NodeId, VmId};

use crate::planner::{self, Free, Reason, Wish};
use crate::state::{Event, State, Vm};
use crate::task::Task;

/// So long before a task began an event can have led to it, milliseconds.
const BEFORE_MS: u64 = 60_000;

/// What speaks for or against each node for a VM now. Its own node is judged as if it were about to
/// come there.
pub fn nodes_for(state: &State, vm: &Vm) -> Vec<(NodeId, Result<Free, Reason>)> {
    let tried = BTreeSet::new();
    let leaving = vm.place.runner().map(|runner| runner.node);
    let wish = Wish { vm, wanted: None, tried: &tried, leaving, task: vm.task };
    planner::judge(state, &wish)
}

/// Where the planner would put a VM if it had to leave its node now, or start; and why.
pub fn next_place(state: &State, id: VmId) -> Option<String> {
    let vm = state.vms.get(&id)?;
    let tried = BTreeSet::new();
    let leaving = vm.place.runner().map(|runner| runner.node);
    let wish = Wish { vm, wanted: None, tried: &tried, leaving, task: vm.task };
    Some(match planner::choose(state, &wish) {
        Ok(choice) => format!("it would go to {choice}"),
        Err(none) => none.to_string(),
    })
}

/// The events that led to a task or belong to it: its own, and those of its VM, of its nodes and of
/// the cluster, from a minute before it began to its end.
pub fn events_of<'a>(state: &'a State, task: &'a Task) -> impl Iterator<Item = &'a Event> {
    let ends = [task.source, task.destination];
    let nodes: Vec<String> = ends.into_iter().flatten().map(|id| state.node_name(id)).collect();
    let first = task.created_at.saturating_sub(BEFORE_MS);
    let last = if task.outcome.is_some() { task.ended_at } else { u64::MAX };
    state.events.iter().filter(move |event| {
        let of_vm = event.vm.as_ref() == Some(&task.vm_name);
        let of_node = event.node.as_ref().is_some_and(|node| nodes.contains(node));
        let of_cluster = event.vm.is_none() && event.node.is_none() && event.task.is_none();
        let near = (first..=last).contains(&event.at) && (of_vm || of_node || of_cluster);
        event.task == Some(task.id) || near && event.task.is_none()
    })
}
