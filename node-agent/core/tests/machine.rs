//! The machine against a model of the node's processes: random orders of several leaders, in any
//! sequence, repeated and delayed, with VMMs that fail, die and do not answer, and with agents
//! that crash. Invariant 1 is checked after every step.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_agent_core::{
    Action, ActivateTimings, Answer, Durable, Incarnation, Machine, Order, Outcome, Phase, Refusal,
    SaveTimings, SealedState, Stamped, Standing, VmmSight, VmmState,
};
use bellwether_types::{Arbiter, BootId, Epoch, StateFileRef, VmId};
use proptest::prelude::*;

const WELL: Standing = Standing { lease_live: true, contact_recent: true, term: 0 };

/// An activation that goes on from no state file.
const BOOT_UP: Order = Order::Activate { hash: None };

fn boot() -> BootId {
    BootId::from_uuid(uuid::Uuid::from_u128(1))
}

fn vm() -> VmId {
    VmId::from_uuid(uuid::Uuid::from_u128(7))
}

/// One process, by the epoch under which it was prepared.
#[derive(Clone, Debug)]
struct Process {
    state: VmmState,
    epoch: Epoch,
    locked: bool,
    loaded: Option<[u8; 32]>,
}

/// What really exists on the node.
struct World {
    machine: Machine,
    processes: BTreeMap<Epoch, Process>,
    /// The name of the current incarnation's directory: the epoch of its Prepare.
    home: Epoch,
    /// The runtime directory: the floor, and what is recorded of the incarnation.
    durable: Durable,
    record: Option<Incarnation>,
    /// Every epoch at or below this was answered as released.
    answered_released: Epoch,
    /// Under which epochs the guest ran, and under which it was promised never to.
    ran: BTreeSet<Epoch>,
    never: BTreeSet<Epoch>,
}

/// What befalls the order.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Works,
    Fails,
    /// The VMM does it, the answer is lost.
    DoneUnanswered,
    /// The VMM does not do it, the answer is lost.
    UndoneUnanswered,
}

#[derive(Clone, Debug)]
enum Step {
    Order(Stamped, Fate),
    VmmDies,
    StatusSeen,
    AgentCrashes,
}

impl World {
    fn new() -> Self {
        Self {
            machine: Machine::new(vm(), Durable::default()),
            processes: BTreeMap::new(),
            home: Epoch(0),
            durable: Durable::default(),
            record: None,
            answered_released: Epoch(0),
            ran: BTreeSet::new(),
            never: BTreeSet::new(),
        }
    }

    fn sight(&self) -> Option<VmmSight> {
        let process = self.processes.get(&self.home)?;
        Some(VmmSight {
            state: process.state,
            epoch: process.epoch,
            locked: process.locked,
            reason: String::new(),
            memory_loaded_bytes: 0,
            memory_total_bytes: 0,
            sealed: (process.state == VmmState::Sealed).then(|| sealed(process.epoch)),
            handover: None,
        })
    }

    fn step(&mut self, step: &Step) -> Option<Result<Answer, Refusal>> {
        let result = match step {
            Step::Order(stamped, fate) => self.order(stamped, *fate),
            Step::VmmDies => {
                let releasing = self.machine.is_releasing();
                match self.processes.remove(&self.home) {
                    Some(_) if releasing => self.machine.finish_release("killed"),
                    Some(_) => self.machine.ended("killed"),
                    None => {}
                }
                None
            }
            Step::StatusSeen => {
                if let Some(sight) = self.sight() {
                    self.machine.see(&sight);
                }
                None
            }
            Step::AgentCrashes => {
                self.crash();
                None
            }
        };
        let releasing = self.machine.current().is_some_and(|it| it.phase == Phase::Releasing);
        // The floor of a release that has no answer need not be on the disk.
        match releasing {
            true => self.record = self.machine.current().cloned(),
            false => self.persist(),
        }
        self.check();
        result
    }

