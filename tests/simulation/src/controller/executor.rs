//! Carries one task out: asks the pure core what is next, does it, and commits what came of it.

use std::rc::Rc;

use bellwether_core::answer::Failure;
use bellwether_core::command::Change;
use bellwether_core::leading::Patience;
use bellwether_core::saga::{Action, is_overtaken, own_action, timed_out};
use bellwether_core::state::Runner;
use bellwether_core::task::Measures;
use bellwether_core::{Attempt, Step, StepEvent, Task};
use bellwether_types::{StateFileRef, TaskId};
use futures::future::Either;

use super::This;
use super::lead::Leadership;
use super::orders::Orders;
use crate::kernel::{MS, Nanos};
use crate::sync::first;

/// The pause before an order whose outcome is unknown is given again.
const AGAIN: Nanos = 200 * MS;
/// An executor that waits, or has given an order, looks this often.
const LOOK: Nanos = 200 * MS;

pub struct Executor {
    this: This,
    leadership: Leadership,
    id: TaskId,
    patience: Patience,
    waiting: Patience,
    seen: (u64, u64),
}

impl Executor {
    pub fn new(this: &This, leadership: Leadership, id: TaskId) -> Self {
        let (patience, waiting) = (Patience::default(), Patience::default());
        Self { this: Rc::clone(this), leadership, id, patience, waiting, seen: (0, 0) }
    }

    /// Works until the task has ended.
    pub async fn run(mut self) {
        while let Some((task, action)) = self.next() {
            match action {
                Action::Wait { .. } => match self.waited_enough(&task) {
                    Some(event) => self.advance(&task, event).await,
                    None => self.wait().await,
                },
                Action::Advance(event) => self.advance(&task, event).await,
                Action::Seal { source, load_at } => self.seal(&task, source, load_at).await,
                action => self.carry_out(&task, action).await,
            }
        }
    }

    fn next(&mut self) -> Option<(Task, Action)> {
        self.seen = (self.this.raft.changed.version(), self.this.reports.version());
        let state = self.this.state();
        let task = state.tasks.get(&self.id).filter(|task| task.outcome.is_none())?;
        let observed = self.this.observed.borrow();
        let action = own_action(&state, &observed, task, self.this.now_ms());
        Some((task.clone(), action))
    }

    fn waited_enough(&mut self, task: &Task) -> Option<StepEvent> {
        let waited_ms = self.waiting.waited_ms(task.step_no, self.this.now_ms());
        timed_out(&self.this.state(), task, waited_ms)
    }

    async fn wait(&self) {
        let (states, reports) = self.seen;
        let news = first(
            self.this.raft.changed.changed_since(states),
            self.this.reports.changed_since(reports),
        );
        first(news, self.this.sleep(LOOK)).await;
    }

    async fn advance(&self, task: &Task, event: StepEvent) {
        let change = Change::Advance { task: self.id, step_no: task.step_no, event };
        if self.this.propose(change).await.is_err() {
            self.this.sleep(AGAIN).await;
        }
    }

    async fn carry_out(&mut self, task: &Task, action: Action) {
        let this = Rc::clone(&self.this);
        let orders = Orders::new(&this, self.leadership, task);
        let result = self.unless_overtaken(task, give(&orders, action)).await;
        let runs = matches!(result, Ok(StepEvent::Activated { .. }));
        self.conclude(task, result).await;
        if let (true, Step::Activate { attempt, file, .. }) = (runs, &task.step) {
            let below = file.as_ref().map_or(attempt.epoch, |file| file.epoch);
            orders.sweep(*attempt, below).await;
        }
    }

    /// Commits a known result; an unknown one leaves the task where it is, to be asked again.
    async fn conclude(&mut self, task: &Task, result: Result<StepEvent, Failure>) {
        match result {
            Ok(event) => self.advance(task, event).await,
            Err(Failure::Refused { error, retry }) => {
                self.advance(task, StepEvent::Failed { error, retry }).await;
            }
            // What follows is known without it.
            Err(Failure::Unknown(_)) if self.is_overtaken(task) => {}
            Err(Failure::Unknown(error)) => {
                let (state, now) = (self.this.state(), self.this.now_ms());
                match self.patience.unanswered(&state, task, error, now) {
                    Some(event) => self.advance(task, event).await,
                    None => self.this.sleep(AGAIN).await,
                }
            }
        }
    }

