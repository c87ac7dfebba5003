//! A runner that is lost while it seals, or that answers no order: its memory is saved if it can
//! be, and nothing is ever taken for granted.

use bellwether_types::{FenceProof, NodeId, VmId};

use super::model::{Fate, Model, Phase};
use super::scenarios::{running, until};
use crate::command::Change;
use crate::task::TaskRequest;
use crate::{Place, StepEvent, TaskKind};

/// Rounds of the model (250 ms) in which patience ends, with some to spare.
const OUT_OF_PATIENCE: usize = 140;

/// A migration whose seal has this fate, and whose source is cut off right then, until the leader
/// has revoked it.
fn lost_in_seal(fate: Fate) -> (Model, VmId, NodeId, u64) {
    let (mut model, vm, node) = running();
    let memory = model.memory(vm).unwrap();
    model.begin(vm, TaskKind::Migrate);
    until(&mut model, vm, "seal");
    let task = model.state.vms[&vm].task.unwrap();
    model.step(task, fate);
    cut(&mut model, node, true);
    model.settle(12);
    assert!(matches!(model.place(vm), Place::Revoked(old) if old.node == node));
    (model, vm, node, memory)
}

fn cut(model: &mut Model, node: NodeId, cut: bool) {
    model.hosts.get_mut(&node).unwrap().connected = !cut;
}

fn orders(model: &mut Model, node: NodeId, heard: bool) {
    model.hosts.get_mut(&node).unwrap().orders = heard;
}

/// The epoch of the runner that is revoked now.
fn revoked(model: &Model, vm: VmId) -> bellwether_types::Epoch {
    let Place::Revoked(old) = model.place(vm) else { panic!("{:?}", model.place(vm)) };
    old.epoch
}

#[test]
fn a_source_that_is_silent_while_it_seals_goes_on_with_its_memory() {
    let (mut model, vm, node, memory) = lost_in_seal(Fate::AnswerLost);
    assert!(model.running(vm).is_empty(), "it stands sealed");
    cut(&mut model, node, false);
    model.settle(12);
    assert_eq!(model.memory(vm), Some(memory), "{:?}", model.place(vm));
    assert_eq!(model.place(vm).runner().unwrap().node, node, "its own memory is the nearest");
    assert_eq!(model.state.vms[&vm].task, None);
}

#[test]
fn one_that_still_seals_when_it_is_back_is_waited_for() {
    for good in [true, false] {
        let (mut model, vm, node, memory) = lost_in_seal(Fate::Slow);
        let epoch = revoked(&model, vm);
        cut(&mut model, node, false);
        model.settle(12);
        assert!(matches!(model.place(vm), Place::Revoked(_)), "nothing is known yet");
        model.end_seal(node, vm, epoch, good);
        model.settle(12);
        assert_eq!(model.memory(vm), Some(memory), "sealed: {good}");
    }
}

#[test]
fn the_memory_of_a_sealed_vmm_that_died_is_loaded_from_its_file() {
    let (mut model, vm, node, memory) = lost_in_seal(Fate::AnswerLost);
    // No lock is held any more, and no other node has room for the VM.
    for other in [1, 2, 3].map(NodeId).into_iter().filter(|other| *other != node) {
        model.apply(Change::Cordon { node: other, cordoned: true });
    }
    let epoch = revoked(&model, vm);
    model.kill_vmm(node, vm, epoch);
    model.settle(40);
    cut(&mut model, node, false);
    model.settle(60);
    assert_eq!(model.memory(vm), Some(memory), "{:?}", model.place(vm));
}

#[test]
fn a_takeover_that_came_first_forfeits_the_memory() {
    let (mut model, vm, node, memory) = lost_in_seal(Fate::AnswerLost);
    let epoch = revoked(&model, vm);
    model.kill_vmm(node, vm, epoch);
    model.settle(20);
    let proof = model.state.vms[&vm].last_proof.clone().unwrap();
    assert!(matches!(proof, FenceProof::Storage { .. }), "{proof}");
    let runner = model.place(vm).runner().unwrap().clone();
    cut(&mut model, node, false);
    model.settle(20);
    assert_eq!(model.place(vm).runner(), Some(&runner), "what is back changes nothing");
    assert!(model.memory(vm).is_some_and(|now| now != memory));
}

