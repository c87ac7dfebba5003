//! What was true when: where each VM ran, and how the nodes were, looked at ten times a second.

use std::collections::BTreeMap;

use bellwether_core::state::Desired;
use bellwether_core::{Place, State, Vm};
use bellwether_types::VmId;

use crate::kernel::MS;
use crate::world::World;

/// How one VM was at a moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VmSeen {
    /// The node on which a VMM has the guest, running or held by the administrator.
    pub on: Option<u64>,
    /// Its guest runs: its host does not stand, and nobody has paused it.
    pub up: bool,
    pub stopped: bool,
    pub saved: bool,
    pub paused: bool,
    /// The cluster says why it does not run yet.
    pub pending: bool,
    /// The cluster has given it up.
    pub halted: bool,
}

/// How a node was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeSeen {
    pub phase: &'static str,
    pub quarantined: bool,
}

/// Everything from here on, up to the next moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Moment {
    pub at_ms: u64,
    pub vms: BTreeMap<String, VmSeen>,
    pub nodes: BTreeMap<u64, NodeSeen>,
}

/// A guest began to execute somewhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Begun {
    pub at_ms: u64,
    pub vm: String,
    pub node: u64,
    /// With its memory, and not from its disks.
    pub resumed: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Timeline {
    /// Only moments at which something had changed.
    pub moments: Vec<Moment>,
    pub begun: Vec<Begun>,
}

impl Timeline {
    /// Takes a look at the world.
    pub fn look(&mut self, world: &World) {
        let at_ms = world.since_opening(world.kernel.now());
        let moment = world.committed(|state| moment(world, state, at_ms));
        let same = |last: &Moment| last.vms == moment.vms && last.nodes == moment.nodes;
        if !self.moments.last().is_some_and(same) {
            self.moments.push(moment);
        }
    }

    /// What was true at a time.
    pub fn at(&self, at_ms: u64) -> Option<&Moment> {
        self.moments.iter().rev().find(|moment| moment.at_ms <= at_ms)
    }

    /// Moments that a span of time saw, each with how long it lasted within.
    pub fn within(&self, from_ms: u64, to_ms: u64) -> impl Iterator<Item = (&Moment, u64)> {
        let ends = self.moments.iter().skip(1).map(|moment| moment.at_ms).chain([u64::MAX]);
        self.moments.iter().zip(ends).filter_map(move |(moment, end)| {
            let (begin, end) = (moment.at_ms.max(from_ms), end.min(to_ms));
            let seen = begin < end || (begin == end && from_ms == to_ms);
            seen.then(|| (moment, end.saturating_sub(begin)))
        })
    }
}

fn moment(world: &World, state: &State, at_ms: u64) -> Moment {
    let vms = state.vms.values().map(|vm| (vm.spec.name.clone(), seen(world, vm))).collect();
    let nodes = state.nodes.values().map(|node| {
        let phase = node.phase(state.load_of(node.id)).as_str();
        (node.id.0, NodeSeen { phase, quarantined: node.quarantined_until.is_some() })
    });
    Moment { at_ms, vms, nodes: nodes.collect() }
}

fn seen(world: &World, vm: &Vm) -> VmSeen {
    let guest = guest_of(world, vm.id);
    let idle = vm.task.is_none() && guest.is_none();
    VmSeen {
        on: guest.map(|(node, ..)| node),
        up: guest.is_some_and(|(_, up, _)| up),
        paused: guest.is_some_and(|(.., paused)| paused),
        stopped: idle && vm.place == Place::Stopped && vm.desired == Desired::Stopped,
        saved: idle && matches!(vm.place, Place::Sealed { .. }) && vm.desired == Desired::Saved,
        pending: guest.is_none() && vm.pending.is_some(),
        halted: vm.halted.is_some(),
    }
}

/// The node that has the guest of a VM, whether it runs there, and whether it is paused.
fn guest_of(world: &World, vm: VmId) -> Option<(u64, bool, bool)> {
    let oracle = world.oracle.borrow();
    let facts = oracle.vmms.iter().filter(|(process, fact)| {
        fact.vm == vm && (fact.open || fact.paused) && world.kernel.lives(**process)
    });
    let guests = facts.map(|(process, fact)| {
        let up = fact.open && !world.kernel.is_standing(*process);
        (fact.node.0, up, fact.paused)
    });
    // Of several the one that runs counts.
    guests.max_by_key(|(_, up, _)| *up)
}

impl World {
    /// Milliseconds since the scenario's times began.
    pub fn since_opening(&self, at: u64) -> u64 {
        at.saturating_sub(self.opened_at.get()) / MS
    }
}
