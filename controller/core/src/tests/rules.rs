//! What each rule of an administrator does.

use bellwether_types::{ClusterPatch, Failback, NodeId, RestartLimit, Strength, VmId, VmPatch};

use super::model::Model;
use crate::command::Change;
use crate::state::{Desired, Level};
use crate::{Outcome, Place, RejectionKind, TaskKind};

fn set(model: &mut Model, vm: VmId, patch: VmPatch) -> Outcome {
    model.apply(Change::SetVm { vm, patch })
}

fn prefers(nodes: &[u64], failback: Failback) -> VmPatch {
    let preferred_owners = Some(nodes.iter().map(|node| NodeId(*node)).collect());
    VmPatch { preferred_owners, failback: Some(failback), ..VmPatch::default() }
}

fn apart(group: &str, strength: Strength) -> VmPatch {
    VmPatch { anti_affinity: Some([(group.to_owned(), strength)].into()), ..VmPatch::default() }
}

fn after(others: &[VmId]) -> VmPatch {
    VmPatch { start_after: Some(others.iter().copied().collect()), ..VmPatch::default() }
}

/// Seed 769 of the simulator: the delete was refused, and the VM was stopped nevertheless.
#[test]
fn a_delete_that_others_forbid_calls_nothing_off() {
    let mut model = Model::new(1);
    let (first, second) = (model.create("first"), model.create("second"));
    assert_eq!(set(&mut model, second, after(&[first])), Outcome::Done);
    model.apply(Change::Cordon { node: NodeId(1), cordoned: true });
    model.begin(first, TaskKind::Start);
    model.settle(3);
    assert!(model.state.vms[&first].pending.is_some(), "it waits for a node");
    let before = model.state.clone();
    assert!(matches!(model.begin(first, TaskKind::Delete), Outcome::Rejected(_)));
    assert_eq!(model.state, before);
}

fn node_of(model: &Model, vm: VmId) -> u64 {
    model.place(vm).runner().map_or(0, |runner| runner.node.0)
}

fn started(model: &mut Model, name: &str, patch: VmPatch) -> VmId {
    let vm = model.create(name);
    assert_ne!(set(model, vm, patch.clone()), Outcome::Unchanged, "{patch:?}");
    model.begin(vm, TaskKind::Start);
    model.settle(3);
    vm
}

fn rejection(outcome: Outcome) -> crate::Rejection {
    match outcome {
        Outcome::Rejected(rejection) => rejection,
        other => panic!("{other:?}"),
    }
}

/// How many events of this level say this.
fn said(model: &Model, level: Level, text: &str) -> usize {
    model.state.events.iter().filter(|e| e.level == level && e.text.contains(text)).count()
}

#[test]
fn a_vm_runs_on_the_best_of_its_preferred_owners_and_says_why() {
    let mut model = Model::new(3);
    let vm = started(&mut model, "web", prefers(&[3, 2], Failback::Never));
    assert_eq!(node_of(&model, vm), 3);
    let placed = model.state.vms[&vm].placed.clone().unwrap();
    assert_eq!((placed.node, placed.by.as_str()), (NodeId(3), "admin"));
    assert!(placed.why.contains("preferred owner number 1"), "{}", placed.why);
    model.power_off(NodeId(3));
    model.settle(20);
    assert_eq!(node_of(&model, vm), 2, "the next best");
}

#[test]
fn a_vm_that_the_cluster_moved_goes_back_when_it_may() {
    for (failback, goes_back) in [
        (Failback::Never, false),
        (Failback::Immediately, true),
        // The model's clock stands in the first hour of the first day.
        (Failback::Within { from: 0, to: 1 }, true),
        (Failback::Within { from: 1, to: 2 }, false),
    ] {
        let mut model = Model::new(3);
        let vm = started(&mut model, "web", prefers(&[3], failback));
        model.power_off(NodeId(3));
        model.settle(20);
        assert_ne!(node_of(&model, vm), 3);
        model.power_on(NodeId(3));
        model.settle(20);
        assert_eq!(node_of(&model, vm) == 3, goes_back, "{failback:?}");
        assert_eq!(model.running(vm).len(), 1);
    }
}