    fn persist(&mut self) {
        self.durable = self.machine.durable().clone();
        self.record = self.machine.current().cloned();
    }

    /// A new agent has only what was recorded, and what the process says.
    fn crash(&mut self) {
        self.machine = Machine::new(vm(), self.durable.clone());
        let Some(record) = self.record.clone() else { return };
        let found = Incarnation {
            loaded: record.loaded,
            loading: record.loading,
            may_have_run: record.may_have_run,
            claiming: record.claiming,
            claimed_from: record.claimed_from,
            prepare_us: record.prepare_us,
            sealed: record.sealed,
            uncertain: true,
            ..Incarnation::preparing(record.epoch, record.arbiter)
        };
        let wanted = self.machine.adopt(found);
        match self.sight() {
            _ if !wanted => {
                self.processes.remove(&self.home);
            }
            Some(sight) => self.machine.see(&sight),
            None => self.machine.ended("killed"),
        }
    }

    fn order(&mut self, stamped: &Stamped, fate: Fate) -> Option<Result<Answer, Refusal>> {
        let action = match self.machine.admit(stamped, WELL) {
            Ok(action) => action,
            Err(refusal) => {
                if let Refusal::NeverRan { epoch, .. } = refusal {
                    self.never.insert(epoch);
                }
                return Some(Err(refusal));
            }
        };
        if stamped.order != Order::Release {
            assert!(
                stamped.epoch > self.answered_released,
                "{stamped:?} admitted although {} was released",
                self.answered_released
            );
        }
        if let Action::Answer(answer) = action {
            self.note_released(stamped, &answer);
            if let Answer::Sealed(sealed) = &answer {
                let later = self.ran.iter().any(|ran| *ran > sealed.file.epoch);
                assert!(
                    !later,
                    "{sealed:?} is told, and the guest went on after it: {:?}",
                    self.ran
                );
            }
            return Some(Ok(answer));
        }
        // Persist before send: may_have_run is on the disk before the VMM hears, and so is the
        // floor, but for a release, where it is there before the answer.
        if action != Action::Release {
            self.persist();
        }
        let outcome = match action {
            Action::GiveUp(_) => self.given_up(stamped),
            action => self.execute(stamped, &action, fate),
        };
        self.machine.complete(stamped, &outcome);
        let starts = matches!(stamped.order, Order::Activate { .. } | Order::ClaimBack { .. });
        if outcome == Outcome::Failed && starts && self.machine.give_up(stamped) {
            self.persist();
            let outcome = self.given_up(stamped);
            self.machine.complete(stamped, &outcome);
            return None;
        }
        match outcome {
            Outcome::Done(Answer::GivenUp) => None,
            Outcome::Done(answer) => {
                self.note_released(stamped, &answer);
                Some(Ok(answer))
            }
            Outcome::Failed | Outcome::Unknown => None,
        }
    }

    fn note_released(&mut self, stamped: &Stamped, answer: &Answer) {
        if matches!(answer, Answer::Released { .. }) {
            self.answered_released = self.answered_released.max(stamped.epoch);
        }
    }

    fn given_up(&mut self, stamped: &Stamped) -> Outcome {
        self.processes.remove(&self.home);
        self.never.insert(stamped.epoch);
        Outcome::Done(Answer::GivenUp)
    }

    fn execute(&mut self, stamped: &Stamped, action: &Action, fate: Fate) -> Outcome {
        match action {
            Action::Prepare { replace } => {
                if replace.is_some() {
                    self.processes.remove(&self.home);
                }
                self.home = stamped.epoch;
                if matches!(fate, Fate::Fails) {
                    return Outcome::Failed;
                }
            }
            // The shell answers a release only when the process is reaped.
            Action::Release => {
                if !matches!(fate, Fate::Works) {
                    return Outcome::Unknown;
                }
                self.processes.remove(&self.home);
                return Outcome::Done(Answer::Released { reason: "stopped".into() });
            }
            // The record is in the claim, and the process goes with its locks.
            Action::HandOver if matches!(fate, Fate::Works) => {
                self.processes.remove(&self.home);
                self.machine.ended("handed over");
                return Outcome::Done(Answer::Done);
            }
            _ => {}
        }
        match fate {
            Fate::Fails => Outcome::Failed,
            Fate::UndoneUnanswered => Outcome::Unknown,
            Fate::DoneUnanswered => {
                self.apply(stamped, action);
                Outcome::Unknown
            }
            Fate::Works => Outcome::Done(self.apply(stamped, action)),
        }
    }

