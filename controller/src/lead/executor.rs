//! Carries one task out: asks the pure core what is next, does it, and commits what came of it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bellwether_core::answer::Failure;
use bellwether_core::command::Change;
use bellwether_core::leading::Patience;
use bellwether_core::saga::{Action, is_overtaken, own_action, timed_out};
use bellwether_core::state::Runner;
use bellwether_core::{Attempt, Step, StepEvent, Task};
use bellwether_failpoint as failpoint;
use bellwether_raft::StateView;
use bellwether_types::{StateFileRef, TaskId};

use tokio::sync::watch;

use super::Leadership;
use super::orders::Orders;
use super::pre_copy::PreCopy;
use crate::controller::Controller;

/// The pause before an order whose outcome is unknown is given again.
const AGAIN: Duration = Duration::from_millis(200);
/// A pre-copy that has to be joined again and again for so long has no more patience shown to it.
const PRE_COPY_MS_MAX: u64 = 900_000;
/// An executor that waits looks at the clock this often, although it is woken by every change; one
/// that has given an order looks this often whether its answer still matters.
const LOOK: Duration = Duration::from_millis(200);

pub struct Executor {
    controller: Arc<Controller>,
    leadership: Leadership,
    id: TaskId,
    states: watch::Receiver<StateView>,
    reports: watch::Receiver<u64>,
    patience: Patience,
    waiting: Patience,
}

impl Executor {
    pub fn new(controller: Arc<Controller>, leadership: Leadership, id: TaskId) -> Self {
        let (states, reports) = (controller.raft.watch_state(), controller.watch_reports());
        Self {
            controller,
            leadership,
            id,
            states,
            reports,
            patience: Patience::default(),
            waiting: Patience::default(),
        }
    }

    /// Works until the task has ended. Returns the task's number.
    pub async fn run(mut self) -> TaskId {
        while let Some((task, action)) = self.next() {
            match action {
                Action::Wait { .. } => match self.waited_enough(&task) {
                    Some(event) => self.advance(&task, event).await,
                    None => self.wait().await,
                },
                Action::Advance(event) => self.advance(&task, event).await,
                Action::PreCopy { source, load_at } => self.pre_copy(&task, source, load_at).await,
                Action::Seal { source, load_at } => self.seal(&task, source, load_at).await,
                action => self.carry_out(&task, action).await,
            }
        }
        self.id
    }

    /// The task and what it does next; none when it has ended.
    fn next(&mut self) -> Option<(Task, Action)> {
        // Whatever changes from here on ends a wait.
        self.states.mark_unchanged();
        self.reports.mark_unchanged();
        let state = self.controller.state();
        let task = state.tasks.get(&self.id).filter(|task| task.outcome.is_none())?;
        let now = self.controller.clock.now_ms();
        let action = own_action(&state, &self.controller.observed(), task, now);
        Some((task.clone(), action))
    }

    fn waited_enough(&mut self, task: &Task) -> Option<StepEvent> {
        let waited_ms = self.waiting.waited_ms(task.step_no, self.controller.clock.now_ms());
        timed_out(&self.controller.state(), task, waited_ms)
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.states.changed() => {}
            _ = self.reports.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }

    /// Commits what came of a step. Should this leader be deposed meanwhile, the next one sees
    /// either the step done or the step to do.
    async fn advance(&self, task: &Task, event: StepEvent) {
        let change = Change::Advance { task: self.id, step_no: task.step_no, event };
        if let Err(error) = self.controller.propose(change).await {
            tracing::warn!(task = self.id.0, %error, "a step was not committed");
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Gives the order of a step and commits what came of it.
    async fn carry_out(&mut self, task: &Task, action: Action) {
        let controller = Arc::clone(&self.controller);
        let orders = Orders::new(&controller, self.leadership, task);
        point(task, "before").await;
        let result = self.unless_overtaken(task, give(&orders, action)).await;
        point(task, "after").await;
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
                tracing::warn!(task = self.id.0, step = task.step.name(), %error, "refused");
                self.advance(task, StepEvent::Failed { error, retry }).await;
            }
            // What follows is known without it.
            Err(Failure::Unknown(_)) if self.is_overtaken(task) => {}
            Err(Failure::Unknown(error)) => {
                tracing::warn!(task = self.id.0, step = task.step.name(), %error, "asking again");
                let now = self.controller.clock.now_ms();
                let given_up = self.patience.unanswered(&self.controller.state(), task, error, now);
                match given_up {
                    Some(event) => self.advance(task, event).await,
                    None => tokio::time::sleep(AGAIN).await,
                }
            }
        }
    }

