//! A forecast says what then happens: it is compared with the model that it does not know.

use std::collections::BTreeSet;

use bellwether_types::{ClusterPatch, NodeId, Strength, VmId, VmPatch, VmRules};

use super::model::Model;
use crate::command::Change;
use crate::forecast::{Forecast, Pace, Scenario, forecast};
use crate::{TaskKind, Timing, explain};

fn of(model: &Model, scenario: Scenario) -> Forecast {
    forecast(&model.state, &Timing::default(), &Pace::default(), scenario, model.now)
}

fn nodes(numbers: &[u64]) -> BTreeSet<NodeId> {
    numbers.iter().map(|number| NodeId(*number)).collect()
}

fn busy(nodes: u64, vms: usize) -> (Model, Vec<VmId>) {
    let mut model = Model::new(nodes);
    let vms: Vec<VmId> = (0..vms).map(|n| model.create(&format!("vm-{n:02}"))).collect();
    for vm in &vms {
        model.begin(*vm, TaskKind::Start);
    }
    model.settle(4);
    (model, vms)
}

#[test]
fn what_a_lost_node_leads_to_is_what_then_happens() {
    let (mut model, vms) = busy(4, 13);
    let before = model.state.clone();
    let told = of(&model, Scenario::NodesDown(nodes(&[1, 2])));
    assert_eq!(model.state, before, "asking changes nothing");
    assert!(told.finished && told.stuck.is_empty(), "{told:?}");
    let lost: usize = [1, 2].iter().map(|n| model.state.vms_of(NodeId(*n)).count()).sum();
    assert_eq!(told.moves.len(), lost);
    // Suspicion, then preparing, the locks and the start, each with its commit.
    for one in &told.moves {
        assert!((1_500..2_500).contains(&one.outage_ms), "{one:?}");
    }
    model.power_off(NodeId(1));
    model.power_off(NodeId(2));
    model.settle(20);
    for vm in vms {
        let name = &model.state.vms[&vm].spec.name;
        let moved = told.moves.iter().find(|one| one.vm == *name).map(|one| one.to);
        let expected = moved.or(before.vms[&vm].place.runner().map(|runner| runner.node));
        assert_eq!(model.place(vm).runner().map(|runner| runner.node), expected, "{name}");
    }
    let unknown = told.nodes.iter().filter(|node| node.phase == "unknown").count();
    assert_eq!(unknown, 2);
}

#[test]
fn what_finds_no_room_is_named_with_the_reason() {
    let (model, _) = busy(2, 14);
    let told = of(&model, Scenario::NodesDown(nodes(&[2])));
    // Each node has 8 vCPUs: 1 of 7 is free.
    assert_eq!((told.moves.len(), told.stuck.len()), (1, 6));
    assert!(told.stuck[0].reason.contains("n1 has 0 vCPUs free, 1 are needed"), "{told:?}");
    let left = told.nodes.iter().find(|node| node.node == NodeId(1)).unwrap();
    assert_eq!((left.before.vcpus, left.after.vcpus), (1, 0));
}

#[test]
fn a_drain_takes_its_time_and_keeps_to_its_pace() {
    let (model, _) = busy(3, 12);
    let told = of(&model, Scenario::Drain(nodes(&[3])));
    assert_eq!(told.moves.len(), 4);
    assert!(told.moves.iter().all(|one| one.kind == TaskKind::Migrate && one.outage_ms < 1_000));
    // Two at a time: the third begins when one of the first two has come up.
    assert!(told.moves[2].at_ms > told.moves[1].at_ms, "{told:?}");
    let drained = told.nodes.iter().find(|node| node.node == NodeId(3)).unwrap();
    assert_eq!((drained.phase, drained.after.vms), ("maintenance", 0));
}

#[test]
fn a_vm_that_is_to_be_added_is_placed_or_refused() {
    let (mut model, vms) = busy(2, 4);
    let mut spec = model.state.vms[&vms[0]].spec.clone();
    spec.name = "new".into();
    let add = |spec: &bellwether_types::VmSpec| {
        Scenario::AddVm(Box::new((spec.clone(), VmRules::default())))
    };
    let told = of(&model, add(&spec));
    assert_eq!((told.moves[0].vm.as_str(), told.moves[0].from), ("new", None));
    let patch = ClusterPatch { reserve_nodes: Some(1), ..ClusterPatch::default() };
    model.apply(Change::SetCluster { patch });
    spec.vcpus = 6;
    let told = of(&model, add(&spec));
    assert!(told.refused.unwrap().contains("loss of 1 node"));
}

#[test]
fn rules_count_in_a_forecast() {
    let (mut model, vms) = busy(3, 3);
    for vm in &vms {
        let anti_affinity = Some([("web".to_owned(), Strength::Hard)].into());
        let patch = VmPatch { anti_affinity, ..VmPatch::default() };
        model.apply(Change::SetVm { vm: *vm, patch });
    }
    let told = of(&model, Scenario::NodesDown(nodes(&[1])));
    assert_eq!(told.stuck.len(), 1);
    assert!(told.stuck[0].reason.contains("group web"), "{told:?}");
}

#[test]
fn a_place_is_explained() {
    let (mut model, vms) = busy(3, 3);
    let vm = vms[0];
    let here = model.place(vm).runner().unwrap().node;
    let other = NodeId(here.0 % 3 + 1);
    model.apply(Change::Cordon { node: other, cordoned: true });
    let record = &model.state.vms[&vm];
    let placed = record.placed.as_ref().unwrap();
    assert_eq!((placed.node, placed.kind), (here, TaskKind::Start));
    assert!(placed.why.contains("MiB"), "{}", placed.why);
    let judged = explain::nodes_for(&model.state, record);
    assert_eq!(judged.len(), 3);
    let reason = judged.iter().find(|(node, _)| *node == other).unwrap().1.clone().unwrap_err();
    assert_eq!(reason.to_string(), "is draining or in maintenance");
    assert!(explain::next_place(&model.state, vm).unwrap().starts_with("it would go to n"));
}

#[test]
fn a_failover_is_explained_by_the_loss_of_its_node() {
    let (mut model, vms) = busy(3, 3);
    let vm = vms[0];
    let node = model.place(vm).runner().unwrap().node;
    model.power_off(node);
    model.settle(20);
    let task = model.state.vms[&vm].placed.as_ref().unwrap().task;
    let task = &model.state.tasks[&task];
    assert!(task.log[0].1.contains("is not heard from"), "{:?}", task.log);
    let events: Vec<&str> =
        explain::events_of(&model.state, task).map(|event| event.text.as_str()).collect();
    let lost = format!("n{node} is not heard from");
    assert!(events.iter().any(|text| text.starts_with(&lost)), "{events:?}");
    let others = format!("VM {}", model.state.vms[&vms[1]].spec.name);
    assert!(!events.iter().any(|text| text.starts_with(&others)), "{events:?}");
}