    fn apply(&mut self, stamped: &Stamped, action: &Action) -> Answer {
        if matches!(action, Action::Prepare { .. }) {
            let process =
                Process { state: VmmState::Created, epoch: Epoch(0), locked: false, loaded: None };
            let old = self.processes.insert(stamped.epoch, process);
            assert!(old.is_none(), "a second process in the directory of epoch {}", stamped.epoch);
            return Answer::Prepared { prepare_us: 11 };
        }
        let process = self.processes.get_mut(&self.home).expect("an action needs its VMM");
        if matches!(action, Action::Start | Action::ClaimBack) {
            self.ran.insert(stamped.epoch);
        }
        match action {
            Action::Lock => {
                process.locked = true;
                process.epoch = stamped.epoch;
                Answer::TakenOver { handover: None }
            }
            Action::Load => {
                let Order::LoadState { hash } = stamped.order else { unreachable!() };
                process.loaded = Some(hash);
                process.state = VmmState::Loaded;
                Answer::Loaded { load_us: 12 }
            }
            Action::Start => {
                let Order::Activate { hash } = stamped.order else { unreachable!() };
                assert_eq!(process.loaded, hash, "a guest that goes on from something else");
                process.locked = true;
                process.epoch = stamped.epoch;
                process.state = VmmState::Running;
                Answer::Activated(ActivateTimings::default())
            }
            Action::Save => {
                process.state = VmmState::Sealed;
                Answer::Sealed(sealed(process.epoch))
            }
            Action::ClaimBack => {
                assert_eq!(process.state, VmmState::Sealed);
                assert!(stamped.epoch > process.epoch);
                process.epoch = stamped.epoch;
                process.state = VmmState::Running;
                Answer::ClaimedBack(ActivateTimings::default())
            }
            _ => Answer::Done,
        }
    }

    fn check(&self) {
        assert!(self.processes.len() <= 1, "two live incarnations: {:?}", self.processes);
        for process in self.processes.values() {
            let releasing =
                self.machine.current().is_some_and(|current| current.phase == Phase::Releasing);
            let released = process.epoch != Epoch(0) && process.epoch <= self.answered_released;
            assert!(!released || releasing, "{process:?} lives after its release");
        }
        let lied: Vec<_> = self.ran.intersection(&self.never).collect();
        assert!(lied.is_empty(), "promised never to run, and ran: {lied:?}");
        if !self.processes.is_empty() {
            assert!(self.machine.current().is_some(), "a process that nobody knows of");
        }
    }
}

fn sealed(epoch: Epoch) -> SealedState {
    let file =
        StateFileRef { path: format!("/s/state/{epoch}").into(), hash: [1; 32], epoch, bytes: 1 };
    SealedState { file, timings: SaveTimings::default() }
}

fn orders() -> impl Strategy<Value = Order> {
    prop_oneof![
        4 => Just(Order::Prepare { arbiter: Arbiter::Storage }),
        2 => Just(Order::TakeOver),
        2 => Just(Order::LoadState { hash: [1; 32] }),
        1 => Just(Order::LoadState { hash: [2; 32] }),
        3 => Just(BOOT_UP),
        3 => Just(Order::Activate { hash: Some([1; 32]) }),
        4 => Just(Order::Seal),
        4 => (0_u64..5).prop_map(|epoch| Order::ClaimBack { sealed_epoch: Epoch(epoch) }),
        2 => Just(Order::Release),
        2 => Just(Order::HandOver),
        1 => Just(Order::Pause),
    ]
}

