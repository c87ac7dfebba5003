//! What happens to one VM in the situations that an administrator knows.

use bellwether_types::{FenceProof, NodeId};

use super::model::{Fate, Model, Phase};
use crate::command::{Change, Registration};
use crate::state::Desired;
use crate::{Outcome, Place, RejectionKind, Step, TaskKind};

pub fn running() -> (Model, bellwether_types::VmId, NodeId) {
    let mut model = Model::new(3);
    let vm = model.create("web");
    model.begin(vm, TaskKind::Start);
    model.settle(3);
    let node = model.place(vm).runner().unwrap().node;
    (model, vm, node)
}

/// Carries the VM's task to a step, all going well.
pub fn until(model: &mut Model, vm: bellwether_types::VmId, step: &str) {
    let task = model.state.vms[&vm].task.unwrap();
    while model.state.tasks[&task].step.name() != step {
        assert!(model.step(task, Fate::Done), "stuck at {:?}", model.state.tasks[&task].step);
    }
}

#[test]
fn a_migration_moves_the_vm_and_raises_its_epoch() {
    let (mut model, vm, node) = running();
    let epoch = model.state.vms[&vm].epoch;
    model.begin(vm, TaskKind::Migrate);
    model.settle(2);
    let runner = model.place(vm).runner().unwrap().clone();
    assert!(runner.node != node && runner.epoch > epoch);
    assert_eq!(model.running(vm), [(runner.node, runner.epoch)]);
}

#[test]
fn a_dead_node_is_proven_gone_by_the_lock() {
    let (mut model, vm, node) = running();
    model.power_off(node);
    model.settle(12);
    let runner = model.place(vm).runner().unwrap();
    assert_ne!(runner.node, node);
    let proof = model.state.vms[&vm].last_proof.clone().unwrap();
    assert!(matches!(proof, FenceProof::Storage { holder, .. } if holder == runner.node));
}

#[test]
fn a_silent_node_whose_vm_runs_keeps_it() {
    let (mut model, vm, node) = running();
    model.hosts.get_mut(&node).unwrap().agent = false;
    model.settle(20);
    assert!(matches!(model.place(vm), Place::Revoked(old) if old.node == node));
    assert_eq!(model.running(vm).len(), 1, "it never stopped");
    model.hosts.get_mut(&node).unwrap().agent = true;
    model.settle(20);
    assert_eq!(model.place(vm).runner().unwrap().node, node);
    assert_eq!(model.running(vm).len(), 1);
}

#[test]
fn a_rebooted_node_is_proof_by_itself() {
    let (mut model, vm, node) = running();
    model.power_off(node);
    model.power_on(node);
    model.settle(6);
    assert_eq!(model.running(vm).len(), 1);
    let proof = model.state.vms[&vm].last_proof.clone().unwrap();
    assert!(matches!(proof, FenceProof::Rebooted { .. }), "{proof}");
}

#[test]
fn the_source_takes_its_vm_back_when_the_destination_dies_after_the_seal() {
    let (mut model, vm, node) = running();
    model.begin(vm, TaskKind::Migrate);
    until(&mut model, vm, "load");
    assert!(matches!(model.place(vm), Place::Sealed { .. }));
    let task = model.state.vms[&vm].task.unwrap();
    let destination = model.state.tasks[&task].destination.unwrap();
    model.power_off(destination);
    model.settle(12);
    let runner = model.place(vm).runner().unwrap();
    assert_eq!(runner.node, node, "with its memory");
    assert!(model.state.tasks[&task].outcome.clone().unwrap().is_err());
    assert_eq!(model.running(vm).len(), 1);
}

#[test]
fn when_both_ends_die_after_the_seal_any_node_claims_the_file() {
    let (mut model, vm, node) = running();
    model.begin(vm, TaskKind::Migrate);
    until(&mut model, vm, "load");
    let task = model.state.vms[&vm].task.unwrap();
    let destination = model.state.tasks[&task].destination.unwrap();
    model.power_off(node);
    model.power_off(destination);
    model.settle(40);
    let runner = model.place(vm).runner().unwrap();
    assert!(runner.node != node && runner.node != destination);
    assert_eq!(model.running(vm).len(), 1);
}

#[test]
fn a_lost_answer_to_the_seal_is_asked_for_again() {
    let (mut model, vm, _) = running();
    model.begin(vm, TaskKind::Migrate);
    until(&mut model, vm, "seal");
    let task = model.state.vms[&vm].task.unwrap();
    model.step(task, Fate::AnswerLost);
    assert!(matches!(model.state.tasks[&task].step, Step::Seal(_)));
    model.settle(3);
    assert_eq!(model.state.tasks[&task].outcome, Some(Ok(())));
}

