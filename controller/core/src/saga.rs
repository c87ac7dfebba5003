//! The sagas: which step follows which, what each step does outside, and what a fault leads to.
//!
//! One machine serves every kind of task; the VM's [`Place`](crate::state::Place) decides the way:
//!
//! ```text
//!            +------------------ retry ------------------------------+
//!            v                                                       |
//!   Choose --> Prepare --+-- place Stopped, or a proof exists --> Activate --> done
//!                        |                                          ^  |never ran: Abandon
//!                        +-- place Revoked --> TakeOver -- Held ----+  |may have run: Reap
//!                        |                        \-- Busy --> Abandon, then Choose
//!                        +-- place Sealed ---> Load ----------------+
//!                        |                      ^  \-- fails, source alive --> ClaimBack --> failed
//!                        +-- place Runner --> PreCopy --> Seal         (the VM goes on at the source)
//!                                             \-- fails --> Abandon --> failed (it never stopped)
//!
//!   save:      PreCopy --> Seal --> Release(source) --> done      stop:   Release --> done
//!   shutdown:  AskGuest --> AwaitGuest --> Release --> done              delete: Purge --> gone
//! ```
//!
//! A failover begins in Choose with the place Revoked, and what the old runner's node says decides
//! ([`prove`]); the first line that fits is taken:
//!
//! ```text
//!   node rebooted, or a person's word ------> Proven: place Stopped -----------> Choose
//!   node back, guest runs ------------------> Reinstated: place Runner --------> done
//!   node back, it seals, or cannot tell ----> wait for its next report
//!   node back, sealed ----------------------> Seal again: its answer is the file
//!        answered: place Sealed(file) --> ClaimBack --> done, with its memory
//!                                            \-- fails --> Choose: Prepare, Load elsewhere
//!        refused: as the next line
//!   node back, VMM ended or absent ---------> Release: place Stopped ----------> Choose
//!   node silent, VM under the lease arbiter -> wait for `watchdog` or `power`, or for a person
//!   node silent ----------------------------> Prepare, TakeOver elsewhere
//!   an order of these has no answer for 30 s --> Prepare, TakeOver elsewhere
//! ```
//!
//! A runner that was sealed stays sealed: only a claim back makes it run again, and none is ordered
//! under its epoch before `Sealed` is committed. So the answer to a second Seal is as good as the
//! first one, however late, as long as the place is `Revoked` with that very epoch: whoever ran
//! since then has made the place his own (`Held`, `Proven`) before, and the file is forfeited. A
//! crash of anybody on the way leaves the place Revoked (it is asked again) or Sealed (the claim
//! back, or another node's Load, is ordered again).
//!
//! PreCopy changes nothing of who may run the VM, and nothing depends on it: a seal without it
//! writes all memory. A VM's rule leaves it out.
//!
//! Commits that change who may run the VM are made by these transitions and by nothing else:
//! `Sealed` (Runner or Revoked to Sealed), `Loaded`, `Held`, and `Prepared` with a proof (to Runner
//! of the attempt), `ClaimedBack`'s step (to Runner of the source), `Released` and `Proven` (to
//! Stopped), `RunnerLost` (Runner to Revoked), and `Reinstated` (Revoked to Runner).
//!
//! A crash of the leader between two steps is harmless: the order of a step is idempotent, and
//! the next leader gives it again. A result that arrives late names a `step_no` that has passed
//! and is ignored.

use std::cmp::Ordering;

use bellwether_types::{Arbiter, Epoch, FenceProof, NodeId, PreCopy, StateFileRef, VmState};

use crate::apply::is_due;
use crate::fence::{self, Outlook};
use crate::observe::{Observed, Seen};
use crate::planner;
use crate::reconcile::BY_CLUSTER;
use crate::state::{Desired, Liveness, Node, Place, Runner, State, Vm};
use crate::task::{Attempt, Measures, Retry, Step, StepEvent, Task, TaskKind, Then};

