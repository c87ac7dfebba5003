//! The machine of one VM on one node: which orders are admitted, and what each of them does.
//!
//! The owner of the record is the VM's task in the agent; it asks [`Machine::admit`], carries the
//! action out, and reports with [`Machine::complete`]. One order is under way at a time.
//!
//! ```text
//!            Prepare                 TakeOver             LoadState
//!   (none) ----------> preparing --> prepared --> locked --+--> loaded
//!     ^                    |             |          |      |      |
//!     |     failed: killed |             +----------+------+------+ Activate
//!     +--------------------+                        v
//!     |                                         activating
//!     |                                             v          Seal              (failed: the
//!     |                        +-----------------> active <--------> sealing      guest goes on)
//!     |                        | ClaimBack, epoch rises                 |
//!     |                        +----------------------------- sealed <--+
//!     |
//!     |   Release from any phase                    the process dies in any phase
//!     +<---------------------------- releasing                 ended
//!     +<------------------------------------------------ Release of an ended one
//! ```
//!
//! - At most one incarnation exists: a Prepare under a higher epoch replaces one that never ran a
//!   guest or whose process has ended, and is refused while any other lives.
//! - The *floor* is the highest epoch that was released here; nothing at or below it is admitted
//!   again. It is durable before a release is answered. An agent that dies before has promised
//!   nothing: the release is ordered again; one that finds a VMM at or below the floor ends it. It
//!   lives in the runtime directory, whose life is the boot's: after a reboot nothing can run that
//!   would need it.
//! - A release whose VMM would not end in time stays `releasing`; it is complete when the process
//!   ends after all, whether or not the release is ordered again.
//! - A crash of the agent loses nothing else: the VMM's own status rebuilds the phase
//!   ([`Incarnation::see`]), and what is sent (`may_have_run`, `claiming`, `loading`) is recorded
//!   before it is sent.
//! - What was sealed is still told when the process has ended, and by a later agent too: a file
//!   whose seal nobody has committed yet is worth the guest's memory.
//! - A start that the VMM refuses, while no earlier one is unaccounted for, is *given up*: the VMM
//!   is released and the floor raised to the epoch, so that "the guest has not run and never will"
//!   is true when it is told, and stays true.
//! - The highest term of a leader that this node heard of is kept ([`Standing::term`]), so that a
//!   deposed one is not obeyed; so is the highest task that sealed the VM, so that the late Seal of
//!   a task that is over does not stop a guest that nobody will run again.

use bellwether_types::{Arbiter, Epoch, VmId};

use crate::incarnation::{Incarnation, Phase, VmmSight};
use crate::order::{Action, Answer, Order, Outcome, Stamped};
use crate::refusal::Refusal;

/// What must be on the disk of this boot before a release answers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Durable {
    pub floor: Epoch,
    pub term: u64,
    /// The highest task for which a Seal or a PreCopy was admitted; 0 for none.
    pub seal_task: u64,
    /// The last incarnation that was released, so that a repeated release answers as before.
    pub released: Option<Released>,
}

/// How an incarnation ended in a release.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Released {
    /// Its epoch.
    pub epoch: Epoch,
    /// The floor with which it was released: a release of any epoch in between was about it.
    pub up_to: Epoch,
    pub reason: String,
    /// The epoch under which it was to run and is proven never to have run.
    pub never_ran: Option<Epoch>,
}

/// How this node stands with the controllers at the moment of an order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// The node's lease has not expired.
    pub lease_live: bool,
    /// A registration or renewal of this boot has succeeded recently.
    pub contact_recent: bool,
    /// The highest term that this node heard of, whatever VM it was about.
    pub term: u64,
}

/// The state of one VM on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    vm: VmId,
    durable: Durable,
    current: Option<Incarnation>,
}

impl Machine {
    /// The machine of a VM, from what the runtime directory remembers of it.
    pub fn new(vm: VmId, durable: Durable) -> Self {
        Self { vm, durable, current: None }
    }

    pub fn vm(&self) -> VmId {
        self.vm
    }

    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    pub fn current(&self) -> Option<&Incarnation> {
        self.current.as_ref()
    }

    /// Takes in an incarnation that an earlier agent left. Answers false when its epoch has been
    /// released already: then its release is to be finished.
    pub fn adopt(&mut self, mut found: Incarnation) -> bool {
        // Whatever was sent by an agent that died has gone unanswered.
        found.start_lost |= found.may_have_run;
        found.load_lost |= found.loading.is_some();
        let wanted = found.epoch > self.durable.floor;
        if !wanted {
            found.phase = Phase::Releasing;
        }
        self.current = Some(found);
        wanted
    }

