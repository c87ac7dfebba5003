//! The transitions of the sagas, as drawn in [`crate::saga`].

use bellwether_types::{FenceProof, NodeId, RestartPolicy, StateFileRef, TaskId};

use super::rules::may_restart;
use super::seal::{ClaimedBack, claimed_back, pre_copied, saved, sealed};
use super::{About, Applied};
use crate::command::Outcome;
use crate::reconcile::BY_CLUSTER;
use crate::saga;
use crate::state::{Desired, Level, Place, Runner, State, Vm};
use crate::task::{Attempt, Measures, Step, StepEvent, Task, TaskKind, Then};

// These times are constants and not configuration: every controller must come to the same state.

/// The first pause before something that could not be done is tried again, milliseconds.
const RETRY_MS: u64 = 1_000;
/// The longest such pause.
pub(crate) const BACKOFF_MS_MAX: u64 = 60_000;
/// A VM that ran this long before it ended is not one that keeps failing.
const RAN_WELL_MS: u64 = 300_000;
/// The pause before a VM that could not be moved off a draining node is tried again.
const DRAIN_PAUSE_MS: u64 = 5_000;

/// Where a transition leads.
pub(super) enum Next {
    Step(Step),
    /// Again after a pause, for this reason; the pause grows with every failed attempt.
    Later(String),
    Done(String),
    Failed(String),
    /// The VM is gone from the state, and the task with it.
    Deleted,
    /// The event does not fit the step: it came late.
    Ignore,
}

impl State {
    pub(super) fn advance(&mut self, at: u64, id: TaskId, no: u32, event: StepEvent) -> Applied {
        let current =
            self.tasks.get(&id).filter(|task| task.outcome.is_none() && task.step_no == no);
        let Some(mut task) = current.cloned() else {
            return Ok(Outcome::Unchanged);
        };
        let Some(mut vm) = self.vms.get(&task.vm).cloned() else {
            return Ok(Outcome::Unchanged);
        };
        let next = self.transition(at, &mut task, &mut vm, event);
        if matches!(next, Next::Ignore) {
            return Ok(Outcome::Unchanged);
        }
        vm.changed_at = at;
        let gives_up = |old: &Vm| old.halted.is_none() && vm.halted.is_some();
        let halted = self.vms.get(&vm.id).is_some_and(gives_up).then_some(vm.id);
        self.settle(at, task, vm, next);
        if let Some(vm) = halted {
            self.report_halt(at, vm, id);
        }
        Ok(Outcome::Done)
    }

    /// Writes back what a transition decided.
    fn settle(&mut self, at: u64, mut task: Task, mut vm: Vm, next: Next) {
        let (id, vm_id) = (task.id, vm.id);
        task.step_no += 1;
        task.retry_at = 0;
        let mut news = None;
        match next {
            Next::Ignore => return,
            Next::Step(step) => task.step = step,
            Next::Later(reason) => {
                task.retry_at = at + backoff_ms(task.failures.max(1));
                news =
                    (vm.pending.as_ref() != Some(&reason)).then(|| (Level::Warn, reason.clone()));
                task.say(at, &reason);
                vm.pending = Some(reason);
            }
            Next::Done(text) => {
                news = Some((Level::Info, text.clone()));
                end(at, &mut task, &mut vm, Ok(()), text);
            }
            Next::Failed(text) => {
                news = Some((Level::Error, text.clone()));
                end(at, &mut task, &mut vm, Err(text.clone()), text);
            }
            Next::Deleted => {
                let text = format!("VM {} was deleted", vm.spec.name);
                end(at, &mut task, &mut vm, Ok(()), text.clone());
                self.event(at, Level::Info, About::task(vm_id, id), text);
                self.vms.remove(&vm_id);
                self.tasks.insert(id, task);
                return self.trim_tasks();
            }
        }
        let ended = task.outcome.is_some();
        self.tasks.insert(id, task);
        self.vms.insert(vm_id, vm);
        if let Some((level, text)) = news {
            self.event(at, level, About::task(vm_id, id), text);
        }
        if ended {
            self.trim_tasks();
        }
    }