/// Every crash on the way: the answer is lost, the order is lost, the agent refuses, the node falls
/// silent again.
#[test]
fn every_step_of_the_recovery_may_fail() {
    for fault in 0..5 {
        let (mut model, vm, node, memory) = lost_in_seal(Fate::AnswerLost);
        cut(&mut model, node, false);
        model.report(node);
        let task = model.state.vms[&vm].task.unwrap();
        while model.state.tasks[&task].step.name() != "choose" {
            model.now += 1_000;
            model.step(task, Fate::Done);
        }
        model.now += 2_000;
        model.report(node);
        match fault {
            0 => drop(model.step(task, Fate::AnswerLost)),
            1 => drop(model.step(task, Fate::Lost)),
            2 => {
                until(&mut model, vm, "claim-back");
                model.step(task, Fate::Refused);
            }
            3 => {
                until(&mut model, vm, "claim-back");
                model.step(task, Fate::AnswerLost);
            }
            _ => {
                model.step(task, Fate::AnswerLost);
                cut(&mut model, node, true);
                model.settle(20);
                cut(&mut model, node, false);
            }
        }
        model.settle(40);
        assert_eq!(model.running(vm).len(), 1, "fault {fault}: {:?}", model.place(vm));
        assert_eq!(model.memory(vm), Some(memory), "fault {fault}");
    }
}

/// A file that its agent does not give, or that the leader does not take, must not hold up the VM.
#[test]
fn a_seal_that_is_refused_is_given_up() {
    let (mut model, vm, node, _) = lost_in_seal(Fate::AnswerLost);
    cut(&mut model, node, false);
    let task = model.state.vms[&vm].task.unwrap();
    for _ in 0..20 {
        model.now += 2_000;
        model.report(node);
        model.step(task, Fate::Refused);
    }
    assert!(!matches!(model.place(vm), Place::Revoked(_)), "{:?}", model.state.tasks[&task]);
    model.settle(20);
    assert_eq!(model.running(vm).len(), 1);
}

#[test]
fn a_late_answer_to_a_seal_of_another_epoch_changes_nothing() {
    let (mut model, vm, node, _) = lost_in_seal(Fate::AnswerLost);
    cut(&mut model, node, false);
    model.settle(12);
    let epoch = model.place(vm).runner().unwrap().epoch;
    cut(&mut model, node, true);
    model.settle(12);
    let task = model.state.vms[&vm].task.unwrap();
    let step_no = model.state.tasks[&task].step_no;
    let file = bellwether_types::StateFileRef {
        path: "/s/f".into(),
        hash: [0; 32],
        epoch: bellwether_types::Epoch(epoch.0 - 1),
        bytes: 1,
    };
    let event = StepEvent::Sealed { file, measures: Default::default() };
    model.apply(Change::Advance { task, step_no, event });
    assert!(matches!(model.place(vm), Place::Revoked(old) if old.epoch == epoch));
}

/// Its task has long ended, with the guest running: then the order to seal comes after all.
#[test]
fn a_seal_that_comes_after_its_task_costs_no_memory() {
    let (mut model, vm, node, memory) = lost_in_seal(Fate::Lost);
    cut(&mut model, node, false);
    model.settle(12);
    assert_eq!(model.memory(vm), Some(memory), "it never stopped");
    let epoch = model.place(vm).runner().unwrap().epoch;
    model.deliver_late_seal();
    model.end_seal(node, vm, epoch, true);
    assert!(model.running(vm).is_empty());
    model.settle(40);
    assert_eq!(model.memory(vm), Some(memory), "{:?}", model.place(vm));
}

#[test]
fn a_sealed_vm_that_is_not_wanted_any_more_is_let_go() {
    let (mut model, vm, node, _) = lost_in_seal(Fate::AnswerLost);
    while !matches!(model.begin(vm, TaskKind::Stop), crate::Outcome::Task(_)) {
        model.settle(1);
    }
    cut(&mut model, node, false);
    model.settle(20);
    assert_eq!((model.place(vm), model.running(vm).len()), (&Place::Stopped, 0));
}

