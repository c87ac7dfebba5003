//! Placement: which node, and why not the others. Pure.

use std::collections::BTreeSet;
use std::fmt;

use bellwether_types::NodeId;

use crate::state::{Node, State, Vm};
use crate::task::{Task, TaskKind};

/// What is wanted of a placement.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    pub vm: &'a Vm,
    /// The only node that will do, when somebody named one.
    pub wanted: Option<NodeId>,
    /// Nodes on which this task has failed already.
    pub tried: &'a BTreeSet<NodeId>,
    /// The node that the VM is leaving.
    pub leaving: Option<NodeId>,
    /// The task's own reservation must not count against it.
    pub task: Option<bellwether_types::TaskId>,
}

impl<'a> Wish<'a> {
    /// The wish of a task that needs a node for its VM.
    pub fn of(task: &'a Task, vm: &'a Vm) -> Self {
        let leaving = match task.kind {
            TaskKind::Migrate => vm.place.runner().map(|runner| runner.node),
            _ => None,
        };
        Self { vm, wanted: task.wanted, tried: &task.tried, leaving, task: Some(task.id) }
    }
}

/// Why a node was not chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    NotWanted,
    NotOnline(&'static str),
    Cordoned,
    NotAnOwner,
    Leaving,
    TriedBefore,
    Memory { free_mib: u64, needed_mib: u64 },
    Vcpus { free: u32, needed: u32 },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWanted => write!(f, "another node was asked for"),
            Self::NotOnline(phase) => write!(f, "is {phase}"),
            Self::Cordoned => write!(f, "is draining or in maintenance"),
            Self::NotAnOwner => write!(f, "is not among the VM's possible owners"),
            Self::Leaving => write!(f, "the VM runs there now"),
            Self::TriedBefore => write!(f, "failed in this task already"),
            Self::Memory { free_mib, needed_mib } => {
                write!(f, "has {free_mib} MiB of memory free, {needed_mib} MiB are needed")
            }
            Self::Vcpus { free, needed } => write!(f, "has {free} vCPUs free, {needed} are needed"),
        }
    }
}

/// No node will do; each with its reason.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NoNode {
    pub vm: String,
    pub reasons: Vec<(String, Reason)>,
}

impl fmt::Display for NoNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no node can take VM {}", self.vm)?;
        if self.reasons.is_empty() {
            return write!(f, ": the cluster has no nodes");
        }
        for (index, (node, reason)) in self.reasons.iter().enumerate() {
            write!(f, "{}{node} {reason}", if index == 0 { ": " } else { "; " })?;
        }
        Ok(())
    }
}

/// Memory and vCPUs that a node has left.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Free {
    pub memory_mib: u64,
    pub vcpus: u32,
    pub vms: usize,
}

/// What is left on a node, VMs under way to it included; `but` is left out of the count.
pub fn free(state: &State, node: &Node, but: Option<bellwether_types::TaskId>) -> Free {
    let mut free = Free { memory_mib: node.memory_mib, vcpus: node.vcpus, vms: 0 };
    for vm in state.vms.values() {
        let task = vm.task.filter(|task| Some(*task) != but).and_then(|id| state.tasks.get(&id));
        let coming = task.and_then(|task| task.step.attempt()).map(|attempt| attempt.node);
        let runs = vm.place.runner().map(|runner| runner.node);
        if runs == Some(node.id) || coming == Some(node.id) {
            free.memory_mib = free.memory_mib.saturating_sub(vm.spec.memory_mib);
            free.vcpus = free.vcpus.saturating_sub(vm.spec.vcpus);
            free.vms += 1;
        }
    }
    free
}

/// The node with the most memory left; of equal ones the one with fewer VMs, then the lower number.
pub fn choose(state: &State, wish: &Wish<'_>) -> Result<NodeId, NoNode> {
    let mut reasons = Vec::new();
    let mut best: Option<(Free, NodeId)> = None;
    for node in state.nodes.values() {
        let free = free(state, node, wish.task);
        match refuse(node, free, wish) {
            Some(reason) => reasons.push((node.name.clone(), reason)),
            None => best = best.into_iter().chain([(free, node.id)]).max_by_key(rank),
        }
    }
    best.map(|(_, node)| node).ok_or_else(|| NoNode { vm: wish.vm.spec.name.clone(), reasons })
}

fn rank((free, node): &(Free, NodeId)) -> impl Ord + use<> {
    use std::cmp::Reverse;
    (free.memory_mib, Reverse(free.vms), Reverse(*node))
}

fn refuse(node: &Node, free: Free, wish: &Wish<'_>) -> Option<Reason> {
    let spec = &wish.vm.spec;
    let owners = &spec.possible_owners;
    if wish.wanted.is_some_and(|wanted| wanted != node.id) {
        return Some(Reason::NotWanted);
    }
    if !node.is_online() {
        return Some(Reason::NotOnline(node.phase(0).as_str()));
    }
    if node.cordoned {
        return Some(Reason::Cordoned);
    }
    if !owners.is_empty() && !owners.contains(&node.id) {
        return Some(Reason::NotAnOwner);
    }
    if wish.leaving == Some(node.id) {
        return Some(Reason::Leaving);
    }
    if wish.tried.contains(&node.id) {
        return Some(Reason::TriedBefore);
    }
    if free.memory_mib < spec.memory_mib {
        return Some(Reason::Memory { free_mib: free.memory_mib, needed_mib: spec.memory_mib });
    }
    (free.vcpus < spec.vcpus).then_some(Reason::Vcpus { free: free.vcpus, needed: spec.vcpus })
}
