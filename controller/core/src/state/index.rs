//! What is asked of the state so often that a walk through all VMs would be too long.
//!
//! It follows from the rest of the state and is not written with it. A command touches one VM at
//! most: what that VM adds is taken out before the command and put in after it, so that nothing
//! else has to know of the index. `State::invariants` compares it with one made anew.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use bellwether_types::{BootId, NodeId, Strength, TaskId, VmId};

use super::{Place, State, Vm};
use crate::task::Task;

/// What the VMs of one node take from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NodeLoad {
    pub memory_mib: u64,
    pub vcpus: u32,
    pub vms: usize,
    /// VMs that it may run, or has sealed and still holds.
    pub(crate) keep_it_busy: usize,
}

impl NodeLoad {
    const EMPTY: Self = Self { memory_mib: 0, vcpus: 0, vms: 0, keep_it_busy: 0 };
}

/// How many members of an anti-affinity group are on a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Members {
    pub all: u32,
    /// Those that insist on being apart.
    pub hard: u32,
}

#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Index {
    names: BTreeMap<String, VmId>,
    disks: BTreeMap<PathBuf, BTreeSet<VmId>>,
    loads: BTreeMap<NodeId, NodeLoad>,
    runs: BTreeSet<(NodeId, VmId)>,
    groups: BTreeMap<String, BTreeMap<NodeId, Members>>,
    /// Who is started only after a VM: pairs of that VM and the one that waits.
    after: BTreeSet<(VmId, VmId)>,
    active: BTreeSet<TaskId>,
    ended: BTreeSet<TaskId>,
    /// How many VMs each boot of a node runs.
    runners: BTreeMap<(NodeId, BootId), u32>,
    /// VMs without a task that need one, or will after a pause.
    unsettled: BTreeSet<VmId>,
    /// VMs that are to go back to a node that they like better.
    away: BTreeSet<VmId>,
}

/// The nodes on which a VM takes room: where it runs or may still run, and where it is going.
pub(crate) fn nodes_of(vm: &Vm, task: Option<&Task>) -> impl Iterator<Item = NodeId> {
    let at = match &vm.place {
        Place::Runner(runner) | Place::Revoked(runner) => Some(runner.node),
        Place::Sealed { sealer: Some(sealer), .. } if task.is_some() => Some(sealer.node),
        Place::Sealed { .. } | Place::Stopped => None,
    };
    let to = task.and_then(|task| task.step.attempt()).map(|attempt| attempt.node);
    at.into_iter().chain(to.filter(|to| at != Some(*to)))
}

impl Index {
    /// The index of a state, found by walking through all of it.
    pub fn of(state: &State) -> Self {
        let mut index = Self::default();
        for vm in state.vms.values() {
            index.put_in(vm, state);
        }
        for task in state.tasks.values() {
            index.note_task(task);
        }
        index
    }

    /// Adds what follows from a VM and its task.
    pub fn put_in(&mut self, vm: &Vm, state: &State) {
        self.names.insert(vm.spec.name.clone(), vm.id);
        for disk in &vm.spec.disks {
            self.disks.entry(disk.path.clone()).or_default().insert(vm.id);
        }
        for other in &vm.rules.start_after {
            self.after.insert((*other, vm.id));
        }
        if let Some(runner) = vm.place.runner() {
            self.runs.insert((runner.node, vm.id));
            *self.runners.entry((runner.node, runner.boot_id)).or_default() += 1;
        }
        if vm.task.is_none() && vm.is_unsettled() {
            self.unsettled.insert(vm.id);
        }
        if vm.is_away() {
            self.away.insert(vm.id);
        }
        let task = vm.task.and_then(|id| state.tasks.get(&id));
        if let Some(node) = held_by(vm) {
            self.loads.entry(node).or_default().keep_it_busy += 1;
        }
        for node in nodes_of(vm, task) {
            let load = self.loads.entry(node).or_default();
            load.memory_mib += vm.spec.memory_mib;
            load.vcpus += vm.spec.vcpus;
            load.vms += 1;
            for (group, strength) in &vm.rules.anti_affinity {
                let nodes = match self.groups.get_mut(group) {
                    Some(nodes) => nodes,
                    None => self.groups.entry(group.clone()).or_default(),
                };
                let members = nodes.entry(node).or_default();
                members.all += 1;
                members.hard += u32::from(*strength == Strength::Hard);
            }
        }
    }

