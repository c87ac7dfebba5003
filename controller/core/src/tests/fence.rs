//! The proofs `watchdog` and `power`: when they exist, and when they do not.

use bellwether_types::{Arbiter, FenceProof, NodeId, VmId, WatchdogBound, WatchdogTiming};

use super::model::Model;
use crate::command::Change;
use crate::contact::{Contact, Next};
use crate::fence::{NodeWatchdog, Promise, Vigil, yields};
use crate::power::{PowerSwitch, SwitchAnswer, SwitchStep, is_awaited, switch_step, to_switch_off};
use crate::saga::{Action, next_action, own_action};
use crate::{Outcome, Place, StepEvent, TaskKind};

const BOUND: WatchdogBound = WatchdogBound { watchdog_ms: 5_000, pet_ms: 1_000, stop_ms: 1_000 };
const WAIT_MS: u64 = 10_000;

fn vigil(leading_since: u64) -> Vigil {
    Vigil { timing: Some(WatchdogTiming::default()), lease_ms: 3_000, leading_since }
}

fn promise(model: &mut Model, node: NodeId, nonce: u64, promise: Promise) -> Outcome {
    let boot_id = model.hosts[&node].boot;
    let said = NodeWatchdog { boot_id, nonce, promise };
    model.apply(Change::NoteWatchdog { node, said })
}

/// A VM that runs on a node, where every node has promised this.
fn running(arbiter: Arbiter, promised: &Promise) -> (Model, VmId, NodeId) {
    let mut model = Model::new(3);
    model.observed.vigil = Some(vigil(0));
    for node in model.hosts.keys().copied().collect::<Vec<_>>() {
        promise(&mut model, node, 1, promised.clone());
    }
    let vm = model.create("web");
    if arbiter == Arbiter::Lease {
        // As `DefineVmUnder` makes one.
        let (mut spec, id) =
            (model.state.vms[&vm].spec.clone(), VmId::from_uuid(uuid::Uuid::from_u128(77)));
        spec.name = "leased".into();
        let rules = Default::default();
        let made = model.apply(Change::DefineVmUnder { id, spec, rules, arbiter });
        assert_eq!(made, Outcome::Done);
        model.begin(id, TaskKind::Start);
        model.settle(3);
        let node = model.place(id).runner().unwrap().node;
        return (model, id, node);
    }
    model.begin(vm, TaskKind::Start);
    model.settle(3);
    let node = model.place(vm).runner().unwrap().node;
    (model, vm, node)
}

/// Runs until the VM has a proof; how long after the last word of its node that was.
fn until_proven(model: &mut Model, vm: VmId, node: NodeId) -> u64 {
    for _ in 0..400 {
        model.settle(1);
        if model.state.vms[&vm].last_proof.is_some() {
            return model.now - model.observed.nodes[&node].heard_at;
        }
    }
    panic!("no proof within 100 s: {:?}", model.state.vms[&vm].pending);
}

#[test]
fn a_silent_node_with_a_watchdog_is_proven_gone_when_the_time_has_passed_and_not_before() {
    let (mut model, vm, node) = running(Arbiter::Lease, &Ok(BOUND));
    model.power_off(node);
    let waited = until_proven(&mut model, vm, node);
    assert!((WAIT_MS..WAIT_MS + 1_500).contains(&waited), "after {waited} ms");
    let proof = model.state.vms[&vm].last_proof.clone().unwrap();
    assert!(matches!(proof, FenceProof::Watchdog { waited_ms } if waited_ms >= WAIT_MS), "{proof}");
    model.settle(8);
    assert_ne!(model.place(vm).runner().unwrap().node, node);
}

#[test]
fn a_new_leader_waits_anew() {
    let (mut model, vm, node) = running(Arbiter::Lease, &Ok(BOUND));
    model.power_off(node);
    model.settle(36);
    assert!(matches!(model.place(vm), Place::Revoked(_)));
    // It has heard nobody, and an earlier leader may have granted until it was elected.
    let elected = model.now;
    model.observed.vigil = Some(vigil(elected));
    model.observed.nodes.remove(&node);
    for _ in 0..39 {
        model.settle(1);
        assert_eq!(model.state.vms[&vm].last_proof, None, "{} ms", model.now - elected);
    }
    model.settle(8);
    assert!(matches!(model.state.vms[&vm].last_proof, Some(FenceProof::Watchdog { .. })));
}

