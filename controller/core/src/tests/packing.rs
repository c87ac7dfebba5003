//! How well the planner fills a cluster, and what it leaves alone. The seeds are fixed.

use bellwether_types::{NodeId, VmId};

use super::model::Model;
use super::random::Chance;
use crate::observe::Observed;
use crate::planner::{Planner, Wish, urgency};
use crate::state::{State, Vm};
use crate::{TaskKind, Timing, reconcile};

/// A cluster of nodes of different sizes, and VMs that want more than all of them have.
fn crowded(seed: u64) -> State {
    let mut chance = Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut model = Model::new(12);
    for node in model.state.nodes.values_mut() {
        node.memory_mib = 65_536 * (1 + chance.below(4));
        node.vcpus = u32::try_from(64 * (1 + chance.below(3))).unwrap();
    }
    let memory: u64 = model.state.nodes.values().map(|node| node.memory_mib).sum();
    let mut wanted = 0;
    for number in 0.. {
        if wanted > memory * 3 / 2 {
            break;
        }
        let memory_mib = 1_024 * (1 + chance.below(16));
        let vcpus = u32::try_from(1 + chance.below(8)).unwrap();
        wanted += memory_mib;
        model.create_of(&format!("vm-{number}"), memory_mib, vcpus);
    }
    model.state
}

/// The share of the cluster's memory or vCPUs, whichever is fuller, when nothing fits any more. No
/// plan at all can be above 1.
fn filled(state: &State, mut vms: Vec<&Vm>, order: impl Fn(&mut Vec<&Vm>)) -> f64 {
    order(&mut vms);
    let mut planner = Planner::new(state);
    let (mut memory, mut vcpus) = (0, 0);
    let tried = Default::default();
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
    let share = |used: f64, all: f64| used / all;
    share(memory as f64, all_memory as f64).max(share(f64::from(vcpus), f64::from(all_vcpus)))
}

#[test]
fn a_round_of_planning_fills_a_cluster_to_within_five_percent_of_the_bound() {
    for seed in 1..=6 {
        let state = crowded(seed);
        let by_urgency = |vms: &mut Vec<&Vm>| vms.sort_by_key(|vm| urgency(vm));
        let share = filled(&state, state.vms.values().collect(), by_urgency);
        assert!(share >= 0.95, "seed {seed}: {share:.3}");
    }
}

#[test]
fn vms_that_come_one_by_one_fill_it_as_well() {
    for seed in 1..=6 {
        let state = crowded(seed);
        let share = filled(&state, state.vms.values().collect(), |_| ());
        assert!(share >= 0.95, "seed {seed}: {share:.3}");
    }
}

/// Nodes of one size, filled by equal VMs: the fullest and the emptiest differ by one VM at most.
#[test]
fn the_load_is_even() {
    let mut model = Model::new(5);
    let vms: Vec<VmId> = (0..23).map(|n| model.create(&format!("vm-{n}"))).collect();
    for vm in &vms {
        model.begin(*vm, TaskKind::Start);
    }
    model.settle(4);
    let counts = model.state.nodes.keys().map(|node| model.state.vms_of(*node).count());
    let counts: Vec<usize> = counts.collect();
    assert_eq!(counts.iter().sum::<usize>(), vms.len());
    assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
}

/// vCPUs count as much as memory: whichever a VM takes the larger share of.
#[test]
fn a_node_whose_vcpus_are_taken_is_not_the_emptiest() {
    let mut model = Model::new(2);
    let hungry = model.create_of("hungry", 256, 7);
    model.begin(hungry, TaskKind::Start);
    model.settle(2);
    let fat = model.create_of("fat", 1_024, 1);
    model.begin(fat, TaskKind::Start);
    model.settle(2);
    let of = |vm| model.place(vm).runner().unwrap().node;
    assert_ne!(of(hungry), of(fat));
}

/// Whatever the load looks like, a VM that runs well is not moved.
#[test]
fn a_crooked_cluster_is_left_alone() {
    let mut model = Model::new(3);
    let vms: Vec<VmId> = (0..6).map(|n| model.create(&format!("vm-{n}"))).collect();
    for vm in &vms {
        let node = Some(NodeId(1));
        let request =
            crate::task::TaskRequest { vm: *vm, kind: TaskKind::Start, node, by: "kim".into() };
        model.apply(crate::command::Change::BeginTask(request));
    }
    model.settle(6);
    assert_eq!(model.state.vms_of(NodeId(1)).count(), 6);
    let changes = reconcile::plan(&model.state, &model.observed, &Timing::default(), 0, model.now);
    assert_eq!(changes, []);
}

#[test]
fn the_same_state_gives_the_same_plan() {
    let state = crowded(7);
    let plan = || reconcile::plan(&state, &Observed::default(), &Timing::default(), 0, 1);
    assert_eq!(plan(), plan());
}
