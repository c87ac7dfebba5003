//! Nodes for all tasks that wait for one, in one round: each choice takes its room from the next
//! ones, and the most urgent VM comes first. Choosing for each task alone, from the same state,
//! would send all of them to the same node.

use crate::apply::is_due;
use crate::command::Change;
use crate::observe::Observed;
use crate::planner::{Planner, Wish, urgency};
use crate::saga::{is_known, needs_node};
use crate::state::{State, Vm};
use crate::task::{StepEvent, Task};

pub(super) fn placements(state: &State, observed: &Observed, now: u64) -> Vec<Change> {
    let vm_of = |task| with_vm(state, task);
    let due = state.active_tasks().filter(|task| is_due(task.retry_at, now));
    let mut waiting: Vec<(&Task, &Vm)> =
        due.filter_map(vm_of).filter(|(task, vm)| needs_node(state, observed, task, vm)).collect();
    if waiting.is_empty() {
        return Vec::new();
    }
    waiting.sort_by_key(|(_, vm)| urgency(vm));
    let mut planner = Planner::new(state);
    waiting.into_iter().filter_map(|(task, vm)| place(&mut planner, task, vm)).collect()
}

fn place<'a>(planner: &mut Planner<'a>, task: &'a Task, vm: &'a Vm) -> Option<Change> {
    let event = match planner.choose(&Wish::of(task, vm)) {
        Ok(choice) => {
            planner.take(choice.node, vm);
            StepEvent::Placed { node: choice.node, why: choice.to_string() }
        }
        Err(none) => {
            let reason = none.to_string();
            if is_known(task, vm, &reason) {
                return None;
            }
            StepEvent::NoNode { reason }
        }
    };
    Some(Change::Advance { task: task.id, step_no: task.step_no, event })
}

fn with_vm<'a>(state: &'a State, task: &'a Task) -> Option<(&'a Task, &'a Vm)> {
    Some((task, state.vms.get(&task.vm)?))
}