/// What the leader's executor does for a task now.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// The result is known without going outside.
    Advance(StepEvent),
    /// Nothing to do before this time, or before something is reported.
    Wait {
        until: u64,
    },
    Prepare(Attempt),
    TakeOver(Attempt),
    /// Write memory on the runner while the guest runs, and load it at the attempt.
    PreCopy {
        source: Runner,
        load_at: Option<Attempt>,
    },
    /// Seal on the runner; then load at the attempt while the seal is being committed.
    Seal {
        source: Runner,
        load_at: Option<Attempt>,
    },
    Load {
        attempt: Attempt,
        file: StateFileRef,
    },
    /// Let the source go and run the attempt, both at once: the locks order them.
    Activate {
        attempt: Attempt,
        release: Option<Runner>,
        /// What the guest goes on from; it boots without one.
        file: Option<StateFileRef>,
    },
    ClaimBack {
        source: Attempt,
        sealed: Epoch,
        file: StateFileRef,
    },
    /// Release an attempt; what it says does not matter.
    Abandon(Attempt),
    /// Release a runner; its answer is the proof.
    Release(Attempt),
    AskGuest(Runner),
    Purge(NodeId),
}

/// Decides what a task does next. Pure: the same state, reports and time give the same answer.
pub fn next_action(state: &State, observed: &Observed, task: &Task, now: u64) -> Action {
    let Some(vm) = state.vms.get(&task.vm) else {
        return Action::Wait { until: u64::MAX };
    };
    if let Some(lost) = lost_runner(state, vm) {
        return Action::Advance(StepEvent::RunnerLost { node: lost.node });
    }
    if !is_due(task.retry_at, now) {
        return Action::Wait { until: task.retry_at };
    }
    match &task.step {
        Step::Choose => choose(state, observed, task, vm, now),
        Step::Prepare(attempt) => on_living(state, *attempt, Action::Prepare(*attempt)),
        Step::TakeOver(attempt) => on_living(state, *attempt, Action::TakeOver(*attempt)),
        Step::PreCopy(load_at) => pre_copy(state, vm, *load_at),
        Step::Seal(load_at) => seal(vm, *load_at),
        Step::Load(attempt) => load(state, vm, *attempt),
        Step::Activate { attempt, from, file } => {
            Action::Activate { attempt: *attempt, release: from.clone(), file: file.clone() }
        }
        Step::Reap { attempt, .. } => Action::Release(*attempt),
        Step::ClaimBack { source, sealed, file, .. } => {
            Action::ClaimBack { source: *source, sealed: *sealed, file: file.clone() }
        }
        Step::Abandon { attempt, .. } => abandon(state, vm, *attempt),
        Step::AskGuest => ask_guest(vm),
        Step::AwaitGuest { .. } => await_guest(observed, vm),
        Step::Release(runner) => release(state, observed, task, vm, runner),
        Step::Purge(node) => Action::Purge(*node),
    }
}

/// The VM's runner, if its node is not heard from or has rebooted: no step can count on it.
fn lost_runner<'a>(state: &State, vm: &'a Vm) -> Option<&'a Runner> {
    let runner = vm.place.runner()?;
    match state.nodes.get(&runner.node) {
        Some(node) if node.is_online() && node.boot_id == Some(runner.boot_id) => None,
        _ => Some(runner),
    }
}

/// Whether the state says what follows a step whose order is under way: its node is lost, or the step
/// has passed already. To wait for the connection to break would only cost time; what the order did
/// is found out as after any answer that was lost.
pub fn is_overtaken(state: &State, observed: &Observed, task: &Task, now: u64) -> bool {
    let Some(current) = state.tasks.get(&task.id) else { return true };
    match current.step_no.cmp(&task.step_no) {
        // It was proposed behind a step whose commit is under way.
        Ordering::Less => false,
        Ordering::Greater => true,
        Ordering::Equal => matches!(
            next_action(state, observed, current, now),
            Action::Advance(StepEvent::RunnerLost { .. } | StepEvent::Failed { .. })
        ),
    }
}

