//! What the leader commits: the transitions of `controller/core/src/apply/{steps,seal}.rs`.
//!
//! A commit is one transition here: Raft's own order is taken for granted. Whatever the leader may
//! conclude from reports, it may conclude here at any time if some report could say so.

use crate::action::{Commit, Proof};
use crate::config::{Arbiter, Flaw};
use crate::marks::Mark;
use crate::model::Protocol;
use crate::state::{
    Answer, Attempt, Kind, Order, OrderKind, Phase, Place, Runner, State, Step, Task, Vm,
};
use crate::words::{Boot, Epoch, NodeId, VmId};

impl Protocol {
    /// Commits an event, or nothing if it does not fit the state.
    pub(crate) fn commit(&self, s: &mut State, id: VmId, event: Commit) -> Option<()> {
        match event {
            Commit::BeginTask(kind) => return self.begin_task(s, id, kind),
            Commit::RunnerLost => return self.runner_lost(s, id),
            Commit::Fence => return self.fence_by_watchdog(s, id),
            _ => {}
        }
        let task = s.vm(id).task?;
        match (task.step, event) {
            (Step::Choose, event) => self.choose(s, id, task, event),
            (Step::Prepare(attempt), Commit::Prepared) => {
                self.take(s, id, Answer::Prepared)?;
                self.prepared(s, id, attempt)
            }
            (Step::TakeOver(attempt), Commit::Held { handed }) => {
                self.take(s, id, Answer::Held { handed })?;
                self.held(s, id, attempt, handed)
            }
            (Step::TakeOver(attempt), Commit::Failed) => {
                if s.vm(id).claim.holder.is_some_and(|holder| holder != attempt.node) {
                    self.mark(Mark::Busy);
                }
                self.abandon(s, id, attempt)
            }
            (Step::Prepare(attempt), Commit::Failed) => self.abandon(s, id, attempt),
            (Step::Seal(to), event) => self.sealed(s, id, to, event),
            (Step::Load(attempt), event) => self.loaded(s, id, task, attempt, event),
            (Step::Activate { .. }, event) => self.activated(s, id, task, event),
            (Step::Reap(_), Commit::Released) => {
                self.take(s, id, Answer::Released)?;
                self.mark(Mark::Reaped);
                s.vm_mut(id).place = Place::Stopped;
                self.enter(s, id, Step::Choose)
            }
            (Step::ClaimBack { source, sealed }, event) => {
                self.claimed_back(s, id, source, sealed, event)
            }
            (Step::Release(_), Commit::Released) => self.released(s, id),
            _ => None,
        }
    }

    fn begin_task(&self, s: &mut State, id: VmId, kind: Kind) -> Option<()> {
        let vm = s.vm(id);
        if vm.task.is_some() {
            return None;
        }
        let (by_a_person, step) = match (kind, vm.place) {
            (Kind::Start, Place::Stopped) => (false, Step::Choose),
            (Kind::Restore, Place::Sealed { .. }) => (false, Step::Choose),
            (Kind::Failover, Place::Revoked(_)) => (false, Step::Choose),
            (Kind::Migrate, Place::Runner(runner)) if !s.is_lost(&runner) => (true, Step::Choose),
            (Kind::Save, Place::Runner(runner)) if !s.is_lost(&runner) => (true, Step::Seal(None)),
            (Kind::Stop, Place::Runner(runner)) if !s.is_lost(&runner) => {
                (true, Step::Release(runner))
            }
            _ => return None,
        };
        if by_a_person {
            s.tasks_left = s.tasks_left.checked_sub(1)?;
        }
        s.vm_mut(id).task = Some(Task { kind, step });
        self.enter(s, id, step)
    }

    /// The revocation: from here on no grant names the runner.
    fn runner_lost(&self, s: &mut State, id: VmId) -> Option<()> {
        let (place, task) = (s.vm(id).place, s.vm(id).task);
        let given_up = matches!(
            task.map(|task| task.step),
            Some(Step::Activate { .. } | Step::Reap(_) | Step::ClaimBack { .. } | Step::Release(_))
        );
        match place {
            Place::Runner(runner) if s.is_lost(&runner) || given_up => {
                s.vm_mut(id).place = Place::Revoked(runner);
            }
            Place::Sealed { file, .. } if matches!(task?.step, Step::Release(_)) => {
                s.vm_mut(id).place = Place::Sealed { file, sealer: None };
            }
            _ => return None,
        }
        self.end_task(s, id)
    }