    /// The VMM told its state. Called between orders only.
    pub fn see(&mut self, sight: &VmmSight) {
        if let Some(current) = &mut self.current {
            current.see(sight);
        }
    }

    /// Whether a release has begun and has not been completed.
    pub fn is_releasing(&self) -> bool {
        self.current.as_ref().is_some_and(|current| current.phase == Phase::Releasing)
    }

    /// The VMM's process has ended by itself and was reaped. Called between orders only: one that
    /// is releasing then has outlived its release, and [`Machine::finish_release`] completes that
    /// when the floor is durable.
    pub fn ended(&mut self, reason: &str) {
        if let Some(current) = &mut self.current {
            current.end(reason);
        }
    }

    /// A release that an earlier agent began, or that had no answer in time, is complete.
    pub fn finish_release(&mut self, reason: &str) {
        self.released(reason, None);
    }

    /// Decides about an order. What is admitted is under way until [`Machine::complete`].
    pub fn admit(&mut self, stamped: &Stamped, standing: Standing) -> Result<Action, Refusal> {
        let seen = self.durable.term.max(standing.term);
        if stamped.term < seen {
            let (vm, order) = (self.vm, stamped.order.word());
            return Err(Refusal::OldTerm { vm, order, term: stamped.term, seen });
        }
        self.durable.term = stamped.term;
        if stamped.order == Order::Release {
            return Ok(self.admit_release(stamped.epoch));
        }
        if stamped.order == Order::RemoveState {
            return Ok(Action::RemoveState);
        }
        if stamped.epoch <= self.durable.floor {
            return Err(self.released_refusal(stamped));
        }
        match stamped.order {
            Order::Prepare { arbiter } => self.admit_prepare(stamped.epoch, arbiter),
            _ => self.admit_on_current(stamped, standing),
        }
    }

    fn released_refusal(&self, stamped: &Stamped) -> Refusal {
        let (vm, order, epoch) = (self.vm, stamped.order.word(), stamped.epoch);
        let never_ran = self.durable.released.as_ref().and_then(|released| released.never_ran);
        match stamped.order {
            Order::Activate { .. } | Order::ClaimBack { .. } if never_ran == Some(epoch) => {
                Refusal::NeverRan { vm, order, epoch }
            }
            _ => Refusal::Released { vm, order, epoch, floor: self.durable.floor },
        }
    }

    fn admit_release(&mut self, epoch: Epoch) -> Action {
        if let Some(current) = &mut self.current
            && current.epoch <= epoch
        {
            // An incarnation that has ended keeps its reason for the answer.
            if current.phase != Phase::Ended {
                current.phase = Phase::Releasing;
            }
            self.raise_floor(epoch);
            return Action::Release;
        }
        self.raise_floor(epoch);
        let before = self.durable.released.as_ref();
        let reason = match before.filter(|it| (it.epoch..=it.up_to).contains(&epoch)) {
            Some(released) => released.reason.clone(),
            None => "none".to_owned(),
        };
        Action::Answer(Answer::Released { reason })
    }

    fn raise_floor(&mut self, epoch: Epoch) {
        self.durable.floor = self.durable.floor.max(epoch);
    }

    fn admit_prepare(&mut self, epoch: Epoch, arbiter: Arbiter) -> Result<Action, Refusal> {
        let replace = match &self.current {
            None => None,
            Some(current) if current.epoch > epoch => {
                return Err(Refusal::OtherEpoch {
                    vm: self.vm,
                    order: "prepare",
                    epoch,
                    current: current.epoch,
                    phase: current.phase,
                });
            }
            Some(current) if current.epoch == epoch => match self.repeat_prepare(current)? {
                Some(answer) => return Ok(answer),
                None => Some(epoch),
            },
            Some(current) => Some(self.replaceable(current, epoch)?),
        };
        // What is replaced under a higher epoch is released by it: its epoch never comes back.
        if let Some(old) = replace.filter(|old| *old < epoch) {
            self.raise_floor(old);
        }
        self.current = Some(Incarnation::preparing(epoch, arbiter));
        Ok(Action::Prepare { replace })
    }