    /// What an order gives; nothing is known of it when the state no longer waits for it.
    async fn unless_overtaken<T>(
        &self,
        task: &Task,
        order: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let overtaken = async {
            while !self.is_overtaken(task) {
                self.this.sleep(LOOK).await;
            }
        };
        match first(order, overtaken).await {
            Either::Left(result) => result,
            Either::Right(()) => {
                self.this.world.hit("answer", "overtaken");
                Err(Failure::Unknown("its node is lost meanwhile".into()))
            }
        }
    }

    fn is_overtaken(&self, task: &Task) -> bool {
        let (state, now) = (self.this.state(), self.this.now_ms());
        is_overtaken(&state, &self.this.observed.borrow(), task, now)
    }

    /// The destination reads the sealed file while the seal is being committed.
    async fn seal(&mut self, task: &Task, source: Runner, load_at: Option<Attempt>) {
        let this = Rc::clone(&self.this);
        let orders = Orders::new(&this, self.leadership, task);
        let file = match self.unless_overtaken(task, orders.seal(&source)).await {
            Ok(file) => file,
            Err(failure) => return self.conclude(task, Err(failure)).await,
        };
        let event = StepEvent::Sealed { file: file.clone(), measures: Measures::new() };
        let Some(attempt) = load_at else {
            return self.advance(task, event).await;
        };
        let load = Box::pin(self.load_behind_seal(&orders, task, attempt, &file));
        let (loaded, ()) = futures::join!(load, Box::pin(self.advance(task, event)));
        // Where the seal was committed and the claim was not, for whatever reason.
        if let Some(task) = self.at_step(&Step::Load(attempt)) {
            self.conclude(&task, loaded).await;
        }
    }

    /// Loads, and proposes the claim right behind the seal instead of after its commit.
    async fn load_behind_seal(
        &self,
        orders: &Orders<'_>,
        task: &Task,
        attempt: Attempt,
        file: &StateFileRef,
    ) -> Result<StepEvent, Failure> {
        let loading = Task { step: Step::Load(attempt), step_no: task.step_no + 1, ..task.clone() };
        let work = orders.load(attempt, file);
        let loaded = self.unless_overtaken(&loading, work).await;
        if let Ok(event) = &loaded {
            let is_behind = self.at_step(&loading.step).is_none();
            self.this
                .world
                .hit("claim", if is_behind { "behind the seal" } else { "after the seal" });
            self.advance(&loading, event.clone()).await;
        }
        loaded
    }

    fn at_step(&self, step: &Step) -> Option<Task> {
        let state = self.this.state();
        state.tasks.get(&self.id).filter(|task| task.step == *step).cloned()
    }
}

async fn give(orders: &Orders<'_>, action: Action) -> Result<StepEvent, Failure> {
    match action {
        Action::Prepare(attempt) => orders.prepare(attempt).await,
        Action::PreCopy { source, load_at } => orders.pre_copy(&source, load_at).await,
        Action::TakeOver(attempt) => orders.take_over(attempt).await,
        Action::Load { attempt, file } => orders.load(attempt, &file).await,
        Action::Activate { attempt, release, file } => {
            orders.activate(attempt, release, file).await
        }
        Action::ClaimBack { source, sealed, file } => {
            orders.claim_back(source, sealed, &file).await
        }
        Action::Abandon(attempt) => orders.abandon(attempt).await,
        Action::Release(attempt) => orders.release(attempt).await,
        Action::AskGuest(runner) => orders.ask_guest(&runner).await,
        Action::Purge(node) => orders.purge(node).await,
        Action::Wait { .. } | Action::Advance(_) | Action::Seal { .. } => {
            Err(Failure::Unknown("no order belongs to this".into()))
        }
    }
}
