//! How full the planner packs random clusters. The bound is the cluster itself: no plan uses more
//! memory and vCPUs than there are, so the share that is used when nothing fits any more says how far
//! any better plan could be ahead.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use bellwether_core::planner::{Planner, Wish, urgency};
use bellwether_core::{State, Vm};
use serde_json::{Value, json};

use crate::cluster::{Chance, Cluster};

const CLUSTERS: u64 = 8;
const NODES: u64 = 40;
/// A plan below this share of the bound is one that should be better.
const SHARE_MIN: f64 = 0.95;

/// Packs random clusters: in a round, in the order of the leader's rounds, and one by one as they come.
pub fn measure() -> Result<Value> {
    let mut rounds = Vec::new();
    let mut one_by_one = Vec::new();
    for seed in 1..=CLUSTERS {
        let state = crowded(seed);
        let mut vms: Vec<&Vm> = state.vms.values().collect();
        one_by_one.push(filled(&state, &vms));
        vms.sort_by_key(|vm| urgency(vm));
        rounds.push(filled(&state, &vms));
    }
    let least = |shares: &[f64]| shares.iter().copied().fold(1.0, f64::min);
    let worst = least(&rounds).min(least(&one_by_one));
    ensure!(worst >= SHARE_MIN, "a cluster is packed to {worst:.3} of the bound");
    Ok(json!({
        "clusters": CLUSTERS, "nodes": NODES, "bound": 1.0,
        "round_share_min": least(&rounds), "one_by_one_share_min": least(&one_by_one),
    }))
}

/// The result for people.
pub fn sentence(packing: &Value) -> String {
    let share = |key: &str| packing[key].as_f64().unwrap_or(0.0) * 100.0;
    format!(
        "packing of {} random clusters of {} nodes: at least {:.1} % of the bound in a round, {:.1} % one by one",
        packing["clusters"],
        packing["nodes"],
        share("round_share_min"),
        share("one_by_one_share_min")
    )
}

/// Nodes of different sizes, and VMs that want half as much again as all of them have.
fn crowded(seed: u64) -> State {
    let mut cluster = Cluster::of(NODES, seed);
    let mut chance = Chance::new(seed ^ 0x5EED);
    for node in cluster.state.nodes.values_mut() {
        node.memory_mib = 65_536 * (1 + chance.below(4));
        node.vcpus = 64 * (1 + u32::try_from(chance.below(3)).unwrap_or(0));
    }
    let memory: u64 = cluster.state.nodes.values().map(|node| node.memory_mib).sum();
    let (mut number, mut wanted) = (0, 0);
    while wanted < memory * 3 / 2 {
        let memory_mib = 1_024 * (1 + chance.below(16));
        let vcpus = 1 + u32::try_from(chance.below(8)).unwrap_or(0);
        cluster.define(number, memory_mib, vcpus);
        wanted += memory_mib;
        number += 1;
    }
    cluster.state
}

/// The share of memory or of vCPUs that is used, whichever is larger, when nothing fits any more.
fn filled(state: &State, vms: &[&Vm]) -> f64 {
    let mut planner = Planner::new(state);
    let (mut memory, mut vcpus) = (0, 0);
    let tried = BTreeSet::new();
    for vm in vms {
        let wish = Wish { vm, wanted: None, tried: &tried, leaving: None, task: None };
        if let Ok(choice) = planner.choose(&wish) {
            planner.take(choice.node, vm);
            memory += vm.spec.memory_mib;
            vcpus += vm.spec.vcpus;
        }
    }
    let all_memory: u64 = state.nodes.values().map(|node| node.memory_mib).sum();
    let all_vcpus: u32 = state.nodes.values().map(|node| node.vcpus).sum();
    let of_memory = memory as f64 / all_memory as f64;
    of_memory.max(f64::from(vcpus) / f64::from(all_vcpus))
}

#[cfg(test)]
mod tests {
    #[test]
    fn random_clusters_are_filled_to_within_five_percent_of_the_bound() {
        let packing = super::measure().unwrap();
        assert!(super::sentence(&packing).contains("8 random clusters"), "{packing}");
    }
}