    fn transition(&mut self, at: u64, task: &mut Task, vm: &mut Vm, event: StepEvent) -> Next {
        if let StepEvent::RunnerLost { node } = event {
            return self.runner_lost(task, vm, node);
        }
        match (task.step.clone(), event) {
            (Step::Choose, event) => self.choose(at, task, vm, event),
            (Step::Prepare(attempt), event) => self.prepared(at, task, vm, attempt, event),
            (Step::TakeOver(attempt), event) => self.taken_over(at, task, vm, attempt, event),
            (Step::PreCopy(attempt), StepEvent::PreCopied { measures }) => {
                pre_copied(at, task, attempt, measures)
            }
            // A log of before this step goes from Prepared to what came of the seal.
            (Step::Seal(attempt) | Step::PreCopy(attempt), event) => {
                sealed(at, task, vm, attempt, event)
            }
            (Step::Load(attempt), event) => self.loaded(at, task, vm, attempt, event),
            (Step::Activate { attempt, from, file }, event) => {
                self.activated(at, task, vm, Activation { attempt, from, file }, event)
            }
            (Step::Reap { attempt, error }, event) => reaped(at, task, vm, attempt, error, event),
            (Step::ClaimBack { source, file, error, .. }, event) => {
                claimed_back(task, vm, source, ClaimedBack { file, error }, event)
            }
            (Step::Abandon { attempt, error, then }, _) => {
                self.abandoned(task, vm, attempt, error, then)
            }
            (Step::AskGuest, StepEvent::Asked { until }) => {
                task.say(at, "the guest was asked to shut down");
                Next::Step(Step::AwaitGuest { until })
            }
            (Step::AskGuest | Step::AwaitGuest { .. }, event) => guest_ended(vm, event),
            (Step::Release(runner), event) => released(at, task, vm, runner, event),
            (Step::Purge(_), StepEvent::Purged) => Next::Deleted,
            (Step::Purge(_), StepEvent::Failed { error, .. }) => {
                task.step = Step::Choose;
                Next::Later(error)
            }
            (Step::Purge(_), _) => Next::Ignore,
        }
    }

    fn choose(&mut self, at: u64, task: &mut Task, vm: &mut Vm, event: StepEvent) -> Next {
        match event {
            StepEvent::Chosen { node } if task.kind == TaskKind::Delete => {
                Next::Step(Step::Purge(node))
            }
            StepEvent::Chosen { node } => {
                let attempt = Attempt { node, epoch: vm.next_epoch() };
                task.destination = Some(node);
                task.say(
                    at,
                    format!("{} is chosen, epoch {}", self.node_name(node), attempt.epoch),
                );
                Next::Step(Step::Prepare(attempt))
            }
            StepEvent::Placed { node, why } => {
                if let Some(taken) = crate::planner::taken(self, task, vm, node) {
                    task.say(at, taken);
                    return Next::Step(Step::Choose);
                }
                task.say(at, &why);
                super::rules::note_placement(at, task, vm, node, why);
                self.choose(at, task, vm, StepEvent::Chosen { node })
            }
            StepEvent::NoNode { reason } => no_node(task, vm, reason),
            StepEvent::Proven(proof) => proven(at, task, vm, proof),
            StepEvent::Released { proof, .. } => proven(at, task, vm, proof),
            StepEvent::Reinstated => reinstated(task, vm),
            StepEvent::Sealed { file, measures } => self.recovered(at, task, vm, file, measures),
            StepEvent::Failed { error, .. } => {
                // The old runner's node has refused to tell its sealed state: it is not asked again.
                if let Place::Revoked(old) = &vm.place {
                    task.tried.insert(old.node);
                }
                Next::Later(error)
            }
            _ => Next::Ignore,
        }
    }

    fn prepared(
        &mut self,
        at: u64,
        task: &mut Task,
        vm: &mut Vm,
        attempt: Attempt,
        event: StepEvent,
    ) -> Next {
        match event {
            StepEvent::Prepared => match &vm.place {
                Place::Runner(_) => Next::Step(saga::stop_for(vm, Some(attempt))),
                Place::Sealed { .. } => Next::Step(Step::Load(attempt)),
                Place::Revoked(_) if task.proof.is_none() => Next::Step(Step::TakeOver(attempt)),
                Place::Revoked(_) | Place::Stopped => self.assign(task, vm, attempt),
            },
            event => self.attempt_failed(at, task, vm, attempt, event),
        }
    }