#[test]
fn a_late_result_of_an_earlier_step_changes_nothing() {
    let (mut model, vm, _) = running();
    model.begin(vm, TaskKind::Migrate);
    until(&mut model, vm, "seal");
    let task = model.state.vms[&vm].task.unwrap();
    let before = model.state.clone();
    let event = crate::StepEvent::Prepared;
    assert_eq!(model.apply(Change::Advance { task, step_no: 1, event }), Outcome::Unchanged);
    assert_eq!(model.state, before);
}

#[test]
fn two_tasks_of_one_vm_exclude_each_other() {
    let (mut model, vm, _) = running();
    assert!(matches!(model.begin(vm, TaskKind::Migrate), Outcome::Task(_)));
    let Outcome::Rejected(rejection) = model.begin(vm, TaskKind::Migrate) else { panic!() };
    assert_eq!(rejection.kind, RejectionKind::Conflict);
    assert!(rejection.text.contains("task"), "{rejection}");
}

#[test]
fn save_and_restore_go_through_the_sealed_state() {
    let (mut model, vm, _) = running();
    model.begin(vm, TaskKind::Save);
    model.settle(4);
    assert_eq!(model.state.vms[&vm].desired, Desired::Saved);
    assert!(model.running(vm).is_empty());
    assert!(matches!(model.begin(vm, TaskKind::Stop), Outcome::Rejected(_)));
    model.begin(vm, TaskKind::Restore);
    model.settle(4);
    assert_eq!(model.running(vm).len(), 1);
}

#[test]
fn a_crashed_vmm_is_restarted() {
    let (mut model, vm, node) = running();
    let epoch = model.state.vms[&vm].epoch;
    model.kill_vmm(node, vm, epoch);
    model.settle(20);
    assert_eq!(model.running(vm).len(), 1);
    assert!(model.state.vms[&vm].epoch > epoch);
}

/// A report from before the start shows the VM as starting; it was once taken for its end.
#[test]
fn a_report_older_than_the_start_does_not_end_the_vm() {
    let mut model = Model::new(1);
    let vm = model.create("web");
    model.begin(vm, TaskKind::Start);
    until(&mut model, vm, "activate");
    model.report(NodeId(1));
    let task = model.state.vms[&vm].task.unwrap();
    model.step(task, Fate::Done);
    assert_eq!(model.state.vms[&vm].task, None, "it runs");
    model.plan();
    assert_eq!(model.state.vms[&vm].task, None, "and nothing is to be done about it");
}

#[test]
fn a_drained_node_becomes_empty_and_gets_nothing() {
    let (mut model, vm, node) = running();
    model.apply(Change::Cordon { node, cordoned: true });
    model.settle(20);
    assert_ne!(model.place(vm).runner().unwrap().node, node);
    assert_eq!(model.state.nodes[&node].phase(0).as_str(), "maintenance");
    let all_others: Vec<_> = model.hosts.keys().copied().filter(|other| *other != node).collect();
    for other in all_others {
        model.apply(Change::Cordon { node: other, cordoned: true });
    }
    model.settle(20);
    assert_eq!(model.running(vm).len(), 1, "nowhere to go: it stays");
    let told = |model: &Model| -> Vec<String> {
        let about = model.state.events.iter().filter(|event| event.text.contains("stays on"));
        about.map(|event| event.text.clone()).collect()
    };
    let here = model.place(vm).runner().unwrap().node;
    let name = model.state.node_name(here);
    let events = told(&model);
    assert_eq!(events.len(), 1, "it is said once: {events:?}");
    assert!(events[0].contains(&format!("stays on {name}, which is drained: ")), "{events:?}");
    assert!(events[0].contains("is draining or in maintenance"), "{events:?}");
    model.apply(Change::Cordon { node: here, cordoned: false });
    assert_eq!(model.state.vms[&vm].pending, None);
    model.apply(Change::SetPaused { vm, paused: true });
    model.apply(Change::Cordon { node: here, cordoned: true });
    model.settle(4);
    let events = told(&model);
    assert!(events.len() == 2 && events[1].contains("it is paused; resume it"), "{events:?}");
}

#[test]
fn an_operators_word_is_a_proof_and_a_living_runner_still_wins_by_its_lock() {
    let (mut model, vm, node) = running();
    model.hosts.get_mut(&node).unwrap().connected = false;
    model.settle(8);
    assert_eq!(model.apply(Change::ConfirmDown { node, who: "kim".into() }), Outcome::Done);
    model.settle(30);
    assert_eq!(model.running(vm).len(), 1, "the lock of the living runner holds");
    model.power_off(node);
    model.settle(400);
    assert_ne!(model.place(vm).runner().unwrap().node, node);
    assert_eq!(model.running(vm).len(), 1);
}

