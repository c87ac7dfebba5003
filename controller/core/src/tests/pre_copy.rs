//! The step in which memory is written while the guest runs: whatever happens in it, the guest goes
//! on, and what was wanted can be tried again.

use bellwether_types::{NodeId, PreCopy, VmId, VmPatch};

use super::model::{Fate, Model};
use super::scenarios::{running, until};
use crate::command::Change;
use crate::saga::{self, Action};
use crate::task::Measures;
use crate::{Place, Step, StepEvent, Task, TaskKind};

/// A task that has come to the step.
fn copying(kind: TaskKind) -> (Model, VmId, NodeId, u64) {
    let (mut model, vm, node) = running();
    let memory = model.memory(vm).unwrap();
    model.begin(vm, kind);
    until(&mut model, vm, "pre-copy");
    (model, vm, node, memory)
}

fn outcome(model: &Model, kind: TaskKind) -> Option<Result<(), String>> {
    let mut tasks = model.state.tasks.values().filter(|task| task.kind == kind);
    tasks.next_back().and_then(|task| task.outcome.clone())
}

#[test]
fn a_move_and_a_save_pre_copy_and_then_seal() {
    for kind in [TaskKind::Migrate, TaskKind::Save] {
        let (mut model, vm, node, memory) = copying(kind);
        assert!(matches!(model.place(vm), Place::Runner(runner) if runner.node == node));
        until(&mut model, vm, "seal");
        model.settle(20);
        assert_eq!(outcome(&model, kind), Some(Ok(())), "{kind:?}");
        if kind == TaskKind::Migrate {
            assert_eq!(model.memory(vm), Some(memory));
        }
    }
}

#[test]
fn a_vm_that_is_never_pre_copied_is_sealed_at_once() {
    for kind in [TaskKind::Migrate, TaskKind::Save] {
        let (mut model, vm, _) = running();
        let patch = VmPatch { pre_copy: Some(PreCopy::Never), ..VmPatch::default() };
        model.apply(Change::SetVm { vm, patch });
        model.begin(vm, kind);
        until(&mut model, vm, "seal");
        let task = model.state.vms[&vm].task.unwrap();
        let expected = if kind == TaskKind::Migrate { 3 } else { 1 };
        assert_eq!(model.state.tasks[&task].step_no, expected, "{kind:?}");
    }
}

#[test]
fn one_that_is_refused_leaves_the_guest_as_it_was() {
    let (mut model, vm, node, memory) = copying(TaskKind::Migrate);
    let task = model.state.vms[&vm].task.unwrap();
    let to = model.state.tasks[&task].step.attempt().unwrap();
    model.step(task, Fate::Refused);
    assert!(matches!(model.state.tasks[&task].step, Step::Abandon { .. }));
    model.settle(8);
    assert!(outcome(&model, TaskKind::Migrate).unwrap().is_err());
    assert_eq!(model.place(vm).runner().unwrap().node, node);
    assert_eq!(model.memory(vm), Some(memory), "it never stopped");
    assert!(!model.hosts[&to.node].vmms.contains_key(&(vm, to.epoch)), "nothing is left there");
    model.begin(vm, TaskKind::Migrate);
    model.settle(20);
    assert_eq!(outcome(&model, TaskKind::Migrate), Some(Ok(())), "a new attempt succeeds");
}

#[test]
fn a_destination_that_dies_meanwhile_costs_the_guest_nothing() {
    for whole_node in [true, false] {
        let (mut model, vm, node, memory) = copying(TaskKind::Migrate);
        let task = model.state.vms[&vm].task.unwrap();
        let to = model.state.tasks[&task].step.attempt().unwrap();
        match whole_node {
            true => model.power_off(to.node),
            false => model.kill_vmm(to.node, vm, to.epoch),
        }
        model.settle(40);
        assert!(outcome(&model, TaskKind::Migrate).unwrap().is_err());
        assert_eq!(model.place(vm).runner().unwrap().node, node);
        assert_eq!(model.memory(vm), Some(memory), "node: {whole_node}");
    }
}