fn fates() -> impl Strategy<Value = Fate> {
    prop_oneof![
        6 => Just(Fate::Works),
        1 => Just(Fate::Fails),
        1 => Just(Fate::DoneUnanswered),
        1 => Just(Fate::UndoneUnanswered),
    ]
}

fn stamped() -> impl Strategy<Value = Stamped> {
    let term = prop_oneof![8 => Just(3_u64), 1 => 1_u64..5];
    (term, 0_u64..5, orders()).prop_map(|(term, epoch, order)| Stamped {
        term,
        task: 0,
        epoch: Epoch(epoch),
        boot: boot(),
        order,
    })
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (stamped(), fates()).prop_map(|(stamped, fate)| Step::Order(stamped, fate)),
        1 => Just(Step::VmmDies),
        3 => Just(Step::StatusSeen),
        1 => Just(Step::AgentCrashes),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    /// No sequence leads to two live incarnations, and nothing released comes back.
    #[test]
    fn one_incarnation_lives(steps in proptest::collection::vec(steps(), 1..60)) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
        }
    }

    /// Whatever was answered is answered the same when it is asked again at once.
    #[test]
    fn a_repeated_order_is_answered_as_before(
        steps in proptest::collection::vec(steps(), 1..60)
    ) {
        let mut world = World::new();
        for step in &steps {
            let first = world.step(step);
            if let (Step::Order(..), Some(Ok(answer))) = (step, first) {
                let second = world.step(step);
                prop_assert_eq!(second, Some(Ok(answer)), "{:?}", step);
            }
        }
    }

    /// An order of a deposed leader changes nothing.
    #[test]
    fn an_old_term_is_refused(steps in proptest::collection::vec(steps(), 1..30), late in stamped()) {
        let mut world = World::new();
        for step in steps {
            // No leader of this history is newer than the one that takes over at its end.
            world.step(&match step {
                Step::Order(stamped, fate) => {
                    Step::Order(Stamped { term: stamped.term.min(late.term), ..stamped }, fate)
                }
                other => other,
            });
        }
        let newest = Stamped { term: late.term + 1, epoch: Epoch(9), boot: boot(), order: Order::Pause, task: 0 };
        world.step(&Step::Order(newest, Fate::Works));
        let before = world.machine.clone();
        let answer = world.step(&Step::Order(late, Fate::Works));
        let refused = matches!(answer, Some(Err(Refusal::OldTerm { .. })));
        prop_assert!(refused, "{:?}", answer);
        prop_assert_eq!(before, world.machine);
    }
}

fn give(machine: &mut Machine, epoch: u64, order: Order) -> Result<Action, Refusal> {
    machine.admit(&Stamped { term: 1, task: 0, epoch: Epoch(epoch), boot: boot(), order }, WELL)
}

fn prepare() -> Order {
    Order::Prepare { arbiter: Arbiter::Storage }
}

fn load(hash: u8) -> Order {
    Order::LoadState { hash: [hash; 32] }
}

fn carry_out(world: &mut World, epoch: u64, order: Order) -> Answer {
    let stamped = Stamped { term: 1, task: 0, epoch: Epoch(epoch), boot: boot(), order };
    let answer = world.step(&Step::Order(stamped.clone(), Fate::Works));
    answer.unwrap_or_else(|| panic!("{stamped:?} has no answer")).expect("an admitted order")
}

#[test]
fn a_lower_incarnation_that_runs_is_in_the_way() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    carry_out(&mut world, 1, BOOT_UP);
    let refusal = give(&mut world.machine, 2, prepare()).unwrap_err();
    assert!(refusal.to_string().contains("epoch 1 still lives on this node (active)"));
    carry_out(&mut world, 1, Order::Release);
    carry_out(&mut world, 2, prepare());
}

