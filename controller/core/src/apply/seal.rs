//! The transitions about sealed state: seal, load, claim back.

use bellwether_types::{FenceProof, StateFileRef};

use super::steps::{Next, merge};
use crate::saga;
use crate::state::{Desired, Place, Runner, State, Vm};
use crate::task::{Attempt, Measures, Step, StepEvent, Task, TaskKind, Then};

impl State {
    /// A lost runner turns out to be sealed: its memory is the VM, wherever it goes on.
    pub(super) fn recovered(
        &mut self,
        at: u64,
        task: &mut Task,
        vm: &mut Vm,
        file: StateFileRef,
        measures: Measures,
    ) -> Next {
        let Place::Revoked(old) = &vm.place else { return Next::Ignore };
        if file.epoch != old.epoch {
            return Next::Ignore;
        }
        let (path, node) = (file.path.display(), self.node_name(old.node));
        task.say(at, format!("{node} had sealed it in {path} ({} bytes)", file.bytes));
        merge(task, measures);
        vm.place = Place::Sealed { sealer: Some(old.clone()), file };
        match saga::can_claim_back(self, task, vm) {
            Some((sealer, file)) => claim_back(vm, &sealer, file, "was sealed".into()),
            None => Next::Step(Step::Choose),
        }
    }

    /// The attempt holds the locks, and with the claim came the old runner's memory. From here on it
    /// is a restore, by this attempt or by any other.
    pub(super) fn handed_over(
        &mut self,
        at: u64,
        task: &mut Task,
        vm: &mut Vm,
        attempt: Attempt,
        file: StateFileRef,
    ) -> Next {
        let Place::Revoked(old) = &vm.place else { return Next::Ignore };
        // Of another runner it says nothing, and a VM that is not to run needs no memory.
        if file.epoch != old.epoch || vm.desired != Desired::Running {
            return self.held(at, task, vm, attempt);
        }
        let proof = FenceProof::HandedOver { node: old.node };
        task.say(at, format!("proof: {proof}; its memory is in {}", file.path.display()));
        task.proof = Some(proof);
        vm.place = Place::Sealed { file, sealer: None };
        Next::Step(Step::Load(attempt))
    }

    pub(super) fn loaded(
        &mut self,
        at: u64,
        task: &mut Task,
        vm: &mut Vm,
        attempt: Attempt,
        event: StepEvent,
    ) -> Next {
        match event {
            StepEvent::Loaded { measures } => {
                merge(task, measures);
                self.assign(task, vm, attempt)
            }
            StepEvent::Failed { error, retry } => match saga::can_claim_back(self, task, vm) {
                Some((sealer, file)) => {
                    task.say(at, format!("{error}: the source takes the VM back"));
                    claim_back(vm, &sealer, file, error)
                }
                None => {
                    self.attempt_failed(at, task, vm, attempt, StepEvent::Failed { error, retry })
                }
            },
            _ => Next::Ignore,
        }
    }
}

pub(super) struct ClaimedBack {
    pub file: StateFileRef,
    pub error: String,
}

pub(super) fn sealed(
    at: u64,
    task: &mut Task,
    vm: &mut Vm,
    to: Option<Attempt>,
    event: StepEvent,
) -> Next {
    match event {
        StepEvent::Sealed { file, measures } => {
            let Place::Runner(source) = vm.place.clone() else {
                return Next::Ignore;
            };
            merge(task, measures);
            task.say(at, format!("sealed in {} ({} bytes)", file.path.display(), file.bytes));
            vm.place = Place::Sealed { file, sealer: Some(source.clone()) };
            match to {
                Some(attempt) => Next::Step(Step::Load(attempt)),
                None => Next::Step(Step::Release(source)),
            }
        }
        StepEvent::Failed { error, .. } => match to {
            Some(attempt) => Next::Step(Step::Abandon { attempt, error, then: Then::Fail }),
            None => Next::Failed(error),
        },
        _ => Next::Ignore,
    }
}

pub(super) fn pre_copied(
    at: u64,
    task: &mut Task,
    to: Option<Attempt>,
    measures: Measures,
) -> Next {
    if let Some(summary) = saga::pre_copy_summary(&measures) {
        task.say(at, summary);
    }
    merge(task, measures);
    Next::Step(Step::Seal(to))
}

/// Commits that the source may run its sealed VM again, under a higher epoch.
fn claim_back(vm: &mut Vm, sealer: &Runner, file: StateFileRef, error: String) -> Next {
    let source = Attempt { node: sealer.node, epoch: vm.next_epoch() };
    vm.place = Place::Runner(Runner { epoch: source.epoch, ..sealer.clone() });
    Next::Step(Step::ClaimBack { source, sealed: sealer.epoch, file, error })
}

pub(super) fn claimed_back(
    task: &mut Task,
    vm: &mut Vm,
    source: Attempt,
    what: ClaimedBack,
    event: StepEvent,
) -> Next {
    match event {
        StepEvent::ClaimedBack { measures } => {
            merge(task, measures);
            vm.desired = Desired::Running;
            vm.pending = None;
            let name = &vm.spec.name;
            match task.kind {
                TaskKind::Failover => {
                    Next::Done(format!("VM {name} goes on where it was sealed, with its memory"))
                }
                _ => Next::Failed(format!("{}; VM {name} goes on at the source", what.error)),
            }
        }
        // It did not run again, so the sealed file still is the VM.
        StepEvent::Failed { error, .. } => {
            vm.place = Place::Sealed { file: what.file, sealer: None };
            vm.desired = Desired::Running;
            task.step = Step::Choose;
            Next::Later(format!("the source could not take the VM back: {error}"))
        }
        StepEvent::TimedOut => {
            let error = "it is not known whether the source took the VM back".to_string();
            Next::Step(Step::Reap { attempt: source, error })
        }
        _ => Next::Ignore,
    }
}

pub(super) fn saved(vm: &mut Vm) -> Next {
    if let Place::Sealed { sealer, .. } = &mut vm.place {
        *sealer = None;
    }
    vm.desired = Desired::Saved;
    vm.pending = None;
    Next::Done(format!("VM {} is saved", vm.spec.name))
}