#[test]
fn a_vm_that_a_person_moved_stays() {
    let mut model = Model::new(3);
    let vm = started(&mut model, "web", prefers(&[3], Failback::Immediately));
    let request = crate::task::TaskRequest {
        vm,
        kind: TaskKind::Migrate,
        node: Some(NodeId(1)),
        by: "kim".into(),
    };
    model.apply(Change::BeginTask(request));
    model.settle(20);
    assert_eq!(node_of(&model, vm), 1);
}

#[test]
fn a_group_is_kept_apart_softly_or_hard() {
    let mut model = Model::new(2);
    let soft = || apart("web", Strength::Soft);
    let first = started(&mut model, "a", soft());
    let second = started(&mut model, "b", soft());
    assert_ne!(node_of(&model, first), node_of(&model, second));
    let third = started(&mut model, "c", soft());
    assert_ne!(node_of(&model, third), 0, "soft gives way");
    let insists = started(&mut model, "d", apart("web", Strength::Hard));
    assert_eq!(node_of(&model, insists), 0, "hard does not");
    let pending = model.state.vms[&insists].pending.clone().unwrap();
    assert!(pending.contains("group web"), "{pending}");
    // It is changed while it waits, and the others run.
    set(&mut model, insists, apart("db", Strength::Hard));
    model.settle(8);
    assert_ne!(node_of(&model, insists), 0);
}

#[test]
fn who_insists_keeps_later_ones_away_too() {
    let mut model = Model::new(1);
    started(&mut model, "a", apart("web", Strength::Hard));
    let second = started(&mut model, "b", apart("web", Strength::Soft));
    assert_eq!(node_of(&model, second), 0);
}

#[test]
fn a_vm_starts_after_the_one_that_it_needs() {
    let mut model = Model::new(3);
    let db = model.create("db");
    let app = started(&mut model, "app", after(&[db]));
    assert_eq!(model.place(app), &Place::Stopped);
    let pending = model.state.vms[&app].pending.clone().unwrap();
    assert!(pending.contains("VM db, which is stopped"), "{pending}");
    model.begin(db, TaskKind::Start);
    model.settle(8);
    assert_eq!((model.running(db).len(), model.running(app).len()), (1, 1));
    let refused = rejection(model.begin(db, TaskKind::Delete));
    assert_eq!(refused.kind, RejectionKind::Conflict);
}

/// Both are lost with their node, and come up in order, although the later one is more important.
#[test]
fn a_failover_keeps_the_order_of_starts() {
    let mut model = Model::new(2);
    let db = started(&mut model, "db", prefers(&[2], Failback::Never));
    let app = model.create("app");
    set(&mut model, app, prefers(&[2], Failback::Never));
    set(&mut model, app, VmPatch { priority: Some(9), ..after(&[db]) });
    model.begin(app, TaskKind::Start);
    model.settle(4);
    assert_eq!((node_of(&model, db), node_of(&model, app)), (2, 2));
    model.power_off(NodeId(2));
    model.settle(40);
    assert_eq!((node_of(&model, db), node_of(&model, app)), (1, 1));
    let ran = |name: &str| {
        let text = format!("VM {name} runs on n1");
        model.state.events.iter().find(|event| event.text.contains(&text)).unwrap().seq
    };
    assert!(ran("db") < ran("app"));
}

#[test]
fn a_circle_of_starts_is_refused_by_name() {
    let mut model = Model::new(1);
    let [a, b, c] = ["a", "b", "c"].map(|name| model.create(name));
    assert_eq!(set(&mut model, a, after(&[b])), Outcome::Done);
    assert_eq!(set(&mut model, b, after(&[c])), Outcome::Done);
    let refused = rejection(set(&mut model, c, after(&[a])));
    assert_eq!(refused.text, "VM c would wait for itself: c after a after b after c");
    let refused = rejection(set(&mut model, c, after(&[c])));
    assert_eq!(refused.text, "VM c would wait for itself: c after c");
}