#[test]
fn delete_needs_a_stopped_vm_and_leaves_nothing() {
    let (mut model, vm, _) = running();
    assert!(matches!(model.begin(vm, TaskKind::Delete), Outcome::Rejected(_)));
    model.begin(vm, TaskKind::Stop);
    model.settle(4);
    model.begin(vm, TaskKind::Delete);
    model.settle(4);
    assert!(model.state.vms.is_empty());
    assert!(model.hosts.values().all(|host| host.vmms.is_empty()));
    let _ = Phase::Running;
}

fn begin_on(model: &mut Model, vm: bellwether_types::VmId, kind: TaskKind, node: u64) -> Outcome {
    let node = Some(NodeId(node));
    let by = "admin".into();
    model.apply(Change::BeginTask(crate::task::TaskRequest { vm, kind, node, by }))
}

/// A start that no node could serve was once begun again for ever.
#[test]
fn a_persons_start_that_fails_is_not_repeated() {
    let mut model = Model::new(2);
    let vm = model.create("web");
    model.apply(Change::Cordon { node: NodeId(2), cordoned: true });
    begin_on(&mut model, vm, TaskKind::Start, 2);
    model.settle(8);
    assert_eq!(model.state.vms[&vm].desired, Desired::Stopped);
    assert_eq!(model.state.tasks.len(), 1, "one task, one answer");
    assert_eq!(model.place(vm), &Place::Stopped);
}

#[test]
fn a_stop_calls_off_a_start_that_only_waits() {
    let mut model = Model::new(1);
    let vm = model.create("web");
    model.apply(Change::Cordon { node: NodeId(1), cordoned: true });
    model.begin(vm, TaskKind::Start);
    model.settle(3);
    assert!(model.state.vms[&vm].pending.is_some());
    assert_eq!(model.begin(vm, TaskKind::Stop), Outcome::Unchanged);
    assert_eq!(model.state.vms[&vm].task, None);
    model.apply(Change::Cordon { node: NodeId(1), cordoned: false });
    model.settle(3);
    assert_eq!(model.place(vm), &Place::Stopped, "it stays off");
}

/// Seed 605 of the simulator: the delete was refused, and the VM was stopped nevertheless.
#[test]
fn a_delete_that_is_refused_calls_nothing_off() {
    let (mut model, vm, _) = running();
    assert!(matches!(model.begin(vm, TaskKind::Migrate), Outcome::Task(_)));
    let before = model.state.clone();
    assert!(matches!(model.begin(vm, TaskKind::Delete), Outcome::Rejected(_)));
    assert_eq!(model.state, before);
}

#[test]
fn a_stop_during_a_failover_waits_for_the_proof_and_starts_nothing() {
    let (mut model, vm, node) = running();
    model.hosts.get_mut(&node).unwrap().connected = false;
    for other in model.hosts.keys().copied().filter(|other| *other != node).collect::<Vec<_>>() {
        model.apply(Change::Cordon { node: other, cordoned: true });
    }
    model.settle(8);
    assert!(matches!(model.place(vm), Place::Revoked(_)));
    assert!(matches!(model.begin(vm, TaskKind::Stop), Outcome::Task(_)));
    model.power_off(node);
    model.power_on(node);
    model.hosts.get_mut(&node).unwrap().connected = true;
    model.settle(40);
    assert_eq!((model.place(vm), model.running(vm).len()), (&Place::Stopped, 0));
}

#[test]
fn a_late_registration_of_an_ended_boot_is_no_proof() {
    let (mut model, vm, node) = running();
    let old = model.hosts[&node].boot;
    model.power_off(node);
    model.power_on(node);
    model.settle(8);
    let new = model.hosts[&node].boot;
    model.hosts.get_mut(&node).unwrap().boot = old;
    model.register(node);
    assert_eq!(model.state.nodes[&node].boot_id, Some(new), "refused");
    model.hosts.get_mut(&node).unwrap().boot = new;
    model.settle(4);
    assert_eq!(model.running(vm).len(), 1);
}

/// Seed 536 of the simulator: the cluster had never heard of the boot, so it was not among the ended
/// ones, and the living boot was locked out by it.
#[test]
fn a_late_registration_of_a_boot_that_nobody_knew_is_no_news() {
    let (mut model, _, node) = running();
    let new = model.state.nodes[&node].boot_id;
    let unknown = Registration {
        node,
        name: format!("n{node}"),
        boot_id: bellwether_types::BootId::from_uuid(uuid::Uuid::from_u128(77)),
        address: "a".into(),
        agent_port: 1,
        memory_mib: 4_096,
        vcpus: 8,
        version: "0".into(),
        replaces: None,
    };
    let late = Change::RegisterNode(unknown.clone());
    assert!(matches!(model.apply(late), Outcome::Rejected(_)));
    assert_eq!(model.state.nodes[&node].boot_id, new);
    let living = Change::RegisterNode(Registration { replaces: new, ..unknown.clone() });
    assert_eq!(model.apply(living), Outcome::Done);
    assert_eq!(model.state.nodes[&node].boot_id, Some(unknown.boot_id));
}