#[test]
fn without_an_armed_hardware_watchdog_only_a_person_can_tell() {
    for promised in [Err("no watchdog is armed".to_owned()), Ok(BOUND)] {
        let (mut model, vm, node) = running(Arbiter::Lease, &promised);
        if promised.is_ok() {
            // It was taken back with a later renewal.
            assert_eq!(
                promise(&mut model, node, 2, Err("no watchdog is armed".into())),
                Outcome::Done
            );
        }
        model.power_off(node);
        model.settle(400);
        assert!(matches!(model.place(vm), Place::Revoked(_)), "{promised:?}");
        let pending = model.state.vms[&vm].pending.clone().unwrap();
        assert!(
            pending.contains("yields no proof") && pending.contains("confirm-down"),
            "{pending}"
        );
        model.apply(Change::ConfirmDown { node, who: "ann".into() });
        model.settle(12);
        let proof = model.state.vms[&vm].last_proof.clone().unwrap();
        assert!(matches!(proof, FenceProof::Operator { .. }), "{proof}");
        assert_ne!(model.place(vm).runner().unwrap().node, node);
    }
}

#[test]
fn a_watchdog_that_the_waiting_time_does_not_cover_proves_nothing() {
    let slow = WatchdogBound { watchdog_ms: 30_000, ..BOUND };
    let (mut model, vm, node) = running(Arbiter::Lease, &Ok(slow));
    let told = yields(&model.observed, &model.state.nodes[&node], 1_500);
    let watchdog = told.iter().find(|it| it.proof == "watchdog").unwrap();
    assert!(watchdog.after_ms.is_none() && watchdog.text.contains("W >= (1+d)"), "{watchdog:?}");
    model.power_off(node);
    model.settle(400);
    let pending = model.state.vms[&vm].pending.clone().unwrap();
    assert!(pending.contains("W >= (1+d)") && pending.contains("Twd=30000"), "{pending}");
    assert_eq!(model.state.vms[&vm].last_proof, None);
}

/// Its node's watchdog is petted for it, lease or not.
#[test]
fn time_proves_nothing_about_a_vm_under_the_storage_arbiter() {
    let (mut model, vm, node) = running(Arbiter::Storage, &Ok(BOUND));
    model.hosts.get_mut(&node).unwrap().agent = false;
    model.settle(400);
    assert!(matches!(model.place(vm), Place::Revoked(_)));
    assert_eq!(model.state.vms[&vm].last_proof, None);
    assert_eq!(model.running(vm).len(), 1);
}

#[test]
fn a_node_that_is_heard_again_in_time_keeps_its_vm() {
    let (mut model, vm, node) = running(Arbiter::Lease, &Ok(BOUND));
    model.hosts.get_mut(&node).unwrap().connected = false;
    model.settle(30);
    assert!(matches!(model.place(vm), Place::Revoked(_)));
    model.hosts.get_mut(&node).unwrap().connected = true;
    model.settle(8);
    assert_eq!(model.place(vm).runner().unwrap().node, node);
    assert_eq!(model.state.vms[&vm].last_proof, None);
}

#[test]
fn a_promise_is_committed_before_anything_is_granted_on_it_and_a_late_one_says_nothing() {
    let (mut model, _, node) = running(Arbiter::Storage, &Ok(BOUND));
    let boot = model.hosts[&node].boot;
    let mut renewal =
        Contact::renewal(node, boot, 9, vec![]).with_promise(Err("disarmed".to_owned()));
    renewal.confirmed(4);
    assert!(matches!(renewal.next(&model.state, 5), Next::Note { .. }));
    let Next::Commit(change) = renewal.next(&model.state, 5) else { panic!("not committed") };
    assert_eq!(model.apply(change), Outcome::Done);
    assert!(matches!(renewal.next(&model.state, 5), Next::Done { .. }));
    // One that was sent before it comes late.
    assert_eq!(promise(&mut model, node, 8, Ok(BOUND)), Outcome::Unchanged);
    let known = model.state.nodes[&node].watchdog.clone().unwrap();
    assert_eq!(known.promise, Err("disarmed".to_owned()));
    // A node without any says so with every renewal, and nothing is written for that.
    let mut again = Contact::renewal(node, boot, 10, vec![]).with_promise(Err("disarmed".into()));
    again.confirmed(4);
    again.next(&model.state, 5);
    assert!(matches!(again.next(&model.state, 5), Next::Done { .. }));
}

fn with_switches(model: &mut Model) {
    let nodes: Vec<NodeId> = model.hosts.keys().copied().collect();
    let switch = || PowerSwitch::new("fence_ipmilan".into());
    model.observed.switches = nodes.into_iter().map(|node| (node, switch())).collect();
}

fn wanted(model: &Model) -> Vec<NodeId> {
    let all = to_switch_off(&model.state, &model.observed, model.now);
    all.into_iter().map(|(node, _)| node).collect()
}

fn switched_off(model: &mut Model, node: NodeId) -> Outcome {
    let boot_id = model.state.nodes[&node].boot_id.unwrap();
    model.apply(Change::SwitchedOff { node, boot_id, device: "fence_ipmilan".into() })
}