#[test]
fn a_vm_that_ends_too_often_is_left_to_a_person() {
    let mut model = Model::new(2);
    let limit = Some(Some(RestartLimit { times: 2, period_s: 3_600 }));
    let vm = started(&mut model, "web", VmPatch { restart_limit: limit, ..VmPatch::default() });
    for _ in 0..3 {
        let runner = model.place(vm).runner().unwrap().clone();
        model.kill_vmm(runner.node, vm, runner.epoch);
        model.settle(40);
    }
    assert_eq!(
        (model.place(vm), model.state.vms[&vm].desired),
        (&Place::Stopped, Desired::Stopped)
    );
    assert_eq!(said(&model, Level::Error, "restarted 2 times within 3600 s"), 1);
    model.begin(vm, TaskKind::Start);
    model.settle(4);
    assert_eq!((model.running(vm).len(), &model.state.vms[&vm].halted), (1, &None));
}

#[test]
fn restarts_that_lie_far_apart_are_not_too_many() {
    let mut model = Model::new(2);
    let limit = Some(Some(RestartLimit { times: 1, period_s: 60 }));
    let vm = started(&mut model, "web", VmPatch { restart_limit: limit, ..VmPatch::default() });
    for _ in 0..3 {
        let node = model.place(vm).runner().unwrap().node;
        model.power_off(node);
        model.settle(20);
        model.power_on(node);
        model.now += 61_000;
        model.settle(4);
    }
    assert_eq!(model.running(vm).len(), 1);
}

fn lose(model: &mut Model, node: u64) {
    model.hosts.get_mut(&NodeId(node)).unwrap().connected = false;
    model.settle(10);
    model.hosts.get_mut(&NodeId(node)).unwrap().connected = true;
    model.settle(4);
}

#[test]
fn a_node_that_is_lost_again_and_again_gets_no_vms_for_a_while() {
    let mut model = Model::new(4);
    (0..3).for_each(|_| lose(&mut model, 1));
    assert!(model.state.nodes[&NodeId(1)].quarantined_until.is_some());
    let vm = started(&mut model, "web", prefers(&[1], Failback::Immediately));
    assert_ne!(node_of(&model, vm), 1);
    // A quarter of the nodes is the most.
    (0..3).for_each(|_| lose(&mut model, 2));
    assert_eq!(model.state.nodes[&NodeId(2)].quarantined_until, None);
    assert_eq!(said(&model, Level::Error, "a quarter of the nodes"), 1);
    model.now += 3_600_000;
    model.settle(4);
    assert_eq!(model.state.nodes[&NodeId(1)].quarantined_until, None);
    let by = "kim".to_owned();
    let lifted = model.apply(Change::LiftQuarantine { node: NodeId(1), by });
    assert_eq!(lifted, Outcome::Unchanged);
}

#[test]
fn a_person_ends_a_quarantine_and_the_count_begins_anew() {
    let mut model = Model::new(4);
    (0..3).for_each(|_| lose(&mut model, 1));
    model.apply(Change::LiftQuarantine { node: NodeId(1), by: "kim".into() });
    lose(&mut model, 1);
    assert_eq!(model.state.nodes[&NodeId(1)].quarantined_until, None);
    assert_eq!(said(&model, Level::Info, "kim ended the quarantine"), 1);
}

#[test]
fn losses_that_lie_far_apart_are_no_reason() {
    let mut model = Model::new(4);
    for _ in 0..5 {
        lose(&mut model, 1);
        model.now += 1_900_000;
    }
    assert_eq!(model.state.nodes[&NodeId(1)].quarantined_until, None);
}