    /// The same Prepare again: the answer as before, or none to create it anew.
    fn repeat_prepare(&self, current: &Incarnation) -> Result<Option<Action>, Refusal> {
        match current.phase {
            Phase::Ended if current.may_have_run => Err(self.ended_refusal("prepare", current)),
            // It never ran a guest, so the epoch is as good as unused.
            Phase::Ended | Phase::Preparing => Ok(None),
            _ => Ok(Some(Action::Answer(Answer::Prepared { prepare_us: current.prepare_us }))),
        }
    }

    fn replaceable(&self, current: &Incarnation, epoch: Epoch) -> Result<Epoch, Refusal> {
        let idle = !current.may_have_run && current.phase != Phase::Releasing;
        if idle || current.phase == Phase::Ended {
            return Ok(current.epoch);
        }
        Err(Refusal::LowerLives {
            vm: self.vm,
            epoch,
            current: current.epoch,
            phase: current.phase,
        })
    }

    fn ended_refusal(&self, order: &'static str, current: &Incarnation) -> Refusal {
        Refusal::Ended { vm: self.vm, order, epoch: current.epoch, reason: current.reason.clone() }
    }

    fn admit_on_current(
        &mut self,
        stamped: &Stamped,
        standing: Standing,
    ) -> Result<Action, Refusal> {
        let order = stamped.order.word();
        let Some(current) = &self.current else {
            return Err(Refusal::NoVmm { vm: self.vm, order, epoch: stamped.epoch });
        };
        if current.uncertain {
            return Err(Refusal::Uncertain { vm: self.vm, order, epoch: stamped.epoch });
        }
        if current.epoch != runner_of(stamped, current) {
            return Err(Refusal::OtherEpoch {
                vm: self.vm,
                order,
                epoch: stamped.epoch,
                current: current.epoch,
                phase: current.phase,
            });
        }
        if current.phase == Phase::Ended {
            match (&stamped.order, &current.sealed) {
                (Order::Seal, Some(sealed)) => {
                    return Ok(Action::Answer(Answer::Sealed(sealed.clone())));
                }
                (Order::HandOver, Some(_)) => return Ok(Action::Answer(Answer::Done)),
                _ => {}
            }
            let refusal = self.ended_refusal(order, current);
            let given_up = starts(&stamped.order) && self.give_up(stamped);
            return if given_up { Ok(Action::GiveUp("its VMM has ended")) } else { Err(refusal) };
        }
        if let Order::Activate { hash } = stamped.order
            && current.is_idle()
            && !current.goes_on_from(hash)
        {
            let why = "its VMM has not loaded the state that the order names";
            let refusal = Refusal::NotLoaded { vm: self.vm, epoch: stamped.epoch };
            return if self.give_up(stamped) { Ok(Action::GiveUp(why)) } else { Err(refusal) };
        }
        self.check_task(stamped)?;
        let action = self.action_on(stamped, current)?;
        if matches!(action, Action::Start | Action::ClaimBack) {
            self.check_standing(stamped, current.arbiter, standing)?;
        }
        self.begin(&action, stamped);
        Ok(action)
    }

    /// The action for an order about the current incarnation, which lives.
    fn action_on(&self, stamped: &Stamped, current: &Incarnation) -> Result<Action, Refusal> {
        use Phase::{Active, Loaded, Locked, Prepared, Sealed};
        let wrong = |needs| Err(self.wrong_phase(stamped, current, needs));
        match (&stamped.order, current.phase) {
            (Order::TakeOver, _) if current.locked => {
                Ok(Action::Answer(Answer::TakenOver { handover: current.handover }))
            }
            (Order::TakeOver, Prepared | Loaded) => Ok(Action::Lock),
            (Order::TakeOver, _) => wrong("one that is prepared or loaded"),
            (Order::LoadState { hash }, _) => self.load_on(stamped, current, *hash),
            (Order::Activate { .. }, Prepared | Locked | Loaded) => Ok(Action::Start),
            (Order::Activate { .. }, Active) => {
                Ok(Action::Answer(Answer::Activated(current.activated.unwrap_or_default())))
            }
            (Order::Activate { .. }, _) => wrong("one that is prepared, locked or loaded"),
            (Order::LoadAhead, Prepared | Locked) => Ok(Action::LoadAhead),
            (Order::LoadAhead, _) => wrong("one that is prepared"),
            (Order::PreCopy, Active) => Ok(Action::PreCopy),
            (Order::PreCopy, _) => wrong("one that is active"),
            (Order::EndPreCopy, Active) => Ok(Action::EndPreCopy),
            (Order::EndPreCopy, _) => Ok(Action::Answer(Answer::Done)),
            (Order::Seal, Active) => Ok(Action::Save),
            (Order::Seal, Sealed) => match &current.sealed {
                Some(sealed) => Ok(Action::Answer(Answer::Sealed(sealed.clone()))),
                None => wrong("one whose VMM tells its state file"),
            },
            (Order::Seal, _) => wrong("one that is active"),
            (Order::ClaimBack { sealed_epoch }, _)
                if current.claimed_from == Some(*sealed_epoch) =>
            {
                Ok(Action::Answer(Answer::ClaimedBack(current.activated.unwrap_or_default())))
            }
            (Order::ClaimBack { sealed_epoch }, Sealed)
                if *sealed_epoch == current.epoch && current.epoch < stamped.epoch =>
            {
                Ok(Action::ClaimBack)
            }
            (Order::ClaimBack { .. }, _) => wrong("one that is sealed"),
            (Order::HandOver, Sealed) => Ok(Action::HandOver),
            (Order::HandOver, _) => wrong("one that is sealed"),
            (Order::Pause, Active) => Ok(Action::Pause),
            (Order::Resume, Active) => Ok(Action::Resume),
            (Order::Shutdown, Active) => Ok(Action::Shutdown),
            (Order::Pause | Order::Resume | Order::Shutdown, _) => wrong("one that is active"),
            (Order::Console, Phase::Preparing | Phase::Releasing) => wrong("one that exists"),
            (Order::Console, _) => Ok(Action::Console),
            (Order::Prepare { .. } | Order::Release | Order::RemoveState, _) => {
                wrong("nothing; it is decided elsewhere")
            }
        }
    }