const NO_WATCHDOG: &str = "no watchdog is armed";

#[test]
fn a_silent_host_is_switched_off_and_its_vm_runs_elsewhere_on_that_proof() {
    let (mut model, vm, node) = running(Arbiter::Lease, &Err(NO_WATCHDOG.into()));
    with_switches(&mut model);
    model.settle(4);
    assert_eq!(wanted(&model), []);
    // A host that is heard from is not switched off on anybody's word.
    assert_eq!(switched_off(&mut model, node), Outcome::Unchanged);
    model.power_off(node);
    model.settle(40);
    assert_eq!(wanted(&model), [node]);
    assert_eq!(model.state.vms[&vm].last_proof, None);
    let pending = model.state.vms[&vm].pending.clone().unwrap();
    assert!(pending.contains("fence_ipmilan switches"), "{pending}");
    // That is no choice of a node, which is left to the rounds: the task's own executor says it.
    model.state.vms.get_mut(&vm).unwrap().pending = None;
    let task = &model.state.tasks[&model.state.vms[&vm].task.unwrap()];
    let action = next_action(&model.state, &model.observed, task, u64::MAX);
    assert!(matches!(action, Action::Advance(StepEvent::NoNode { .. })), "{action:?}");
    assert_eq!(own_action(&model.state, &model.observed, task, u64::MAX), action);
    model.observed.switches.get_mut(&node).unwrap().is_switching = true;
    assert_eq!(wanted(&model), []);

    // Whoever is about to switch it off looks once more: it may be another boot by then, or proven.
    let boot = model.state.nodes[&node].boot_id.unwrap();
    let old = bellwether_types::BootId::from_uuid(uuid::Uuid::from_u128(99));
    assert!(is_awaited(&model.state, node, boot) && !is_awaited(&model.state, node, old));
    let device = "fence_ipmilan".to_owned();
    let of_old = model.apply(Change::SwitchedOff { node, boot_id: old, device });
    assert_eq!(of_old, Outcome::Unchanged);
    assert_eq!(switched_off(&mut model, node), Outcome::Done);
    assert!(!is_awaited(&model.state, node, boot));
    model.settle(12);
    let proof = model.state.vms[&vm].last_proof.clone().unwrap();
    assert!(matches!(proof, FenceProof::Power { .. }), "{proof}");
    assert_ne!(model.place(vm).runner().unwrap().node, node);
}

#[test]
fn a_switch_that_fails_is_told_of_and_asked_again_after_a_pause() {
    let (mut model, vm, node) = running(Arbiter::Lease, &Err(NO_WATCHDOG.into()));
    with_switches(&mut model);
    let failed = (model.now, Err("no route to host".to_owned()));
    model.observed.switches.get_mut(&node).unwrap().said = Some(failed);
    let told = yields(&model.observed, &model.state.nodes[&node], 1_500);
    let power = told.iter().find(|it| it.proof == "power").unwrap();
    assert!(power.after_ms.is_none() && power.text.contains("no route to host"), "{power:?}");
    model.power_off(node);
    model.settle(80);
    let asked = (model.now, Err("no route to host".to_owned()));
    model.observed.switches.get_mut(&node).unwrap().said = Some(asked);
    model.settle(8);
    assert_eq!(wanted(&model), []);
    let pending = model.state.vms[&vm].pending.clone().unwrap();
    assert!(
        pending.contains("promised no watchdog")
            && pending.contains("fence_ipmilan: no route to host"),
        "{pending}"
    );
    model.settle(80);
    assert_eq!(wanted(&model), [node]);
    assert_eq!(model.state.vms[&vm].last_proof, None);
}

#[test]
fn only_a_status_of_off_behind_an_off_proves_anything() {
    let said = |is_on, after_ms| switch_step(SwitchAnswer::Status { is_on }, after_ms, 5_000);
    assert_eq!(switch_step(SwitchAnswer::Off, 0, 5_000), SwitchStep::AskStatus);
    assert_eq!(said(false, 9_000), SwitchStep::Proven);
    assert_eq!(said(true, 4_999), SwitchStep::AskAgain);
    assert_eq!(said(true, 5_000), SwitchStep::StillOn);
}

#[test]
fn no_host_is_switched_off_for_a_vm_under_the_storage_arbiter() {
    let (mut model, vm, node) = running(Arbiter::Storage, &Err(NO_WATCHDOG.into()));
    with_switches(&mut model);
    model.hosts.get_mut(&node).unwrap().agent = false;
    model.settle(100);
    assert!(matches!(model.place(vm), Place::Revoked(_)));
    assert_eq!(wanted(&model), []);
}