    fn choose(&self, s: &mut State, id: VmId, task: Task, event: Commit) -> Option<()> {
        let vm = s.vm(id);
        match (vm.place, event) {
            (Place::Revoked(_), Commit::Chosen(_)) if self.config.arbiter == Arbiter::Lease => None,
            (place, Commit::Chosen(node)) => {
                let source = place_runner(&place).filter(|_| task.kind == Kind::Migrate);
                let leaves = source.is_none_or(|source| source.node != node);
                (leaves && !s.node(node).unknown).then_some(())?;
                let epoch = self.next_epoch(s, id)?;
                self.enter(s, id, Step::Prepare(Attempt { node, epoch }))
            }
            (Place::Revoked(old), Commit::GiveRelease) => {
                (!s.is_lost(&old)).then_some(())?;
                let (node, epoch, kind) = (old.node, old.epoch, OrderKind::Release);
                s.vm_mut(id).orders.insert(Order { node, epoch, kind, boot: old.boot });
                Some(())
            }
            (Place::Revoked(_), Commit::Released) => {
                self.take(s, id, Answer::Released)?;
                self.proven(s, id, Mark::ProvenReleased)
            }
            (Place::Revoked(old), Commit::Reinstated) => {
                (!s.is_lost(&old)).then_some(())?;
                if vm.vmm(old.node).is_some_and(|vmm| vmm.phase == Phase::Running) {
                    self.mark(Mark::Reinstated);
                }
                s.vm_mut(id).place = Place::Runner(old);
                self.end_task(s, id)
            }
            (Place::Revoked(old), Commit::Proven(Proof::Rebooted)) => {
                let back = self.config.has(Flaw::SilenceIsReboot) && !s.node(old.node).unknown;
                (s.node(old.node).known_boot != old.boot || back).then_some(())?;
                self.proven(s, id, Mark::ProvenRebooted)
            }
            (Place::Revoked(_), Commit::Proven(Proof::Watchdog)) => {
                self.take(s, id, Answer::Fenced)?;
                self.proven(s, id, Mark::ProvenWatchdog)
            }
            _ => None,
        }
    }

    /// The old runner is gone for certain: what follows is an ordinary start.
    pub(crate) fn proven(&self, s: &mut State, id: VmId, mark: Mark) -> Option<()> {
        self.mark(mark);
        s.vm_mut(id).place = Place::Stopped;
        self.enter(s, id, Step::Choose)
    }

    fn prepared(&self, s: &mut State, id: VmId, attempt: Attempt) -> Option<()> {
        match s.vm(id).place {
            Place::Runner(_) => self.enter(s, id, Step::Seal(Some(attempt))),
            Place::Sealed { .. } => self.enter(s, id, Step::Load(attempt)),
            Place::Revoked(_) if !self.config.has(Flaw::RestartBeforeProof) => {
                self.enter(s, id, Step::TakeOver(attempt))
            }
            Place::Revoked(_) | Place::Stopped => self.assign(s, id, attempt),
        }
    }

    /// Commits that the attempt, and nobody else, may run the VM.
    fn assign(&self, s: &mut State, id: VmId, attempt: Attempt) -> Option<()> {
        let boot = s.node(attempt.node).known_boot;
        let (from, file) = match s.vm(id).place {
            Place::Sealed { file, sealer } => (sealer, Some(file)),
            _ => (None, None),
        };
        let runner = Runner { node: attempt.node, epoch: attempt.epoch, boot };
        s.vm_mut(id).place = Place::Runner(runner);
        self.enter(s, id, Step::Activate { attempt, from, file })
    }

    /// The locks are held: the old runner can write no more. If it handed its guest over, that is
    /// committed as a seal, and the guest goes on from its memory.
    fn held(&self, s: &mut State, id: VmId, attempt: Attempt, handed: Option<Epoch>) -> Option<()> {
        let again = self.config.has(Flaw::ConsumedFileAgain);
        let last = s.vm(id).files.last_sealed().filter(|_| again);
        match handed.or(last) {
            Some(file) => {
                s.vm_mut(id).place = Place::Sealed { file, sealer: None };
                self.enter(s, id, Step::Load(attempt))
            }
            None => self.assign(s, id, attempt),
        }
    }