#[test]
fn a_source_that_dies_meanwhile_is_failed_over() {
    let (mut model, vm, node, _) = copying(TaskKind::Migrate);
    model.power_off(node);
    model.settle(60);
    assert_eq!(model.running(vm).len(), 1);
    assert_ne!(model.place(vm).runner().unwrap().node, node);
}

#[test]
fn an_order_without_an_answer_is_given_again_but_not_for_ever() {
    let (mut model, vm, _, memory) = copying(TaskKind::Migrate);
    let task = model.state.vms[&vm].task.unwrap();
    for _ in 0..200 {
        model.now += 250;
        if model.state.tasks[&task].step.name() == "pre-copy" {
            model.step(task, Fate::AnswerLost);
        }
    }
    model.settle(20);
    assert!(outcome(&model, TaskKind::Migrate).unwrap().is_err());
    assert_eq!(model.memory(vm), Some(memory));
}

/// Before there was this step, `Sealed` and `Failed` followed upon `Prepared`.
#[test]
fn a_log_of_before_it_means_the_same() {
    let (mut model, vm, _, _) = copying(TaskKind::Migrate);
    let task = model.state.vms[&vm].task.unwrap();
    let step_no = model.state.tasks[&task].step_no;
    let epoch = model.state.vms[&vm].place.runner().unwrap().epoch;
    let file =
        bellwether_types::StateFileRef { path: "/s/f".into(), hash: [0; 32], epoch, bytes: 1 };
    let event = StepEvent::Sealed { file, measures: Measures::new() };
    model.apply(Change::Advance { task, step_no, event });
    assert!(matches!(model.state.tasks[&task].step, Step::Load(_)));
    assert!(matches!(model.place(vm), Place::Sealed { .. }));
}

#[test]
fn the_answer_of_a_node_that_is_lost_is_not_waited_for() {
    let (mut model, vm, node, _) = copying(TaskKind::Migrate);
    let task = model.state.tasks[&model.state.vms[&vm].task.unwrap()].clone();
    let is_overtaken = |model: &Model, task: &Task| {
        saga::is_overtaken(&model.state, &model.observed, task, model.now)
    };
    let behind = Task { step_no: task.step_no + 1, ..task.clone() };
    assert!(!is_overtaken(&model, &task));
    let boot_id = model.state.nodes[&node].boot_id.unwrap();
    model.apply(Change::NodeUnknown { node, boot_id });
    assert!(is_overtaken(&model, &task));
    assert!(!is_overtaken(&model, &behind), "its step has yet to be committed");
    model.step(task.id, Fate::Done);
    assert!(model.state.tasks[&task.id].outcome.is_some(), "nothing was asked of the node");
    assert!(is_overtaken(&model, &task), "it has passed");
}

/// Nothing runs, so there is nothing to wait for but the VM itself.
#[test]
fn an_attempt_on_a_node_that_is_lost_is_left_behind_at_once() {
    let (mut model, vm, node) = running();
    let boot_id = model.state.nodes[&node].boot_id.unwrap();
    model.apply(Change::NodeUnknown { node, boot_id });
    model.plan();
    until(&mut model, vm, "take-over");
    let task = model.state.vms[&vm].task.unwrap();
    let attempt = model.state.tasks[&task].step.attempt().unwrap();
    let boot_id = model.state.nodes[&attempt.node].boot_id.unwrap();
    model.apply(Change::NodeUnknown { node: attempt.node, boot_id });
    model.step(task, Fate::Done);
    let current = model.state.tasks[&task].clone();
    assert!(matches!(current.step, Step::Abandon { .. }), "{:?}", current.step);
    let next = saga::next_action(&model.state, &model.observed, &current, model.now);
    assert!(matches!(next, Action::Advance(StepEvent::Failed { .. })), "{next:?}");
}