    /// What an order gives; nothing is known of it when the state no longer waits for it. A connection
    /// to a host that has died takes seconds to break. It looks now and then and not at each change:
    /// thousands of orders may be under way, and most have their answer before the first look.
    async fn unless_overtaken<T>(
        &self,
        task: &Task,
        order: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let overtaken = async {
            while !self.is_overtaken(task) {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            biased;
            result = order => result,
            () = overtaken => Err(Failure::Unknown("its node is lost meanwhile".into())),
        }
    }

    fn is_overtaken(&self, task: &Task) -> bool {
        let (state, now) = (self.controller.state(), self.controller.clock.now_ms());
        is_overtaken(&state, &self.controller.observed(), task, now)
    }

    /// The destination reads along while the source writes and its guest runs.
    async fn pre_copy(&mut self, task: &Task, source: Runner, load_at: Option<Attempt>) {
        let controller = Arc::clone(&self.controller);
        let orders = Orders::new(&controller, self.leadership, task);
        point(task, "before").await;
        let heard = AtomicBool::new(false);
        let on_progress = |measures| {
            heard.store(true, Ordering::Relaxed);
            controller.note_progress(task.id, measures);
        };
        let following = PreCopy::new(&orders, load_at, &on_progress).follow(&source);
        let result = self.unless_overtaken(task, following).await;
        point(task, "after").await;
        let waited_ms = self.waiting.waited_ms(task.step_no, self.controller.clock.now_ms());
        if heard.into_inner() && waited_ms < PRE_COPY_MS_MAX {
            // It went on: only silence from here on counts.
            self.patience = Patience::default();
        }
        self.conclude(task, result).await;
        controller.forget_progress(task.id);
    }

    /// The destination reads the sealed file while the seal is being committed: the guest stands
    /// still, and neither needs the other's answer.
    async fn seal(&mut self, task: &Task, source: Runner, load_at: Option<Attempt>) {
        let controller = Arc::clone(&self.controller);
        let orders = Orders::new(&controller, self.leadership, task);
        point(task, "before").await;
        let sealed = match self.unless_overtaken(task, orders.seal(&source)).await {
            Ok(sealed) => sealed,
            Err(failure) => return self.conclude(task, Err(failure)).await,
        };
        point(task, "after").await;
        let event = StepEvent::Sealed { file: sealed.file.clone(), measures: sealed.measures };
        let Some(attempt) = load_at else {
            return self.advance(task, event).await;
        };
        let load = self.load_behind_seal(&orders, task, attempt, &sealed.file);
        let ((), loaded) = tokio::join!(self.advance(task, event), load);
        // Where the seal was committed and the claim was not, for whatever reason.
        if let Some(task) = self.at_step(&Step::Load(attempt)) {
            self.conclude(&task, loaded).await;
        }
    }

    /// Loads, and proposes the claim right behind the seal instead of after its commit: the log has
    /// them in this order, and without the seal there is no step that the claim belongs to.
    async fn load_behind_seal(
        &self,
        orders: &Orders<'_>,
        task: &Task,
        attempt: Attempt,
        file: &StateFileRef,
    ) -> Result<StepEvent, Failure> {
        let loading = Task { step: Step::Load(attempt), step_no: task.step_no + 1, ..task.clone() };
        point(&loading, "before").await;
        let loaded = self.unless_overtaken(&loading, orders.load(attempt, file)).await;
        point(&loading, "after").await;
        if let Ok(event) = &loaded {
            self.advance(&loading, event.clone()).await;
        }
        loaded
    }

    fn at_step(&self, step: &Step) -> Option<Task> {
        let state = self.controller.state();
        state.tasks.get(&self.id).filter(|task| task.step == *step).cloned()
    }
}

async fn give(orders: &Orders<'_>, action: Action) -> Result<StepEvent, Failure> {
    match action {
        Action::Prepare(attempt) => orders.prepare(attempt).await,
        Action::TakeOver(attempt) => orders.take_over(attempt).await,
        Action::Load { attempt, file } => orders.load(attempt, &file).await,
        Action::Activate { attempt, release, file } => {
            orders.activate(attempt, release, file.as_ref()).await
        }
        Action::ClaimBack { source, sealed, file } => {
            orders.claim_back(source, sealed, &file).await
        }
        Action::Abandon(attempt) => orders.abandon(attempt).await,
        Action::Release(attempt) => orders.release(attempt).await,
        Action::AskGuest(runner) => orders.ask_guest(&runner).await,
        Action::Purge(node) => orders.purge(node).await,
        Action::Wait { .. } | Action::Advance(_) | Action::PreCopy { .. } | Action::Seal { .. } => {
            Err(Failure::Unknown("no order belongs to this".into()))
        }
    }
}

/// A failpoint per step of each kind of task: `task.migrate.seal.before` the order is given, and
/// `….after` it was carried out, when its result is not committed yet.
async fn point(task: &Task, when: &str) {
    if failpoint::active() {
        let name = format!("task.{}.{}.{when}", task.kind.as_str(), task.step.name());
        failpoint::hold(&name).await;
    }
}
