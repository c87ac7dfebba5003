//! What if: the real planner, the real sagas and the real timing on a copy of the state.
//!
//! The copy lives on in virtual time. Every node that is up reports what it should run, orders are
//! carried out as they should be and take as long as [`Pace`] says, and nothing else happens than
//! the scenario. So a forecast says what the cluster will decide, and when at best; it cannot know
//! of a second fault, or of a storage that keeps the locks of a dead node for longer.

mod pace;
mod run;

use std::collections::BTreeSet;

use bellwether_types::{NodeId, VmId, VmRules, VmSpec};

pub use pace::Pace;

use crate::config::Timing;
use crate::planner::{self, Free};
use crate::state::{Desired, Place, State};
use crate::task::TaskKind;

/// What is supposed to happen.
#[derive(Clone, PartialEq, Debug)]
pub enum Scenario {
    /// These nodes lose power at once.
    NodesDown(BTreeSet<NodeId>),
    /// These nodes are to be emptied.
    Drain(BTreeSet<NodeId>),
    /// A VM is created and started.
    AddVm(Box<(VmSpec, VmRules)>),
}

/// What the cluster would make of it. Times are milliseconds from now.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Forecast {
    /// VMs that run somewhere new, or anew, in the order in which they do.
    pub moves: Vec<Move>,
    /// VMs that should run and do not.
    pub stuck: Vec<Stuck>,
    pub nodes: Vec<NodeAfter>,
    /// The events of the copy, in order.
    pub events: Vec<(u64, String)>,
    /// When nothing was left to do.
    pub ends_ms: u64,
    /// False when it would have gone on for longer than was looked at.
    pub finished: bool,
    /// The cluster would not even begin.
    pub refused: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    pub vm: String,
    pub kind: TaskKind,
    pub from: Option<NodeId>,
    pub to: NodeId,
    /// When its guest runs there; a boot after a failover comes on top.
    pub at_ms: u64,
    /// How long its guest stands still.
    pub outage_ms: u64,
    pub why: String,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stuck {
    pub vm: String,
    pub reason: String,
    /// It does not run today either.
    pub before: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeAfter {
    pub node: NodeId,
    pub name: String,
    pub phase: &'static str,
    pub before: Free,
    pub after: Free,
}

/// What would follow from a scenario. `now` is the leader's clock.
pub fn forecast(
    state: &State,
    timing: &Timing,
    pace: &Pace,
    scenario: Scenario,
    now: u64,
) -> Forecast {
    let mut run = run::Run::new(state, timing, pace, now);
    if let Err(refused) = run.begin(scenario) {
        return Forecast { refused: Some(refused), finished: true, ..Forecast::default() };
    }
    let finished = run.play_out();
    let after = &run.state;
    let new = after.events.iter().filter(|event| event.seq >= state.next_event);
    Forecast {
        stuck: stuck(state, after),
        nodes: after.nodes.keys().filter_map(|id| node_after(state, after, *id)).collect(),
        events: new.map(|event| (event.at.saturating_sub(now), event.text.clone())).collect(),
        ends_ms: run.last_change - now,
        moves: run.moves,
        finished,
        refused: None,
    }
}

fn node_after(before: &State, after: &State, id: NodeId) -> Option<NodeAfter> {
    let node = after.nodes.get(&id)?;
    Some(NodeAfter {
        node: id,
        name: node.name.clone(),
        phase: node.phase(after.load_of(id)).as_str(),
        before: planner::free(before, before.nodes.get(&id)?),
        after: planner::free(after, node),
    })
}

fn stuck(before: &State, after: &State) -> Vec<Stuck> {
    let runs = |state: &State, id: VmId| {
        state.vms.get(&id).is_some_and(|vm| matches!(vm.place, Place::Runner(_)))
    };
    let wanted = after.vms.values().filter(|vm| {
        vm.desired == Desired::Running && !runs(after, vm.id)
            || vm.task.is_some() && !after.is_up(vm.id)
    });
    let mut stuck: Vec<Stuck> = wanted
        .map(|vm| Stuck {
            vm: vm.spec.name.clone(),
            reason: vm.pending.clone().or(vm.halted.clone()).unwrap_or_else(|| {
                let step = vm.task.and_then(|id| after.tasks.get(&id)).map(|task| task.step.name());
                format!("its task stands at `{}`", step.unwrap_or("the beginning"))
            }),
            before: before.vms.contains_key(&vm.id) && !runs(before, vm.id),
        })
        .collect();
    stuck.sort_by(|a, b| (a.before, &a.vm).cmp(&(b.before, &b.vm)));
    stuck
}
