//! How evenly the planner fills a cluster, and what it leaves alone. How full it packs one is measured
//! by `cargo xtask bench scale`, with a test beside it.

use bellwether_types::{NodeId, VmId};

use super::model::Model;
use crate::{TaskKind, Timing, reconcile};

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
    let mut model = Model::new(3);
    for number in 0..12 {
        let vm = model.create_of(&format!("vm-{number}"), 256 << (number % 3), 1);
        model.begin(vm, TaskKind::Start);
    }
    let plan = || reconcile::plan(&model.state, &model.observed, &Timing::default(), 0, model.now);
    assert_eq!(plan().len(), 12);
    assert_eq!(plan(), plan());
}