#[test]
fn a_lower_incarnation_that_never_ran_is_replaced() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    let action = give(&mut world.machine, 3, prepare());
    assert_eq!(action, Ok(Action::Prepare { replace: Some(Epoch(1)) }));
    assert!(matches!(give(&mut world.machine, 1, prepare()), Err(Refusal::Released { .. })));
}

#[test]
fn a_claim_back_is_answered_twice_and_moves_the_epoch() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    carry_out(&mut world, 1, BOOT_UP);
    carry_out(&mut world, 1, Order::Seal);
    let back = || Order::ClaimBack { sealed_epoch: Epoch(1) };
    let first = carry_out(&mut world, 2, back());
    assert_eq!(carry_out(&mut world, 2, back()), first);
    assert_eq!(world.machine.current().unwrap().epoch, Epoch(2));
    // Sealed once more under its new epoch, a late repeat of the old claim must not run it.
    carry_out(&mut world, 2, Order::Seal);
    let late = give(&mut world.machine, 2, back());
    assert!(matches!(late, Ok(Action::Answer(_))), "{late:?}");
    assert!(give(&mut world.machine, 2, Order::ClaimBack { sealed_epoch: Epoch(2) }).is_err());
}

#[test]
fn a_release_of_a_lower_epoch_spares_the_higher_one() {
    let mut world = World::new();
    carry_out(&mut world, 5, prepare());
    let none = Answer::Released { reason: "none".into() };
    assert_eq!(carry_out(&mut world, 4, Order::Release), none);
    assert_eq!(world.machine.current().unwrap().phase, Phase::Prepared);
}

#[test]
fn an_agent_that_died_in_a_release_finishes_it() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    carry_out(&mut world, 1, BOOT_UP);
    let release =
        Stamped { term: 1, task: 0, epoch: Epoch(1), boot: boot(), order: Order::Release };
    assert_eq!(world.machine.admit(&release, WELL), Ok(Action::Release));
    world.persist();
    world.step(&Step::AgentCrashes);
    assert!(world.processes.is_empty());
}

#[test]
fn a_refused_start_is_given_up_for_good() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    let activate = Stamped { term: 1, task: 0, epoch: Epoch(1), boot: boot(), order: BOOT_UP };
    world.step(&Step::Order(activate.clone(), Fate::Fails));
    assert!(world.processes.is_empty());
    world.step(&Step::AgentCrashes);
    let again = world.step(&Step::Order(activate, Fate::Works));
    assert!(matches!(again, Some(Err(Refusal::NeverRan { .. }))), "{again:?}");
}

#[test]
fn a_start_that_went_unanswered_is_never_given_up() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    let activate = Stamped { term: 1, task: 0, epoch: Epoch(1), boot: boot(), order: BOOT_UP };
    world.step(&Step::Order(activate.clone(), Fate::UndoneUnanswered));
    // Neither an agent that saw no answer nor its successor may trust a later refusal.
    for between in [Step::StatusSeen, Step::AgentCrashes] {
        world.step(&between);
        world.step(&Step::Order(activate.clone(), Fate::Fails));
        assert!(world.never.is_empty());
    }
    world.step(&Step::VmmDies);
    let again = world.step(&Step::Order(activate, Fate::Works));
    assert!(matches!(again, Some(Err(Refusal::Ended { .. }))), "{again:?}");
}

#[test]
fn activation_needs_what_the_arbiter_says() {
    let no_lease = Standing { lease_live: false, contact_recent: true, term: 0 };
    let no_contact = Standing { lease_live: true, contact_recent: false, term: 0 };
    for (arbiter, standing) in
        [(Arbiter::Lease, no_lease), (Arbiter::Lease, no_contact), (Arbiter::Storage, no_contact)]
    {
        let mut machine = Machine::new(vm(), Durable::default());
        let order = Stamped {
            term: 1,
            task: 0,
            epoch: Epoch(1),
            boot: boot(),
            order: Order::Prepare { arbiter },
        };
        machine.admit(&order, WELL).unwrap();
        machine.complete(&order, &Outcome::Done(Answer::Prepared { prepare_us: 1 }));
        let activate = Stamped { order: BOOT_UP, ..order };
        assert!(machine.admit(&activate, standing).is_err());
        assert_eq!(machine.admit(&activate, WELL), Ok(Action::Start));
    }
}

