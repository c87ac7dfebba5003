//! Admission: whether the cluster could still take the loss of nodes with one more VM running.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_types::{NodeId, RestartPolicy};

use super::{Planner, Wish, free};
use crate::state::{Node, State, Vm};

/// Refuses a VM that would use the room which is kept for the loss of nodes. The text has the
/// numbers. Without a reserve, or for a VM that runs already, nothing is refused; whether it has to
/// wait for another VM does not matter here.
pub fn admit(state: &State, vm: &Vm) -> Result<(), String> {
    let lost = usize::try_from(state.settings.reserve_nodes).unwrap_or(usize::MAX);
    if lost == 0 || vm.place.runner().is_some() {
        return Ok(());
    }
    let tried = BTreeSet::new();
    let wish = Wish { vm, wanted: None, tried: &tried, leaving: None, task: None };
    let planner = Planner::new(state);
    let home = match (planner.choose_place(&wish), planner.choose(&wish)) {
        (Some(home), _) => home,
        (None, Err(no)) => return Err(format!("{}; {no}", kept_for(lost))),
        (None, Ok(choice)) => choice.node,
    };
    let loss = Loss { state, newcomer: vm, home };
    loss.sets(lost).into_iter().try_for_each(|set| loss.survives(&set))
}

fn kept_for(lost: usize) -> String {
    let nodes = if lost == 1 { "1 node".to_owned() } else { format!("{lost} nodes") };
    format!("the cluster keeps room for the loss of {nodes} (`bell cluster set --reserve-nodes`)")
}

struct Loss<'a> {
    state: &'a State,
    newcomer: &'a Vm,
    /// Where the newcomer would run.
    home: NodeId,
}

impl<'a> Loss<'a> {
    /// The losses to try. One node: each of them. More: those that carry most, and the largest.
    fn sets(&self, lost: usize) -> Vec<BTreeSet<NodeId>> {
        let mut usable: Vec<&Node> = self.state.nodes.values().filter(|n| is_usable(n)).collect();
        if lost == 1 {
            return usable.iter().map(|node| [node.id].into()).collect();
        }
        let mut heaviest = |key: &dyn Fn(&Node) -> u64| {
            usable.sort_by_key(|node| (std::cmp::Reverse(key(node)), node.id));
            usable.iter().take(lost).map(|node| node.id).collect()
        };
        let used = |node: &Node| node.memory_mib - free(self.state, node).memory_mib;
        vec![heaviest(&used), heaviest(&|node| node.memory_mib)]
    }

    /// Finds a new node for each VM of the lost ones.
    fn survives(&self, lost: &BTreeSet<NodeId>) -> Result<(), String> {
        let displaced = self.displaced(lost);
        if self.fits_for_certain(lost, &displaced) {
            return Ok(());
        }
        let mut planner = Planner::new(self.state);
        if !lost.contains(&self.home) {
            planner.take(self.home, self.newcomer);
        }
        for vm in displaced {
            // A lost node counts as tried; what it has is of no use.
            let wish = Wish { vm, wanted: None, tried: lost, leaving: None, task: None };
            match planner.choose_place(&wish) {
                Some(node) => planner.take(node, vm),
                None => return Err(self.shortage(lost, vm)),
            }
        }
        Ok(())
    }

    /// The VMs that have to go elsewhere, those that come first in a failover first.
    fn displaced(&self, lost: &BTreeSet<NodeId>) -> Vec<&'a Vm> {
        let mut vms: Vec<&Vm> = lost.iter().flat_map(|node| self.state.vms_of(*node)).collect();
        if lost.contains(&self.home) {
            vms.push(self.newcomer);
        }
        vms.retain(|vm| vm.spec.restart == RestartPolicy::Restart);
        vms.sort_by_key(|vm| super::urgency(vm));
        vms
    }

    /// Whether even VMs as large as the largest of them would find room: that needs no planning.
    fn fits_for_certain(&self, lost: &BTreeSet<NodeId>, displaced: &[&Vm]) -> bool {
        let ruled =
            |vm: &&Vm| !vm.spec.possible_owners.is_empty() || !vm.rules.anti_affinity.is_empty();
        if displaced.iter().any(ruled) {
            return false;
        }
        let memory = displaced.iter().map(|vm| vm.spec.memory_mib).max().unwrap_or(1).max(1);
        let vcpus = displaced.iter().map(|vm| vm.spec.vcpus).max().unwrap_or(1).max(1);
        let others = self.state.nodes.values().filter(|n| is_usable(n) && !lost.contains(&n.id));
        let slots = others.map(|node| {
            let free = free(self.state, node);
            let taken = if node.id == self.home { self.newcomer.spec.memory_mib } else { 0 };
            let by_memory = free.memory_mib.saturating_sub(taken) / memory;
            let taken = if node.id == self.home { self.newcomer.spec.vcpus } else { 0 };
            by_memory.min(u64::from(free.vcpus.saturating_sub(taken) / vcpus))
        });
        slots.sum::<u64>() >= displaced.len() as u64
    }

    fn shortage(&self, lost: &BTreeSet<NodeId>, vm: &Vm) -> String {
        let names: Vec<String> = lost.iter().map(|node| self.state.node_name(*node)).collect();
        let left: Vec<&Node> = self
            .state
            .nodes
            .values()
            .filter(|node| is_usable(node) && !lost.contains(&node.id))
            .collect();
        let (memory, vcpus) = self.wanted();
        let newcomer = &self.newcomer.spec.name;
        let also = if vm.id == self.newcomer.id { "" } else { " any more" };
        format!(
            "{}: with VM {newcomer}, and without {}, VM {} ({} MiB, {} vCPUs) would find no node{also}. \
             The VMs then need {memory} MiB and {vcpus} vCPUs in all, and the {} nodes left have {} MiB \
             and {} vCPUs",
            kept_for(lost.len()),
            names.join(", "),
            vm.spec.name,
            vm.spec.memory_mib,
            vm.spec.vcpus,
            left.len(),
            left.iter().map(|node| node.memory_mib).sum::<u64>(),
            left.iter().map(|node| u64::from(node.vcpus)).sum::<u64>(),
        )
    }

    /// What all VMs that run need, the newcomer included.
    fn wanted(&self) -> (u64, u64) {
        let loads: BTreeMap<_, _> = self.state.index.loads().collect();
        let memory = loads.values().map(|load| load.memory_mib).sum::<u64>();
        let vcpus = loads.values().map(|load| u64::from(load.vcpus)).sum::<u64>();
        let newcomer = &self.newcomer.spec;
        (memory + newcomer.memory_mib, vcpus + u64::from(newcomer.vcpus))
    }
}

fn is_usable(node: &Node) -> bool {
    node.is_online() && !node.cordoned && node.quarantined_until.is_none()
}