    /// Commits that the attempt, and nobody else, may run the VM.
    pub(super) fn assign(&mut self, task: &mut Task, vm: &mut Vm, attempt: Attempt) -> Next {
        let Some(boot_id) = self.nodes.get(&attempt.node).and_then(|node| node.boot_id) else {
            let error = format!("{} is not registered", self.node_name(attempt.node));
            return Next::Step(Step::Abandon { attempt, error, then: Then::Retry });
        };
        let runner = Runner { node: attempt.node, epoch: attempt.epoch, boot_id };
        let (from, file) = match std::mem::replace(&mut vm.place, Place::Runner(runner)) {
            Place::Sealed { file, sealer } => (sealer, Some(file)),
            _ => (None, None),
        };
        vm.last_proof = task.proof.clone().or(vm.last_proof.take());
        Next::Step(Step::Activate { attempt, from, file })
    }

    fn taken_over(
        &mut self,
        at: u64,
        task: &mut Task,
        vm: &mut Vm,
        attempt: Attempt,
        event: StepEvent,
    ) -> Next {
        match event {
            StepEvent::Held => self.held(at, task, vm, attempt),
            StepEvent::HeldWithState { file } => self.handed_over(at, task, vm, attempt, file),
            StepEvent::Busy { holder } => {
                let error = format!("the old runner still holds the VM's locks ({holder})");
                Next::Step(Step::Abandon { attempt, error, then: Then::Retry })
            }
            event => self.attempt_failed(at, task, vm, attempt, event),
        }
    }

    /// The attempt holds the locks, and the old runner left nothing but its disks.
    pub(super) fn held(&mut self, at: u64, task: &mut Task, vm: &mut Vm, attempt: Attempt) -> Next {
        let proof = FenceProof::Storage { holder: attempt.node, epoch: attempt.epoch };
        task.say(at, format!("proof: {proof}"));
        task.proof = Some(proof);
        if comes_back(at, vm) {
            return self.assign(task, vm, attempt);
        }
        vm.place = Place::Stopped;
        vm.desired = Desired::Stopped;
        let error = "the VM is not to come back".into();
        Next::Step(Step::Abandon { attempt, error, then: Then::Done })
    }

    fn activated(
        &mut self,
        at: u64,
        task: &mut Task,
        vm: &mut Vm,
        activation: Activation,
        event: StepEvent,
    ) -> Next {
        let Activation { attempt, file, .. } = activation;
        match event {
            StepEvent::Activated { measures } => {
                merge(task, measures);
                vm.desired = Desired::Running;
                vm.paused = false;
                vm.pending = None;
                let node = self.node_name(attempt.node);
                Next::Done(format!("VM {} runs on {node}, epoch {}", vm.spec.name, attempt.epoch))
            }
            // It never ran, so what it was made of is as good as before.
            StepEvent::Failed { error, retry } => {
                vm.place = match file {
                    Some(file) => Place::Sealed { file, sealer: activation.from },
                    None => Place::Stopped,
                };
                task.proof = task.proof.take().filter(|_| vm.place == Place::Stopped);
                self.attempt_failed(at, task, vm, attempt, StepEvent::Failed { error, retry })
            }
            StepEvent::TimedOut => {
                let error = "it is not known whether the VM came up".to_string();
                task.say(at, &error);
                Next::Step(Step::Reap { attempt, error })
            }
            _ => Next::Ignore,
        }
    }