    fn sealed(&self, s: &mut State, id: VmId, to: Option<Attempt>, event: Commit) -> Option<()> {
        let source = *place_runner(&s.vm(id).place)?;
        match event {
            Commit::Sealed => {
                self.take(s, id, Answer::Sealed)?;
                s.vm_mut(id).place = Place::Sealed { file: source.epoch, sealer: Some(source) };
                match to {
                    Some(attempt) => self.enter(s, id, Step::Load(attempt)),
                    None => self.enter(s, id, Step::Release(source)),
                }
            }
            Commit::Failed => {
                self.take(s, id, Answer::NotSealed)?;
                self.mark(Mark::SealFailed);
                match to {
                    Some(attempt) => self.abandon(s, id, attempt),
                    None => self.end_task(s, id),
                }
            }
            _ => None,
        }
    }

    fn loaded(
        &self,
        s: &mut State,
        id: VmId,
        task: Task,
        attempt: Attempt,
        event: Commit,
    ) -> Option<()> {
        match event {
            Commit::Loaded => {
                self.take(s, id, Answer::Loaded)?;
                self.assign(s, id, attempt)
            }
            Commit::Failed => match s.vm(id).place {
                Place::Sealed { sealer: Some(sealer), .. }
                    if task.kind == Kind::Migrate && !s.is_lost(&sealer) =>
                {
                    let source = Attempt { node: sealer.node, epoch: self.next_epoch(s, id)? };
                    let runner = Runner { epoch: source.epoch, ..sealer };
                    s.vm_mut(id).place = Place::Runner(runner);
                    self.enter(s, id, Step::ClaimBack { source, sealed: sealer.epoch })
                }
                _ => self.abandon(s, id, attempt),
            },
            _ => None,
        }
    }

    fn activated(&self, s: &mut State, id: VmId, task: Task, event: Commit) -> Option<()> {
        let Step::Activate { attempt, from, file } = task.step else { return None };
        let unknown_is_failed = self.config.has(Flaw::UnknownIsFailed);
        match event {
            Commit::Activated => {
                self.take(s, id, Answer::Activated)?;
                self.mark(match (task.kind, file) {
                    (Kind::Migrate, Some(_)) => Mark::Migrated,
                    (Kind::Restore, Some(_)) => Mark::Restored,
                    (Kind::Failover, Some(_)) => Mark::HandedOver,
                    (Kind::Failover, None) => Mark::TakenOver,
                    _ => Mark::Started,
                });
                self.end_task(s, id)
            }
            Commit::TimedOut if !unknown_is_failed => self.enter(s, id, Step::Reap(attempt)),
            Commit::Failed | Commit::TimedOut => {
                if event == Commit::Failed {
                    self.take(s, id, Answer::NeverRan)?;
                    self.mark(Mark::NeverRan);
                }
                s.vm_mut(id).place = match file {
                    Some(file) => Place::Sealed { file, sealer: from },
                    None => Place::Stopped,
                };
                self.abandon(s, id, attempt)
            }
            _ => None,
        }
    }

    fn claimed_back(
        &self,
        s: &mut State,
        id: VmId,
        source: Attempt,
        sealed: Epoch,
        event: Commit,
    ) -> Option<()> {
        match event {
            Commit::ClaimedBack => {
                self.take(s, id, Answer::ClaimedBack)?;
                self.mark(Mark::ClaimedBack);
                self.end_task(s, id)
            }
            Commit::Failed => {
                self.take(s, id, Answer::NeverRan)?;
                self.mark(Mark::ClaimBackRefused);
                s.vm_mut(id).place = Place::Sealed { file: sealed, sealer: None };
                self.enter(s, id, Step::Choose)
            }
            Commit::TimedOut => self.enter(s, id, Step::Reap(source)),
            _ => None,
        }
    }

    fn released(&self, s: &mut State, id: VmId) -> Option<()> {
        self.take(s, id, Answer::Released)?;
        let vm = s.vm_mut(id);
        match vm.place {
            Place::Sealed { file, .. } => {
                vm.place = Place::Sealed { file, sealer: None };
                self.mark(Mark::Saved);
            }
            _ => {
                vm.place = Place::Stopped;
                self.mark(Mark::Stopped);
            }
        }
        self.end_task(s, id)
    }

    /// An attempt that never ran is released; whether or not that arrives, the task goes on.
    fn abandon(&self, s: &mut State, id: VmId, attempt: Attempt) -> Option<()> {
        self.order(s, id, attempt, OrderKind::Release);
        match s.vm(id).place {
            Place::Runner(_) => self.end_task(s, id),
            _ => self.enter(s, id, Step::Choose),
        }
    }

    /// Consumes an answer that has come.
    fn take(&self, s: &mut State, id: VmId, answer: Answer) -> Option<()> {
        s.vm_mut(id).answers.remove(&answer).then_some(())
    }