/// An order to a node that is not online would only run into a timeout.
fn on_living(state: &State, attempt: Attempt, action: Action) -> Action {
    match state.nodes.get(&attempt.node).is_some_and(Node::is_online) {
        true => action,
        false => Action::Advance(StepEvent::Failed {
            error: format!("{} is not online any more", state.node_name(attempt.node)),
            retry: Retry::OtherNode,
        }),
    }
}

fn choose(state: &State, observed: &Observed, task: &Task, vm: &Vm, now: u64) -> Action {
    if task.kind == TaskKind::Delete {
        return match state.nodes.values().find(|node| node.is_online()) {
            Some(node) => Action::Advance(StepEvent::Chosen { node: node.id }),
            None => Action::Advance(StepEvent::NoNode { reason: "no node is online".into() }),
        };
    }
    if let (Place::Revoked(old), None) = (&vm.place, &task.proof)
        && let Some(action) = prove(state, observed, task, vm, old, now)
    {
        return action;
    }
    match place(state, &planner::Wish::of(task, vm)) {
        StepEvent::NoNode { reason } if is_known(task, vm, &reason) => {
            Action::Wait { until: u64::MAX }
        }
        event => Action::Advance(event),
    }
}

/// Whether a task waits for a node and nothing else, so that the leader's next round of planning
/// can find one for it.
pub(crate) fn needs_node(state: &State, observed: &Observed, task: &Task, vm: &Vm) -> bool {
    task.is_waiting()
        && lost_runner(state, vm).is_none()
        && !is_about_proof(state, observed, task, vm)
}

/// Whether the old runner has to be dealt with before a node is of any use.
fn is_about_proof(state: &State, observed: &Observed, task: &Task, vm: &Vm) -> bool {
    match (&vm.place, &task.proof) {
        // What time it is does not matter: whether a proof is waited for, or is there.
        (Place::Revoked(old), None) => prove(state, observed, task, vm, old, 0).is_some(),
        _ => false,
    }
}

/// What the executor of a task does next: [`next_action`], but for the choice of a node. That is left
/// to the leader's rounds, which choose for all tasks that wait: each for itself would choose the same.
/// The planner is not even asked, for thousands may wait, and each looks at every change.
pub fn own_action(state: &State, observed: &Observed, task: &Task, now: u64) -> Action {
    match state.vms.get(&task.vm) {
        Some(vm) if needs_node(state, observed, task, vm) => Action::Wait { until: u64::MAX },
        _ => next_action(state, observed, task, now),
    }
}

/// Whether a reason has been noted already: saying it again would only make the log grow.
pub(crate) fn is_known(task: &Task, vm: &Vm, reason: &str) -> bool {
    task.tried.is_empty() && vm.pending.as_deref() == Some(reason)
}

fn place(state: &State, wish: &planner::Wish<'_>) -> StepEvent {
    match planner::choose(state, wish) {
        Ok(choice) => StepEvent::Placed { node: choice.node, why: choice.to_string() },
        Err(refusal) => StepEvent::NoNode { reason: refusal.to_string() },
    }
}

/// Proofs that need no lock, the cheapest first; before them, what saves the guest's memory.
fn prove(
    state: &State,
    observed: &Observed,
    task: &Task,
    vm: &Vm,
    old: &Runner,
    now: u64,
) -> Option<Action> {
    let leased = vm.arbiter() == Arbiter::Lease;
    let by_time = || leased.then(|| await_proof(state, observed, task, vm, old, now));
    let Some(node) = state.nodes.get(&old.node) else { return by_time() };
    if let Some(new) = node.boot_id.filter(|boot| *boot != old.boot_id) {
        let proof = FenceProof::Rebooted { node: node.id, old: old.boot_id, new };
        return Some(Action::Advance(StepEvent::Proven(proof)));
    }
    match &node.liveness {
        Liveness::Fenced { proof } => Some(Action::Advance(StepEvent::Proven(proof.clone()))),
        Liveness::Online => Some(ask_living(observed, task, vm, old)),
        Liveness::Unknown { .. } | Liveness::Joining => by_time(),
    }
}