    /// An attempt that never ran is undone; then another node is tried, or the task fails.
    pub(super) fn attempt_failed(
        &mut self,
        at: u64,
        task: &mut Task,
        vm: &mut Vm,
        attempt: Attempt,
        event: StepEvent,
    ) -> Next {
        let StepEvent::Failed { error, retry } = event else {
            return Next::Ignore;
        };
        let error = format!("{}: {error}", self.node_name(attempt.node));
        task.say(at, &error);
        task.tried.insert(attempt.node);
        // On a person's word nobody knows when the locks will be free: the pauses stay short.
        if !matches!(task.proof, Some(FenceProof::Operator { .. })) {
            task.failures += 1;
        }
        let then = saga::after_failure(task, vm, retry);
        Next::Step(Step::Abandon { attempt, error, then })
    }

    fn abandoned(
        &mut self,
        task: &mut Task,
        vm: &mut Vm,
        _attempt: Attempt,
        error: String,
        then: Then,
    ) -> Next {
        match then {
            Then::Retry => {
                task.step = Step::Choose;
                Next::Later(error)
            }
            Then::Fail => Next::Failed(fail(vm, error)),
            Then::Done => Next::Done(format!("VM {} is stopped", vm.spec.name)),
        }
    }

    /// Revocation in the middle of a task: the node of the runner is lost, the task ends, and the
    /// reconciler starts a failover.
    fn runner_lost(&mut self, task: &mut Task, vm: &mut Vm, node: NodeId) -> Next {
        let name = self.node_name(node);
        match &vm.place {
            Place::Runner(runner) if runner.node == node => {
                vm.place = Place::Revoked(runner.clone());
                let step = task.step.name();
                Next::Failed(format!("{name} was lost during `{step}`; a failover follows"))
            }
            Place::Sealed { .. } if matches!(task.step, Step::Release(_)) => saved(vm),
            _ => Next::Ignore,
        }
    }
}

struct Activation {
    attempt: Attempt,
    from: Option<Runner>,
    file: Option<StateFileRef>,
}

fn no_node(task: &mut Task, vm: &mut Vm, reason: String) -> Next {
    // After every node has been tried, all of them are tried again.
    task.tried.clear();
    let named = task.wanted.is_some();
    if task.kind == TaskKind::Migrate {
        return match vm.place {
            Place::Runner(_) => Next::Failed(reason),
            // It was running: it comes back wherever it can, whatever node was asked for.
            _ => {
                task.wanted = None;
                Next::Later(reason)
            }
        };
    }
    match task.by == BY_CLUSTER {
        true => Next::Later(reason),
        // A person whom no node served gets the reason of the last one.
        false if task.failures > 0 => {
            let last = vm.pending.take().unwrap_or(reason);
            Next::Failed(fail(vm, last))
        }
        false if named => Next::Failed(fail(vm, reason)),
        false => Next::Later(reason),
    }
}

fn proven(at: u64, task: &mut Task, vm: &mut Vm, proof: FenceProof) -> Next {
    if !matches!(vm.place, Place::Revoked(_)) {
        return Next::Ignore;
    }
    task.say(at, format!("proof: {proof}"));
    vm.last_proof = Some(proof.clone());
    task.proof = Some(proof);
    // Gone for certain: whatever follows is an ordinary start.
    vm.place = Place::Stopped;
    if comes_back(at, vm) {
        return Next::Step(Step::Choose);
    }
    vm.desired = Desired::Stopped;
    Next::Done(format!("VM {} is stopped", vm.spec.name))
}

/// Whether a VM whose runner is gone is to run again.
fn comes_back(at: u64, vm: &mut Vm) -> bool {
    vm.desired == Desired::Running
        && vm.spec.restart == RestartPolicy::Restart
        && may_restart(at, vm)
}

fn reinstated(task: &mut Task, vm: &mut Vm) -> Next {
    let Place::Revoked(runner) = &vm.place else {
        return Next::Ignore;
    };
    vm.place = Place::Runner(runner.clone());
    vm.pending = None;
    task.destination = None;
    Next::Done(format!("false alarm: VM {} never stopped running", vm.spec.name))
}

/// The attempt is proven gone, and it may have run: its memory is lost, as after a crash.
fn reaped(
    at: u64,
    task: &mut Task,
    vm: &mut Vm,
    attempt: Attempt,
    error: String,
    event: StepEvent,
) -> Next {
    match event {
        StepEvent::Released { proof, .. } => {
            task.say(at, format!("proof: {proof}"));
            vm.last_proof = Some(proof);
            vm.place = Place::Stopped;
            task.tried.insert(attempt.node);
            task.step = Step::Choose;
            Next::Later(error)
        }
        StepEvent::Failed { error: why, .. } => Next::Later(why),
        _ => Next::Ignore,
    }
}

