//! What a controller does while it leads: it plans, carries tasks out, clears strays away, and
//! lets new controllers vote. All of it ends when the leadership does; the next leader finds
//! everything that matters in the replicated state.

mod executor;
mod membership;
pub mod orders;
pub mod power;
mod pre_copy;
mod strays;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bellwether_core::command::Change;
use bellwether_core::fence::Vigil;
use bellwether_core::leading::Attention;
use bellwether_core::reconcile;
use bellwether_raft::{ProposeError, Stopped};
use bellwether_types::TaskId;
use futures::StreamExt;
use tokio::task::JoinSet;

use crate::controller::Controller;

/// How often the leader looks although nothing has changed: silence is no event.
const TICK: Duration = Duration::from_millis(100);
/// Rounds of planning in a row: what begins a task, what gives it a node, and what follows at once.
const ROUNDS_MAX: usize = 3;
/// So many commands of a round are on their way at the same time.
const PROPOSALS_MAX: usize = 64;

/// One leadership. The term names it: there is no other leader in this term.
#[derive(Clone, Copy, Debug)]
pub struct Leadership {
    pub term: u64,
    /// When it began, by this leader's clock.
    pub since: u64,
}

/// Leads whenever this controller is the leader.
pub async fn run(controller: Arc<Controller>) -> anyhow::Result<()> {
    let mut status = controller.raft.watch_status();
    loop {
        match status.wait_for(|status| status.is_leader()).await {
            Ok(_) => {}
            Err(Stopped) => return Ok(()),
        }
        // After this the state here is as new as whatever was acknowledged before this term.
        match controller.raft.confirm_leadership().await {
            Ok(confirmed) => {
                let since = controller.clock.now_ms();
                // What was heard in an earlier leadership is old news.
                let vigil = Vigil {
                    timing: controller.watchdog,
                    lease_ms: controller.timing.lease_ms,
                    leading_since: since,
                };
                controller.note(|observed| {
                    observed.forget();
                    observed.vigil = Some(vigil);
                });
                let leadership = Leadership { term: confirmed.term, since };
                tracing::info!(term = leadership.term, "leading");
                Leader::new(&controller, leadership).lead().await;
                tracing::info!(term = leadership.term, "no longer leading");
            }
            Err(error) => {
                tracing::debug!(%error, "not leading yet");
                tokio::time::sleep(TICK).await;
            }
        }
    }
}

struct Leader {
    controller: Arc<Controller>,
    leadership: Leadership,
    executors: JoinSet<TaskId>,
    /// Tasks that have an executor, and which.
    carried: BTreeMap<TaskId, tokio::task::Id>,
    attention: Attention,
    strays: strays::Strays,
    switches: power::Switches,
}

impl Leader {
    fn new(controller: &Arc<Controller>, leadership: Leadership) -> Self {
        Self {
            controller: Arc::clone(controller),
            leadership,
            executors: JoinSet::new(),
            carried: BTreeMap::new(),
            attention: Attention::new(leadership.since),
            strays: strays::Strays::default(),
            switches: power::Switches::new(controller),
        }
    }

    /// Dropping this ends every executor: what they were doing is done again by the next leader.
    async fn lead(mut self) {
        let mut states = self.controller.raft.watch_state();
        let mut reports = self.controller.watch_reports();
        let mut status = self.controller.raft.watch_status();
        let mut tick = tokio::time::interval(TICK);
        let members = membership::keep(Arc::clone(&self.controller));
        let mut background = JoinSet::new();
        background.spawn(members);
        while self.still_leads() {
            states.mark_unchanged();
            reports.mark_unchanged();
            if self.start_what_is_needed().await {
                self.carry_on();
                self.strays.clear(&self.controller, self.leadership);
                self.switches.look();
            } else {
                self.regain().await;
            }
            tokio::select! {
                _ = states.changed() => {}
                _ = reports.changed() => {}
                _ = status.changed() => {}
                _ = tick.tick() => {}
                Some(done) = self.executors.join_next() => self.ended(done),
            }
        }
    }