    /// Takes out again what [`Index::put_in`] has added.
    pub fn take_out(&mut self, vm: &Vm, state: &State) {
        self.names.remove(&vm.spec.name);
        for disk in &vm.spec.disks {
            if let Some(users) = self.disks.get_mut(&disk.path) {
                users.remove(&vm.id);
                if users.is_empty() {
                    self.disks.remove(&disk.path);
                }
            }
        }
        for other in &vm.rules.start_after {
            self.after.remove(&(*other, vm.id));
        }
        if let Some(runner) = vm.place.runner() {
            self.runs.remove(&(runner.node, vm.id));
            self.end_runner((runner.node, runner.boot_id));
        }
        self.unsettled.remove(&vm.id);
        self.away.remove(&vm.id);
        let task = vm.task.and_then(|id| state.tasks.get(&id));
        if let Some(node) = held_by(vm) {
            self.lighten(node, |load| load.keep_it_busy -= 1);
        }
        for node in nodes_of(vm, task) {
            self.lighten(node, |load| {
                load.memory_mib -= vm.spec.memory_mib;
                load.vcpus -= vm.spec.vcpus;
                load.vms -= 1;
            });
            for (group, strength) in &vm.rules.anti_affinity {
                self.leave(group, node, *strength);
            }
        }
    }

    fn end_runner(&mut self, of: (NodeId, BootId)) {
        if let Some(count) = self.runners.get_mut(&of) {
            *count -= 1;
            if *count == 0 {
                self.runners.remove(&of);
            }
        }
    }

    fn lighten(&mut self, node: NodeId, change: impl FnOnce(&mut NodeLoad)) {
        if let Some(load) = self.loads.get_mut(&node) {
            change(load);
            if *load == NodeLoad::EMPTY {
                self.loads.remove(&node);
            }
        }
    }

    fn leave(&mut self, group: &str, node: NodeId, strength: Strength) {
        let Some(nodes) = self.groups.get_mut(group) else { return };
        if let Some(members) = nodes.get_mut(&node) {
            members.all -= 1;
            members.hard -= u32::from(strength == Strength::Hard);
            if members.all == 0 {
                nodes.remove(&node);
            }
        }
        if nodes.is_empty() {
            self.groups.remove(group);
        }
    }

    /// Notes whether a task is under way or has ended.
    pub fn note_task(&mut self, task: &Task) {
        match task.outcome {
            None => self.active.insert(task.id),
            Some(_) => {
                self.active.remove(&task.id);
                self.ended.insert(task.id)
            }
        };
    }

    /// The oldest ended task when there are more than so many; it is not known here any more.
    pub fn pop_ended(&mut self, max: usize) -> Option<TaskId> {
        if self.ended.len() > max { self.ended.pop_first() } else { None }
    }

    pub fn named(&self, name: &str) -> Option<VmId> {
        self.names.get(name).copied()
    }

    /// The VMs that have a disk with this path.
    pub fn users_of(&self, disk: &Path) -> impl Iterator<Item = VmId> {
        self.disks.get(disk).into_iter().flatten().copied()
    }

    pub fn load(&self, node: NodeId) -> Option<&NodeLoad> {
        self.loads.get(&node)
    }

    /// The loads of all nodes that have any, by their numbers.
    pub fn loads(&self) -> impl Iterator<Item = (NodeId, NodeLoad)> {
        self.loads.iter().map(|(node, load)| (*node, *load))
    }

    pub fn runs(&self, node: NodeId) -> impl Iterator<Item = VmId> {
        let first = (node, VmId::MIN);
        self.runs.range(first..).take_while(move |(at, _)| *at == node).map(|(_, vm)| *vm)
    }

    /// The members of a group, node by node.
    pub fn members(&self, group: &str) -> Option<&BTreeMap<NodeId, Members>> {
        self.groups.get(group)
    }

    /// The VMs that are started only after this one.
    pub fn dependents(&self, vm: VmId) -> impl Iterator<Item = VmId> {
        let first = (vm, VmId::MIN);
        self.after.range(first..).take_while(move |(of, _)| *of == vm).map(|(_, waits)| *waits)
    }

    /// The boots of nodes under which VMs run.
    pub fn runners(&self) -> impl Iterator<Item = (NodeId, BootId)> {
        self.runners.keys().copied()
    }

    /// VMs without a task that need one, or will after a pause.
    pub fn unsettled(&self) -> impl Iterator<Item = VmId> {
        self.unsettled.iter().copied()
    }

    /// VMs that are to go back to a node that they like better.
    pub fn away(&self) -> impl Iterator<Item = VmId> {
        self.away.iter().copied()
    }

    pub fn active_tasks(&self) -> impl Iterator<Item = TaskId> {
        self.active.iter().copied()
    }
}

/// The node that is not empty because of this VM.
fn held_by(vm: &Vm) -> Option<NodeId> {
    match &vm.place {
        Place::Runner(runner) => Some(runner.node),
        Place::Sealed { sealer: Some(sealer), .. } if vm.task.is_some() => Some(sealer.node),
        _ => None,
    }
}