fn guest_ended(vm: &Vm, event: StepEvent) -> Next {
    match (event, vm.place.runner()) {
        (StepEvent::GuestEnded, Some(runner)) => Next::Step(Step::Release(runner.clone())),
        (StepEvent::GuestEnded, None) => Next::Done(format!("VM {} is stopped", vm.spec.name)),
        (StepEvent::TimedOut, _) => Next::Failed(format!(
            "the guest of VM {0} did not shut down in time; `bell vm stop {0}` switches it off",
            vm.spec.name
        )),
        (StepEvent::Failed { error, .. }, _) => Next::Later(error),
        _ => Next::Ignore,
    }
}

fn released(at: u64, task: &mut Task, vm: &mut Vm, runner: Runner, event: StepEvent) -> Next {
    let StepEvent::Released { proof, reason } = event else {
        return match event {
            StepEvent::Failed { error, .. } => Next::Later(error),
            _ => Next::Ignore,
        };
    };
    task.say(at, format!("proof: {proof} ({reason})"));
    if matches!(vm.place, Place::Sealed { .. }) {
        return saved(vm);
    }
    if vm.place.runner() != Some(&runner) {
        return Next::Ignore;
    }
    vm.place = Place::Stopped;
    vm.paused = false;
    vm.last_proof = Some(proof);
    match task.kind {
        TaskKind::Settle => after_its_end(at, task.since, vm, &reason),
        _ => vm.desired = Desired::Stopped,
    }
    Next::Done(format!("VM {} is stopped ({reason})", vm.spec.name))
}

/// A guest that shut itself down stays down; one that crashed is restarted as its policy says.
fn after_its_end(at: u64, started_at: u64, vm: &mut Vm, reason: &str) {
    if at.saturating_sub(started_at) > RAN_WELL_MS {
        vm.failures = 0;
    }
    let ordered = reason.starts_with("guest-shutdown");
    if ordered || vm.spec.restart == RestartPolicy::Never || !may_restart(at, vm) {
        vm.desired = Desired::Stopped;
    } else {
        vm.retry_at = at + backoff_ms(vm.failures);
        vm.failures += 1;
    }
}

/// What a task that gives up leaves behind, so that the reconciler does not start it over at once.
fn fail(vm: &mut Vm, error: String) -> String {
    match &vm.place {
        Place::Stopped => {
            vm.desired = Desired::Stopped;
            error
        }
        Place::Sealed { .. } => {
            vm.desired = Desired::Saved;
            format!("{error}; VM {} stays saved", vm.spec.name)
        }
        _ => error,
    }
}

fn end(at: u64, task: &mut Task, vm: &mut Vm, outcome: Result<(), String>, text: String) {
    task.say(at, text);
    if outcome.is_err() && task.kind == TaskKind::Migrate {
        // A drain asks again, but not at once.
        vm.retry_at = at + DRAIN_PAUSE_MS;
    }
    if vm.place == Place::Stopped && vm.desired != Desired::Running {
        vm.pending = None;
    }
    task.outcome = Some(outcome);
    task.ended_at = at;
    vm.task = None;
}

/// Whether a time to try again has come. The next leader's clock may differ from the one that
/// wrote it, so a pause that looks longer than any that is given out is over.
pub(crate) fn is_due(retry_at: u64, now: u64) -> bool {
    retry_at <= now || retry_at - now > BACKOFF_MS_MAX
}

/// 0, 1, 2, 4 … seconds, to a minute: the first crash is mended at once.
fn backoff_ms(failures: u32) -> u64 {
    match failures {
        0 => 0,
        n => RETRY_MS.saturating_mul(1 << (n - 1).min(16)).min(BACKOFF_MS_MAX),
    }
}

pub(super) fn merge(task: &mut Task, measures: Measures) {
    task.measures.extend(measures);
}