    fn still_leads(&self) -> bool {
        let status = self.controller.raft.status();
        status.is_leader() && status.term == self.leadership.term
    }

    fn plan(&self) -> Vec<Change> {
        let observed = self.controller.observed();
        let now = self.controller.clock.now_ms();
        let state = self.controller.state();
        let timing = &self.controller.timing;
        reconcile::plan(&state, &observed, timing, self.attention.since(), now)
    }

    /// A task that has just begun gets its node from the next round, together with all others that
    /// wait for one: their executors, each for itself, would all choose the same. False when something
    /// was not committed.
    async fn start_what_is_needed(&mut self) -> bool {
        self.come_round();
        for _ in 0..ROUNDS_MAX {
            let mut changes = self.plan();
            if changes.iter().any(|change| matches!(change, Change::NodeUnknown { .. })) {
                // Without a quorum no word of a node counts, so all of them seem silent. Proposed
                // now, that would be committed when the quorum is back, and be wrong.
                if self.controller.raft.confirm_leadership().await.is_err() {
                    return false;
                }
                self.come_round();
                changes = self.plan();
            }
            if changes.is_empty() {
                return true;
            }
            if !self.commit_all(changes).await {
                return false;
            }
        }
        true
    }

    /// Notes that the leader attends. Whom it could not hear while it did not is not silent.
    fn come_round(&mut self) {
        if let Some(stood_still_ms) = self.attention.round(self.controller.clock.now_ms()) {
            tracing::warn!(stood_still_ms, "this leader stood still, or had no quorum");
        }
    }

    /// Waits until a quorum says that this controller leads. Without one nothing that it hears counts
    /// and nothing that it plans is committed. Afterwards it has stood still, and counts silence anew.
    async fn regain(&self) {
        while self.still_leads() {
            match self.controller.raft.confirm_leadership().await {
                Ok(_) => return,
                Err(error) => {
                    tracing::debug!(%error, "no quorum");
                    tokio::time::sleep(TICK).await;
                }
            }
        }
    }

    /// Commits what a round has planned, many at a time; false when one of them was not committed.
    async fn commit_all(&self, changes: Vec<Change>) -> bool {
        let proposals: Vec<_> = changes.into_iter().map(|change| self.commit(change)).collect();
        let mut results = futures::stream::iter(proposals).buffered(PROPOSALS_MAX);
        while let Some(result) = results.next().await {
            if let Err(error) = result {
                // The next round plans again from what stands then.
                tracing::warn!(%error, "not committed");
                return false;
            }
        }
        true
    }

    async fn commit(&self, change: Change) -> Result<(), ProposeError> {
        // Committing takes time in which a silent node may have been heard.
        if self.is_overtaken(&change) {
            return Ok(());
        }
        tracing::info!(?change, "the state asks for it");
        self.controller.propose(change).await.map(drop)
    }

    fn is_overtaken(&self, change: &Change) -> bool {
        let Change::NodeUnknown { node, .. } = change else { return false };
        let (state, observed) = (self.controller.state(), self.controller.observed());
        let now = self.controller.clock.now_ms();
        let timing = &self.controller.timing;
        !reconcile::is_silent(&state, &observed, timing, self.attention.since(), now, *node)
    }

    /// Gives every task an executor.
    fn carry_on(&mut self) {
        let state = self.controller.state();
        for task in state.active_tasks() {
            if !self.carried.contains_key(&task.id) {
                let controller = Arc::clone(&self.controller);
                let executor = executor::Executor::new(controller, self.leadership, task.id);
                let handle = self.executors.spawn(executor.run());
                self.carried.insert(task.id, handle.id());
            }
        }
    }

    fn ended(&mut self, done: Result<TaskId, tokio::task::JoinError>) {
        match done {
            Ok(id) => {
                self.carried.remove(&id);
            }
            Err(error) => {
                tracing::error!(%error, "an executor panicked; its task gets a new one");
                self.carried.retain(|_, executor| *executor != error.id());
            }
        }
    }
}