/// Three nodes with room for 16 VMs each (8 by vCPUs): the loss of one leaves room for 16.
#[test]
fn a_start_that_would_use_the_reserve_is_refused_with_the_numbers() {
    let mut model = Model::new(3);
    let patch = ClusterPatch { reserve_nodes: Some(1), ..ClusterPatch::default() };
    assert_eq!(model.apply(Change::SetCluster { patch }), Outcome::Done);
    let vms: Vec<VmId> = (0..17).map(|n| model.create(&format!("vm-{n}"))).collect();
    for vm in &vms[..16] {
        assert!(matches!(model.begin(*vm, TaskKind::Start), Outcome::Task(_)));
        model.settle(2);
    }
    let refused = rejection(model.begin(vms[16], TaskKind::Start));
    assert_eq!(refused.kind, RejectionKind::Conflict);
    for said in ["loss of 1 node", "need 4352 MiB and 17 vCPUs", "have 8192 MiB and 16 vCPUs"] {
        assert!(refused.text.contains(said), "{refused}");
    }
    // One that has to wait for another VM is weighed all the same, and may wait if there is room.
    set(&mut model, vms[16], after(&[vms[15]]));
    assert!(matches!(model.begin(vms[16], TaskKind::Start), Outcome::Rejected(_)));
    model.begin(vms[15], TaskKind::Stop);
    model.settle(2);
    assert!(matches!(model.begin(vms[16], TaskKind::Start), Outcome::Task(_)));
    model.begin(vms[16], TaskKind::Stop);
    set(&mut model, vms[16], after(&[]));
    model.begin(vms[15], TaskKind::Start);
    model.settle(2);
    // A failover may use it: that is what it is for.
    model.power_off(NodeId(1));
    model.settle(60);
    assert!(vms[..16].iter().all(|vm| model.running(*vm).len() == 1));
    let patch = ClusterPatch { reserve_nodes: Some(0), ..ClusterPatch::default() };
    model.apply(Change::SetCluster { patch });
    assert!(matches!(model.begin(vms[16], TaskKind::Start), Outcome::Task(_)));
}

#[test]
fn rules_name_what_exists() {
    let mut model = Model::new(1);
    let vm = model.create("web");
    let refused = rejection(set(&mut model, vm, prefers(&[9], Failback::Never)));
    assert!(refused.text.contains("no node 9"), "{refused}");
    let refused = rejection(set(&mut model, vm, after(&[VmId::MIN])));
    assert!(refused.text.contains("no VM"), "{refused}");
    assert_eq!(set(&mut model, vm, VmPatch::default()), Outcome::Unchanged);
}

/// Each task alone would have chosen the same node: the one with the most room.
#[test]
fn tasks_that_choose_at_the_same_time_do_not_share_the_same_room() {
    let mut model = Model::new(3);
    // Eight vCPUs a node: three VMs of five do not fit in pairs.
    let vms: Vec<VmId> = ["a", "b", "c"].iter().map(|name| model.create_of(name, 256, 5)).collect();
    let tasks: Vec<_> = vms.iter().map(|vm| model.begin(*vm, TaskKind::Start)).collect();
    let events: Vec<_> = tasks
        .iter()
        .map(|task| {
            let Outcome::Task(id) = task else { panic!("{task:?}") };
            let task = &model.state.tasks[id];
            let action = crate::saga::next_action(&model.state, &model.observed, task, model.now);
            let crate::saga::Action::Advance(event) = action else { panic!("{action:?}") };
            Change::Advance { task: *id, step_no: task.step_no, event }
        })
        .collect();
    for event in events {
        model.apply(event);
    }
    let on_nodes = model.state.nodes.keys().map(|node| model.state.used_on(*node).vcpus);
    assert!(on_nodes.max() <= Some(8), "the first one was placed, the others choose again");
    model.settle(4);
    let mut nodes: Vec<u64> = vms.iter().map(|vm| node_of(&model, *vm)).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, [1, 2, 3]);
}

#[test]
fn a_vm_that_waits_says_why_once() {
    let mut model = Model::new(1);
    let vm = model.create_of("big", 256, 8);
    model.begin(vm, TaskKind::Start);
    let other = model.create("small");
    model.begin(other, TaskKind::Start);
    model.settle(2);
    let before = model.state.next_event;
    model.settle(200);
    assert_eq!(model.state.next_event, before);
}