#[test]
fn a_load_whose_answer_was_lost_is_answered_when_it_is_repeated() {
    for between in [Step::StatusSeen, Step::AgentCrashes] {
        let mut world = World::new();
        carry_out(&mut world, 1, prepare());
        let stamped = Stamped { term: 1, task: 0, epoch: Epoch(1), boot: boot(), order: load(1) };
        world.step(&Step::Order(stamped, Fate::DoneUnanswered));
        world.step(&between);
        let again = give(&mut world.machine, 1, load(1));
        assert_eq!(again, Ok(Action::Answer(Answer::Loaded { load_us: 0 })));
        let other = give(&mut world.machine, 1, load(2));
        assert!(matches!(other, Err(Refusal::OtherFile { .. })), "{other:?}");
    }
}

#[test]
fn a_load_that_may_still_arrive_keeps_other_files_out() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    let load =
        |hash| Stamped { term: 1, task: 0, epoch: Epoch(1), boot: boot(), order: load(hash) };
    world.step(&Step::Order(load(1), Fate::Fails));
    world.step(&Step::Order(load(2), Fate::UndoneUnanswered));
    world.step(&Step::StatusSeen);
    // A later refusal says nothing of the first.
    world.step(&Step::Order(load(2), Fate::Fails));
    let other = world.machine.admit(&load(1), WELL);
    assert!(matches!(other, Err(Refusal::OtherFile { .. })), "{other:?}");
    assert_eq!(world.machine.admit(&load(2), WELL), Ok(Action::Load));
}

#[test]
fn the_late_seal_of_a_task_that_is_over_is_refused() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    carry_out(&mut world, 1, BOOT_UP);
    let seal = |task| Stamped { term: 1, task, epoch: Epoch(1), boot: boot(), order: Order::Seal };
    world.step(&Step::Order(seal(4), Fate::Fails));
    for between in [Step::StatusSeen, Step::AgentCrashes] {
        world.step(&between);
        let late = world.machine.admit(&seal(3), WELL);
        assert!(matches!(late, Err(Refusal::OldTask { task: 3, seen: 4, .. })), "{late:?}");
    }
    // The same task again, a newer one and one without a task.
    for task in [4, 5, 0] {
        assert_eq!(world.machine.clone().admit(&seal(task), WELL), Ok(Action::Save), "{task}");
    }
}

#[test]
fn a_term_that_the_node_heard_of_elsewhere_counts() {
    let mut machine = Machine::new(vm(), Durable::default());
    let stamped =
        Stamped { term: 4, task: 0, epoch: Epoch(1), boot: boot(), order: Order::Release };
    let refused = machine.admit(&stamped, Standing { term: 5, ..WELL });
    assert!(matches!(refused, Err(Refusal::OldTerm { seen: 5, .. })), "{refused:?}");
    assert_eq!(machine, Machine::new(vm(), Durable::default()));
}

#[test]
fn a_vmm_that_ends_after_its_release_gave_up_completes_it() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    carry_out(&mut world, 1, BOOT_UP);
    let release =
        Stamped { term: 1, task: 0, epoch: Epoch(1), boot: boot(), order: Order::Release };
    world.step(&Step::Order(release.clone(), Fate::UndoneUnanswered));
    assert!(world.machine.is_releasing());
    // Where the floor cannot be made durable, it has ended all the same, and is not releasing.
    let mut undurable = world.machine.clone();
    undurable.ended("killed");
    assert_eq!(undurable.current().map(|it| it.phase), Some(Phase::Ended));
    assert_eq!(undurable.admit(&release, WELL), Ok(Action::Release));
    world.step(&Step::VmmDies);
    assert_eq!(world.machine.current(), None);
    assert_eq!(
        carry_out(&mut world, 1, Order::Release),
        Answer::Released { reason: "killed".into() }
    );
}