    fn load_on(
        &self,
        stamped: &Stamped,
        current: &Incarnation,
        hash: [u8; 32],
    ) -> Result<Action, Refusal> {
        let other = Refusal::OtherFile { vm: self.vm, epoch: stamped.epoch };
        match current.phase {
            _ if current.loaded == Some(hash) => {
                Ok(Action::Answer(Answer::Loaded { load_us: current.load_us }))
            }
            Phase::Loaded => Err(other),
            // An earlier one may still arrive, and then nobody could say which of the two it is.
            Phase::Prepared | Phase::Locked if current.loading.is_some_and(|it| it != hash) => {
                Err(other)
            }
            Phase::Prepared | Phase::Locked => Ok(Action::Load),
            _ => Err(self.wrong_phase(stamped, current, "one that is prepared")),
        }
    }

    fn wrong_phase(
        &self,
        stamped: &Stamped,
        current: &Incarnation,
        needs: &'static str,
    ) -> Refusal {
        let (vm, order, epoch) = (self.vm, stamped.order.word(), stamped.epoch);
        Refusal::WrongPhase { vm, order, epoch, phase: current.phase, needs }
    }

    /// A saga that has ended asks for nothing; what it asked before may still be on its way.
    fn check_task(&self, stamped: &Stamped) -> Result<(), Refusal> {
        let (task, seen) = (stamped.task, self.durable.seal_task);
        let order = stamped.order.word();
        match writes_state(&stamped.order) && task != 0 && task < seen {
            true => Err(Refusal::OldTask { vm: self.vm, order, epoch: stamped.epoch, task, seen }),
            false => Ok(()),
        }
    }

    fn check_standing(
        &self,
        stamped: &Stamped,
        arbiter: Arbiter,
        standing: Standing,
    ) -> Result<(), Refusal> {
        let (vm, order, epoch) = (self.vm, stamped.order.word(), stamped.epoch);
        match arbiter {
            Arbiter::Lease if !standing.lease_live => Err(Refusal::NoLease { vm, order, epoch }),
            _ if !standing.contact_recent => Err(Refusal::NotRegistered { vm, order, epoch }),
            _ => Ok(()),
        }
    }

    /// Notes that an action begins, so that observations and a restarted agent know of it.
    fn begin(&mut self, action: &Action, stamped: &Stamped) {
        if writes_state(&stamped.order) {
            self.durable.seal_task = self.durable.seal_task.max(stamped.task);
        }
        let Some(current) = &mut self.current else { return };
        match action {
            Action::Start => {
                current.phase = Phase::Activating;
                current.may_have_run = true;
            }
            Action::ClaimBack => current.claiming = Some(stamped.epoch),
            Action::Load => {
                if let Order::LoadState { hash } = stamped.order {
                    current.loading = Some(hash);
                }
            }
            Action::Save => current.phase = Phase::Sealing,
            _ => {}
        }
    }