/// No lock says anything of a VM under the lease arbiter: time has to, or a switch, or a person.
fn await_proof(
    state: &State,
    observed: &Observed,
    task: &Task,
    vm: &Vm,
    old: &Runner,
    now: u64,
) -> Action {
    let name = state.node_name(old.node);
    let switch = observed.switches.get(&old.node);
    let none = match (fence::watchdog(state, observed, old, now), switch) {
        (Outlook::Proven(proof), _) => return Action::Advance(StepEvent::Proven(proof)),
        (_, Some(switch)) if switch.failure().is_none() => {
            return soon(vm, u64::MAX, || format!("{} switches {name} off", switch.device));
        }
        (Outlook::At(until), _) => {
            return soon(vm, until, || {
                format!("waiting until the watchdog of {name} has reset it")
            });
        }
        (Outlook::Never(none), _) => none,
    };
    let failure = switch.and_then(|switch| Some((&switch.device, switch.failure()?)));
    let by_power = failure.map_or_else(String::new, |(device, why)| format!("; {device}: {why}"));
    let reason = format!(
        "{name} may be running it, and yields no proof: {none}{by_power}. When it is off, say so: \
         bell node confirm-down {name}"
    );
    match is_known(task, vm, &reason) {
        true => Action::Wait { until: u64::MAX },
        false => Action::Advance(StepEvent::NoNode { reason }),
    }
}

/// A proof that is on its way; said once, unless a reason stands there already.
fn soon(vm: &Vm, until: u64, reason: impl FnOnce() -> String) -> Action {
    match vm.pending.is_some() {
        true => Action::Wait { until },
        false => Action::Advance(StepEvent::NoNode { reason: reason() }),
    }
}

/// What to ask of a node that is back in the same boot.
fn ask_living(observed: &Observed, task: &Task, vm: &Vm, old: &Runner) -> Action {
    // A refusal has been noted as a try of this node: then there is nothing left to save.
    let may_be_sealed = vm.desired == Desired::Running && !task.tried.contains(&old.node);
    match reported(observed, vm, old) {
        // It becomes sealed, or goes on: its next reports will tell.
        Some(VmState::Saving) => return Action::Wait { until: u64::MAX },
        Some(VmState::Saved) if may_be_sealed => {
            return Action::Seal { source: old.clone(), load_at: None };
        }
        _ => {}
    }
    match observed.vm(vm.id, old.node, old.boot_id, old.epoch) {
        Seen::Alive => Action::Advance(StepEvent::Reinstated),
        Seen::Waiting | Seen::Ended | Seen::Absent => {
            Action::Release(Attempt { node: old.node, epoch: old.epoch })
        }
        // It has registered and has not reported this VM yet: its next report will tell.
        Seen::Unsure | Seen::NoReport => Action::Wait { until: u64::MAX },
    }
}

/// The state of a runner's incarnation, if its node has reported it in that boot.
fn reported(observed: &Observed, vm: &Vm, runner: &Runner) -> Option<VmState> {
    let report = observed.nodes.get(&runner.node)?;
    let seen = observed.report(runner.node, vm.id, runner.epoch)?;
    (report.boot_id == runner.boot_id).then_some(seen.state)
}

fn pre_copy(state: &State, vm: &Vm, load_at: Option<Attempt>) -> Action {
    match (seal(vm, load_at), load_at) {
        (Action::Seal { source, load_at: Some(attempt) }, Some(_)) => {
            on_living(state, attempt, Action::PreCopy { source, load_at })
        }
        (Action::Seal { source, load_at }, _) => Action::PreCopy { source, load_at },
        (no_runner, _) => no_runner,
    }
}