#[test]
fn a_report_that_was_held_up_is_not_news() {
    let (mut model, _, node) = running();
    let now = model.observed.nodes[&node].clone();
    let stale = crate::observe::NodeReport { nonce: now.nonce - 1, vms: vec![], ..now.clone() };
    assert!(!model.observed.take(node, stale, &model.state));
    assert_eq!(model.observed.nodes[&node], now);
}

#[test]
fn a_vm_that_keeps_crashing_is_restarted_more_and_more_slowly() {
    let (mut model, vm, _) = running();
    for _ in 0..4 {
        let runner = model.place(vm).runner().unwrap().clone();
        model.kill_vmm(runner.node, vm, runner.epoch);
        model.settle(60);
    }
    assert!(model.state.vms[&vm].failures >= 3, "{}", model.state.vms[&vm].failures);
}

#[test]
fn a_move_to_a_named_node_that_fails_late_still_ends_with_the_vm_running() {
    let (mut model, vm, node) = running();
    let target = NodeId(node.0 % 3 + 1);
    begin_on(&mut model, vm, TaskKind::Migrate, target.0);
    until(&mut model, vm, "activate");
    // The source lets go, and then the destination refuses to run the VM.
    let task = model.state.vms[&vm].task.unwrap();
    model.power_off(node);
    model.step(task, Fate::Refused);
    model.apply(Change::Cordon { node: target, cordoned: true });
    model.settle(40);
    assert_eq!(model.running(vm).len(), 1, "{:?}", model.place(vm));
    assert_eq!(model.state.vms[&vm].desired, Desired::Running);
}

/// Carries a shutdown to where the guest is waited for.
fn asked(model: &mut Model, vm: bellwether_types::VmId) -> bellwether_types::TaskId {
    model.begin(vm, TaskKind::Shutdown);
    let task = model.state.vms[&vm].task.unwrap();
    let step_no = model.state.tasks[&task].step_no;
    let event = crate::StepEvent::Asked { until: model.now + 60_000 };
    model.apply(Change::Advance { task, step_no, event });
    task
}

/// A VMM that its agent does not even name any more once kept the task waiting for ever.
#[test]
fn a_guest_that_is_gone_without_a_trace_has_shut_down() {
    let (mut model, vm, node) = running();
    let epoch = model.state.vms[&vm].epoch;
    let task = asked(&mut model, vm);
    model.settle(2);
    assert_eq!(model.state.tasks[&task].step.name(), "await-guest");
    model.kill_vmm(node, vm, epoch);
    model.hosts.get_mut(&node).unwrap().vmms.clear();
    model.settle(3);
    assert_eq!(model.state.tasks[&task].outcome, Some(Ok(())));
    assert_eq!(model.place(vm), &Place::Stopped);
}

#[test]
fn a_leader_with_another_clock_gives_a_guest_its_time_anew() {
    for clock in [0, 500_000, 5_000_000] {
        let (mut model, vm, _) = running();
        let task = asked(&mut model, vm);
        // The next leader's clock is far behind, somewhat behind, or far ahead.
        model.now = clock;
        model.settle(120);
        assert_eq!(model.state.tasks[&task].outcome, None, "half a minute has passed");
        model.settle(130);
        let outcome = model.state.tasks[&task].outcome.clone().unwrap();
        assert!(outcome.unwrap_err().contains("did not shut down in time"));
        assert_eq!(model.running(vm).len(), 1);
    }
}

#[test]
fn a_delete_during_a_failover_says_what_is_in_the_way() {
    let (mut model, vm, node) = running();
    model.hosts.get_mut(&node).unwrap().connected = false;
    for other in model.hosts.keys().copied().filter(|other| *other != node).collect::<Vec<_>>() {
        model.apply(Change::Cordon { node: other, cordoned: true });
    }
    model.settle(8);
    let Outcome::Rejected(rejection) = model.begin(vm, TaskKind::Delete) else { panic!() };
    assert_eq!(rejection.kind, RejectionKind::Conflict);
    assert!(rejection.text.contains("not proven") && rejection.text.contains("vm stop"));
    assert_eq!(model.state.vms[&vm].desired, Desired::Running, "nothing has changed");
}