/// Runs the guest under epoch 1 and seals it.
fn sealed_world() -> World {
    let mut world = World::new();
    for order in [prepare(), BOOT_UP, Order::Seal] {
        carry_out(&mut world, 1, order);
    }
    world
}

/// The seal may not be committed yet, and the file is all that is left of the memory.
#[test]
fn what_was_sealed_is_told_after_the_end_of_the_vmm_and_of_the_agent() {
    for end in [vec![Step::VmmDies], vec![Step::VmmDies, Step::AgentCrashes]] {
        let mut world = sealed_world();
        end.iter().for_each(|step| drop(world.step(step)));
        assert_eq!(world.machine.current().map(|it| it.phase), Some(Phase::Ended));
        assert_eq!(carry_out(&mut world, 1, Order::Seal), Answer::Sealed(sealed(Epoch(1))));
        carry_out(&mut world, 1, Order::Release);
        assert!(matches!(give(&mut world.machine, 1, Order::Seal), Err(Refusal::Released { .. })));
    }
}

#[test]
fn a_file_after_which_the_guest_may_have_gone_on_is_not_told() {
    for fate in [Fate::DoneUnanswered, Fate::UndoneUnanswered] {
        for crash in [true, false] {
            let mut world = sealed_world();
            let order = Order::ClaimBack { sealed_epoch: Epoch(1) };
            let back = Stamped { term: 1, task: 0, epoch: Epoch(2), boot: boot(), order };
            world.step(&Step::Order(back, fate));
            world.step(&Step::VmmDies);
            if crash {
                world.step(&Step::AgentCrashes);
            }
            let refused = give(&mut world.machine, 1, Order::Seal);
            assert!(matches!(refused, Err(Refusal::Ended { .. })), "{fate:?}: {refused:?}");
        }
    }
}

#[test]
fn a_pre_copy_leaves_the_guest_as_it_is_and_belongs_to_its_task() {
    let mut world = World::new();
    carry_out(&mut world, 1, prepare());
    let stamped = |task, order| Stamped { term: 1, task, epoch: Epoch(1), boot: boot(), order };
    let refused = world.machine.admit(&stamped(4, Order::PreCopy), WELL);
    assert!(matches!(refused, Err(Refusal::WrongPhase { .. })), "{refused:?}");
    assert_eq!(
        world.machine.admit(&stamped(4, Order::LoadAhead), WELL),
        Ok(Action::LoadAhead),
        "the destination is prepared"
    );
    carry_out(&mut world, 1, BOOT_UP);
    let refused = world.machine.admit(&stamped(4, Order::LoadAhead), WELL);
    assert!(matches!(refused, Err(Refusal::WrongPhase { .. })), "{refused:?}");

    assert_eq!(world.machine.admit(&stamped(4, Order::PreCopy), WELL), Ok(Action::PreCopy));
    assert_eq!(world.machine.current().map(|it| it.phase), Some(Phase::Active));
    // What an earlier task left on its way must not end what this one has begun.
    for order in [Order::PreCopy, Order::EndPreCopy, Order::Seal] {
        let late = world.machine.admit(&stamped(3, order), WELL);
        assert!(matches!(late, Err(Refusal::OldTask { task: 3, seen: 4, .. })), "{late:?}");
    }
    assert_eq!(world.machine.admit(&stamped(4, Order::EndPreCopy), WELL), Ok(Action::EndPreCopy));
    assert_eq!(world.machine.admit(&stamped(4, Order::Seal), WELL), Ok(Action::Save));
}