fn seal(vm: &Vm, load_at: Option<Attempt>) -> Action {
    match vm.place.runner() {
        Some(source) => Action::Seal { source: source.clone(), load_at },
        None => Action::Advance(StepEvent::Failed {
            error: "the VM has no runner any more".into(),
            retry: Retry::Never,
        }),
    }
}

fn load(state: &State, vm: &Vm, attempt: Attempt) -> Action {
    match &vm.place {
        Place::Sealed { file, .. } => {
            on_living(state, attempt, Action::Load { attempt, file: file.clone() })
        }
        _ => Action::Advance(StepEvent::Failed {
            error: "the VM has no sealed state any more".into(),
            retry: Retry::Never,
        }),
    }
}

/// A guest that runs at the source is told that its move is off, and outlasts any silence. Where
/// nothing runs, a node that is lost is not waited for: what is left there goes when it is back.
fn abandon(state: &State, vm: &Vm, attempt: Attempt) -> Action {
    match vm.place {
        Place::Runner(_) => Action::Abandon(attempt),
        _ => on_living(state, attempt, Action::Abandon(attempt)),
    }
}

fn ask_guest(vm: &Vm) -> Action {
    match vm.place.runner() {
        Some(runner) => Action::AskGuest(runner.clone()),
        None => Action::Advance(StepEvent::GuestEnded),
    }
}

fn await_guest(observed: &Observed, vm: &Vm) -> Action {
    let Some(runner) = vm.place.runner() else {
        return Action::Advance(StepEvent::GuestEnded);
    };
    let heard_at = observed.nodes.get(&runner.node).map_or(0, |report| report.heard_at);
    match observed.vm(vm.id, runner.node, runner.boot_id, runner.epoch) {
        Seen::Ended => Action::Advance(StepEvent::GuestEnded),
        // Gone without a trace; a report of before the guest was asked may not have known it yet.
        Seen::Absent if heard_at > vm.changed_at => Action::Advance(StepEvent::GuestEnded),
        _ => Action::Wait { until: u64::MAX },
    }
}

/// What follows when a task has waited at its step for so long by the clock of this leader; none
/// to wait on. The time that a guest has is the difference of two stamps of one leader, so a next
/// one, whose clock may differ, gives it that time anew.
pub fn timed_out(state: &State, task: &Task, waited_ms: u64) -> Option<StepEvent> {
    let vm = state.vms.get(&task.vm)?;
    match task.step {
        Step::AwaitGuest { until } if waited_ms >= until.saturating_sub(vm.changed_at) => {
            Some(StepEvent::TimedOut)
        }
        _ => None,
    }
}

/// Letting go of a node that is lost cannot wait for an answer: where the VM is sealed none is
/// needed, because the next runner takes the locks.
fn release(state: &State, observed: &Observed, task: &Task, vm: &Vm, runner: &Runner) -> Action {
    let lost = state.nodes.get(&runner.node).is_none_or(|node| !node.is_online());
    // A seal whose task had ended before it: nobody stopped the VM, so its memory is worth saving.
    let unwanted_seal = task.kind == TaskKind::Settle
        && vm.desired == Desired::Running
        && vm.place.runner() == Some(runner)
        && reported(observed, vm, runner) == Some(VmState::Saved);
    match &vm.place {
        Place::Sealed { .. } if lost => {
            Action::Advance(StepEvent::RunnerLost { node: runner.node })
        }
        _ if unwanted_seal => Action::Advance(StepEvent::RunnerLost { node: runner.node }),
        _ => Action::Release(Attempt { node: runner.node, epoch: runner.epoch }),
    }
}