    fn next_epoch(&self, s: &mut State, id: VmId) -> Option<Epoch> {
        let vm = s.vm_mut(id);
        let next = vm.epoch.next();
        // The second VM is there for what the two share; it gets fewer attempts.
        let most = Epoch(self.config.epoch_max.0 - id.0);
        (next <= most).then_some(())?;
        vm.epoch = next;
        Some(next)
    }

    /// Comes to a step: answers to the one before are late now, and its orders are given.
    fn enter(&self, s: &mut State, id: VmId, step: Step) -> Option<()> {
        let vm = s.vm_mut(id);
        vm.answers.clear();
        vm.task = vm.task.map(|task| Task { step, ..task });
        let place = vm.place;
        match step {
            Step::Choose => {}
            Step::Prepare(attempt) => self.order(s, id, attempt, OrderKind::Prepare),
            Step::TakeOver(attempt) => self.order(s, id, attempt, OrderKind::TakeOver),
            Step::Seal(load_at) => {
                let Runner { node, epoch, .. } = *place_runner(&place)?;
                self.order(s, id, Attempt { node, epoch }, OrderKind::Seal { load_at });
            }
            Step::Load(attempt) => {
                let Place::Sealed { file, .. } = place else { return None };
                self.order(s, id, attempt, OrderKind::Load { file });
            }
            Step::Activate { attempt, from, file } => {
                if let Some(Runner { node, epoch, .. }) = from {
                    self.order(s, id, Attempt { node, epoch }, OrderKind::Release);
                }
                self.order(s, id, attempt, OrderKind::Activate { file });
            }
            Step::Reap(attempt) => self.order(s, id, attempt, OrderKind::Release),
            Step::ClaimBack { source, sealed } => {
                self.order(s, id, source, OrderKind::ClaimBack { sealed });
            }
            Step::Release(Runner { node, epoch, .. }) => {
                self.order(s, id, Attempt { node, epoch }, OrderKind::Release);
            }
        }
        Some(())
    }

    fn end_task(&self, s: &mut State, id: VmId) -> Option<()> {
        let vm = s.vm_mut(id);
        vm.task = None;
        vm.answers.clear();
        Some(())
    }

    /// Gives an order. It may arrive at once, late, several times or never.
    pub(crate) fn order(&self, s: &mut State, id: VmId, to: Attempt, kind: OrderKind) {
        let boot = match self.config.has(Flaw::OrdersWithoutBoot) {
            true => Boot(0),
            false => s.node(to.node).known_boot,
        };
        let order = Order { node: to.node, epoch: to.epoch, kind, boot };
        s.vm_mut(id).orders.insert(order);
    }

    /// A VMM that the state has no place for is released: `reconcile.rs::strays`.
    pub(crate) fn release_stray(
        &self,
        s: &mut State,
        id: VmId,
        node: NodeId,
        epoch: Epoch,
    ) -> Option<()> {
        (!is_expected(s.vm(id), node, epoch) && !s.node(node).unknown).then_some(())?;
        self.mark(Mark::StrayReleased);
        self.order(s, id, Attempt { node, epoch }, OrderKind::Release);
        Some(())
    }
}

/// The runner of a place, as `Place::runner`.
pub(crate) fn place_runner(place: &Place) -> Option<&Runner> {
    match place {
        Place::Runner(runner) => Some(runner),
        _ => None,
    }
}

/// `reconcile.rs::is_expected`.
pub(crate) fn is_expected(vm: &Vm, node: NodeId, epoch: Epoch) -> bool {
    let here = |runner: &Runner| runner.node == node && runner.epoch == epoch;
    let placed = match &vm.place {
        Place::Stopped => false,
        Place::Runner(runner) | Place::Revoked(runner) => here(runner),
        Place::Sealed { sealer, .. } => vm.task.is_some() && sealer.as_ref().is_some_and(here),
    };
    let this = Attempt { node, epoch };
    let in_task = vm.task.is_some_and(|task| match task.step {
        Step::Prepare(it) | Step::TakeOver(it) | Step::Load(it) | Step::Reap(it) => it == this,
        Step::Seal(it) => it == Some(this),
        Step::Activate { attempt, from, .. } => attempt == this || from.as_ref().is_some_and(here),
        Step::ClaimBack { source, sealed } => {
            source == this || (source.node == node && sealed == epoch)
        }
        Step::Release(runner) => here(&runner),
        Step::Choose => false,
    });
    placed || in_task
}