/// The failover once asked such a node for its release for ever.
#[test]
fn a_node_that_answers_no_order_is_taken_over_by_the_lock() {
    let (mut model, vm, node) = running();
    orders(&mut model, node, false);
    let epoch = model.state.vms[&vm].epoch;
    model.kill_vmm(node, vm, epoch);
    model.settle(3 * OUT_OF_PATIENCE);
    let runner = model.place(vm).runner().unwrap();
    assert_ne!(runner.node, node);
    let proof = model.state.vms[&vm].last_proof.clone().unwrap();
    assert!(matches!(proof, FenceProof::Storage { .. }), "{proof}");
    assert_eq!(model.running(vm).len(), 1);
}

#[test]
fn one_whose_vmm_lives_keeps_its_vm_and_its_memory() {
    let (mut model, vm, node, memory) = lost_in_seal(Fate::AnswerLost);
    orders(&mut model, node, false);
    cut(&mut model, node, false);
    model.settle(3 * OUT_OF_PATIENCE);
    assert!(matches!(model.place(vm), Place::Revoked(_)), "its lock is held");
    assert!(model.state.vms[&vm].pending.as_ref().is_some_and(|why| why.contains("locks")));
    assert_eq!(model.hosts[&node].vmms[&(vm, revoked(&model, vm))].phase, Phase::Sealed);
    orders(&mut model, node, true);
    model.settle(OUT_OF_PATIENCE);
    assert_eq!(model.memory(vm), Some(memory));
}

#[test]
fn a_seal_and_a_shutdown_that_have_no_answer_end() {
    for kind in [TaskKind::Migrate, TaskKind::Save, TaskKind::Shutdown] {
        let (mut model, vm, node) = running();
        let memory = model.memory(vm);
        model.begin(vm, kind);
        let task = model.state.vms[&vm].task.unwrap();
        orders(&mut model, node, false);
        model.settle(OUT_OF_PATIENCE);
        let outcome = model.state.tasks[&task].outcome.clone();
        assert!(outcome.is_some_and(|it| it.is_err()), "{kind:?}");
        model.settle(20);
        assert_eq!(model.memory(vm), memory, "{kind:?}: it never stopped");
        assert_eq!(model.state.vms[&vm].task, None, "{kind:?}");
    }
}

/// A VM whose node was cut off and is revoked.
fn revoked_alive() -> (Model, VmId, NodeId, u64) {
    let (mut model, vm, node) = running();
    let memory = model.memory(vm).unwrap();
    cut(&mut model, node, true);
    model.settle(12);
    assert!(matches!(model.place(vm), Place::Revoked(old) if old.node == node));
    (model, vm, node, memory)
}

#[test]
fn what_a_node_hands_over_goes_on_elsewhere_with_its_memory() {
    let (mut model, vm, node, memory) = revoked_alive();
    let epoch = revoked(&model, vm);
    model.hand_over(node, vm, epoch);
    model.settle(200);
    let runner = model.place(vm).runner().unwrap();
    assert_ne!(runner.node, node);
    assert_eq!(model.memory(vm), Some(memory));
    assert_eq!(model.state.vms[&vm].last_proof, Some(FenceProof::HandedOver { node }));
    cut(&mut model, node, false);
    model.settle(40);
    assert_eq!(model.memory(vm), Some(memory), "what comes back takes nothing");
}

#[test]
fn a_handover_that_is_heard_of_is_not_waited_for() {
    let (mut model, vm, node, memory) = revoked_alive();
    let epoch = revoked(&model, vm);
    model.hand_over(node, vm, epoch);
    cut(&mut model, node, false);
    model.settle(200);
    assert_eq!(model.memory(vm), Some(memory), "{:?}", model.place(vm));
}

#[test]
fn a_vm_that_is_to_be_stopped_leaves_what_was_handed_over() {
    let (mut model, vm, node, _) = revoked_alive();
    let epoch = revoked(&model, vm);
    model.apply(Change::BeginTask(TaskRequest {
        vm,
        kind: TaskKind::Stop,
        node: None,
        by: "admin".into(),
    }));
    model.hand_over(node, vm, epoch);
    model.settle(200);
    assert_eq!(*model.place(vm), Place::Stopped);
    assert!(model.running(vm).is_empty());
}