/// What follows when an order of a task's step has had no answer for too long; none to go on asking.
pub fn given_up(state: &State, task: &Task, error: String) -> Option<StepEvent> {
    let vm = state.vms.get(&task.vm)?;
    match (&task.step, &vm.place) {
        // No answer proves nothing, so the locks have to: they are busy for as long as it lives.
        (Step::Choose, Place::Revoked(old))
            if task.proof.is_none() && vm.arbiter() == Arbiter::Storage =>
        {
            let wish = planner::Wish { leaving: Some(old.node), ..planner::Wish::of(task, vm) };
            Some(place(state, &wish))
        }
        (
            Step::Prepare(_)
            | Step::TakeOver(_)
            | Step::Load(_)
            | Step::Purge(_)
            | Step::PreCopy(_),
            _,
        ) => Some(StepEvent::Failed { error, retry: Retry::OtherNode }),
        (Step::Activate { attempt, .. } | Step::Reap { attempt, .. }, _) => {
            Some(StepEvent::RunnerLost { node: attempt.node })
        }
        (Step::ClaimBack { source, .. }, _) => Some(StepEvent::RunnerLost { node: source.node }),
        (Step::Release(runner), _) => Some(StepEvent::RunnerLost { node: runner.node }),
        // A guest that went on is reinstated then; one that stands sealed is found again.
        (Step::Seal(_), Place::Runner(runner)) => Some(StepEvent::RunnerLost { node: runner.node }),
        (Step::AskGuest, _) => Some(StepEvent::TimedOut),
        (Step::Choose | Step::Seal(_) | Step::Abandon { .. } | Step::AwaitGuest { .. }, _) => None,
    }
}

/// Whether the sealer of a VM that was running still holds it, and can be asked to go on.
pub(crate) fn can_claim_back(
    state: &State,
    task: &Task,
    vm: &Vm,
) -> Option<(Runner, StateFileRef)> {
    let Place::Sealed { file, sealer: Some(sealer) } = &vm.place else {
        return None;
    };
    let node = state.nodes.get(&sealer.node)?;
    let alive = node.is_online() && node.boot_id == Some(sealer.boot_id);
    let was_running = matches!(task.kind, TaskKind::Migrate | TaskKind::Failover);
    (was_running && alive).then(|| (sealer.clone(), file.clone()))
}

/// What an abandoned attempt means for the task. What the cluster began by itself it tries for
/// ever; a person gets an answer.
pub(crate) fn after_failure(task: &Task, vm: &Vm, retry: Retry) -> Then {
    let patient = task.by == BY_CLUSTER;
    let named = task.wanted.is_some();
    match vm.place {
        Place::Runner(_) => Then::Fail,
        Place::Revoked(_) => Then::Retry,
        Place::Sealed { .. } if task.kind == TaskKind::Migrate && retry != Retry::Never => {
            Then::Retry
        }
        _ if patient => Then::Retry,
        _ if named || retry == Retry::Never => Then::Fail,
        _ => Then::Retry,
    }
}

/// The step in which a running VM is brought into a file, as its rule says.
pub(crate) fn stop_for(vm: &Vm, load_at: Option<Attempt>) -> Step {
    match vm.rules.pre_copy {
        PreCopy::Never => Step::Seal(load_at),
        PreCopy::Finish | PreCopy::GiveUp => Step::PreCopy(load_at),
    }
}

/// What a pre-copy has measured, in a sentence; none if there was none.
pub(crate) fn pre_copy_summary(measures: &Measures) -> Option<String> {
    let part = |name: &str| measures.get(name).copied();
    let (rounds, bytes) = (part("precopy_rounds")?, part("precopy_bytes")?);
    let (dirty, outage) = (part("dirty_bytes_per_s")?, part("predicted_outage_us")?);
    Some(format!(
        "wrote {} MiB in {rounds} rounds while the guest ran; it dirties {} MiB/s, so that an \
         outage of {}.{} ms is predicted",
        bytes >> 20,
        dirty >> 20,
        outage / 1_000,
        outage % 1_000 / 100
    ))
}