    /// After a start that was refused: if the guest is proven never to have run under the order's
    /// epoch, makes sure that it never will. The incarnation is then to be released, and the
    /// answer is [`Answer::GivenUp`]; it is what lets the cluster start the VM elsewhere at once.
    pub fn give_up(&mut self, stamped: &Stamped) -> bool {
        let Some(current) = &mut self.current else { return false };
        if !current.never_ran(stamped.epoch) {
            return false;
        }
        if current.phase != Phase::Ended {
            current.phase = Phase::Releasing;
        }
        self.raise_floor(stamped.epoch);
        true
    }

    /// Reports how an admitted order ended.
    pub fn complete(&mut self, stamped: &Stamped, outcome: &Outcome) {
        match outcome {
            Outcome::Done(Answer::Released { reason }) => self.released(reason, None),
            Outcome::Done(Answer::GivenUp) => self.released("given up", Some(stamped.epoch)),
            Outcome::Done(answer) => self.done(stamped, answer),
            Outcome::Failed => self.failed(&stamped.order),
            Outcome::Unknown => {
                if let Some(current) = &mut self.current {
                    current.uncertain = true;
                    current.start_lost |= starts(&stamped.order);
                    current.load_lost |= matches!(stamped.order, Order::LoadState { .. });
                }
            }
        }
    }

    fn released(&mut self, reason: &str, never_ran: Option<Epoch>) {
        if let Some(gone) = self.current.take() {
            let idle = gone.never_ran(gone.epoch).then_some(gone.epoch);
            self.durable.released = Some(Released {
                never_ran: never_ran.or(idle),
                epoch: gone.epoch,
                up_to: self.durable.floor,
                reason: reason.to_owned(),
            });
        }
    }

    fn done(&mut self, stamped: &Stamped, answer: &Answer) {
        let Some(current) = &mut self.current else { return };
        match answer {
            Answer::Prepared { prepare_us } => {
                current.prepare_us = *prepare_us;
                current.phase = Phase::Prepared;
            }
            Answer::TakenOver { handover } => {
                current.handover = *handover;
                current.locked = true;
                current.phase = current.idle_phase();
            }
            Answer::Loaded { load_us } => {
                if let Order::LoadState { hash } = stamped.order {
                    current.loaded = Some(hash);
                }
                current.loading = None;
                current.load_us = *load_us;
                current.phase = Phase::Loaded;
            }
            Answer::Activated(timings) => {
                current.activated = Some(*timings);
                current.locked = true;
                current.phase = Phase::Active;
            }
            Answer::Sealed(sealed) => {
                current.sealed = Some(sealed.clone());
                current.phase = Phase::Sealed;
            }
            Answer::ClaimedBack(timings) => {
                current.claimed_from = Some(current.epoch);
                current.claiming = None;
                current.epoch = stamped.epoch;
                current.activated = Some(*timings);
                current.sealed = None;
                current.phase = Phase::Active;
            }
            Answer::Released { .. } | Answer::GivenUp | Answer::Done => {}
        }
    }

    fn failed(&mut self, order: &Order) {
        let Some(current) = &mut self.current else { return };
        match order {
            Order::Prepare { .. } => self.current = None,
            Order::Activate { .. } => {
                current.phase = current.idle_phase();
                // The VMM says that it did not run, and no earlier start is unaccounted for.
                current.may_have_run = current.start_lost;
            }
            Order::ClaimBack { .. } if !current.start_lost => current.claiming = None,
            Order::LoadState { .. } if !current.load_lost => current.loading = None,
            Order::Seal => current.phase = Phase::Active,
            _ => {}
        }
    }
}

/// Whether the order is about the state file of its task: a late one must not end what a newer task
/// has begun.
fn writes_state(order: &Order) -> bool {
    matches!(order, Order::Seal | Order::PreCopy | Order::EndPreCopy)
}

/// Whether the order lets the guest run.
fn starts(order: &Order) -> bool {
    matches!(order, Order::Activate { .. } | Order::ClaimBack { .. })
}

/// The epoch that the incarnation must have for the order to be about it. A claim back names the
/// new epoch and finds the sealed one, or, when it is repeated, its own.
fn runner_of(stamped: &Stamped, current: &Incarnation) -> Epoch {
    match stamped.order {
        Order::ClaimBack { sealed_epoch }
            if sealed_epoch < stamped.epoch && current.claimed_from != Some(sealed_epoch) =>
        {
            sealed_epoch
        }
        _ => stamped.epoch,
    }
}
