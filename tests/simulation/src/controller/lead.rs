//! What a controller does while it leads; all of it ends when the leadership does.

use std::collections::BTreeMap;
use std::rc::Rc;

use bellwether_core::command::Change;
use bellwether_core::fence::Vigil;
use bellwether_core::leading::Attention;
use bellwether_core::reconcile;
use bellwether_types::{TaskId, WatchdogTiming};

use super::strays::Strays;
use super::{This, executor, switches};
use crate::kernel::{MS, Nanos, TaskNo};
use crate::raft::ProposeError;
use crate::sync::{Queue, all, first};

/// How often the leader looks although nothing has changed.
const TICK: Nanos = 100 * MS;
/// Rounds of planning in a row: what begins a task, what gives it a node, and what follows at once.
const ROUNDS_MAX: usize = 3;

/// One leadership. The term names it.
#[derive(Clone, Copy, Debug)]
pub struct Leadership {
    pub term: u64,
}

/// Leads whenever this controller is the leader.
pub async fn run(this: This) {
    loop {
        let raft = this.raft.clone();
        this.raft.changed.until(move || raft.is_leader().then_some(())).await;
        match this.raft.confirm().await {
            Some(term) => {
                // What was heard in an earlier leadership is old news.
                let vigil = Vigil {
                    timing: Some(WatchdogTiming::default()),
                    lease_ms: this.world.timing.lease_ms,
                    leading_since: this.now_ms(),
                };
                this.note(|observed| {
                    observed.forget();
                    observed.vigil = Some(vigil);
                });
                switches::learn(&this);
                let mut leader = Leader::new(&this, term);
                leader.lead().await;
                leader.end();
                this.world.hit("raft", "deposed");
            }
            None => this.sleep(TICK).await,
        }
    }
}

struct Leader {
    this: This,
    leadership: Leadership,
    attention: Attention,
    carried: BTreeMap<TaskId, TaskNo>,
    ended: Queue<TaskId>,
    strays: Strays,
}

impl Leader {
    fn new(this: &This, term: u64) -> Self {
        Self {
            this: Rc::clone(this),
            leadership: Leadership { term },
            attention: Attention::new(this.now_ms()),
            carried: BTreeMap::new(),
            ended: Queue::new(&this.world.kernel),
            strays: Strays::default(),
        }
    }

    async fn lead(&mut self) {
        while self.still_leads() {
            let (states, reports) = (self.this.raft.changed.version(), self.this.reports.version());
            self.start_what_is_needed().await;
            self.carry_on();
            self.strays.clear(&self.this, self.leadership);
            switches::look(&self.this);
            let news = first(
                self.this.raft.changed.changed_since(states),
                self.this.reports.changed_since(reports),
            );
            let ended = self.ended.clone();
            let tick = first(news, self.this.sleep(TICK));
            if let futures::future::Either::Right(id) = first(tick, ended.pop()).await {
                self.carried.remove(&id);
            }
        }
    }

    /// What the executors were doing is done again by the next leader.
    fn end(&mut self) {
        for task in std::mem::take(&mut self.carried).into_values() {
            self.this.world.kernel.abort(task);
        }
    }

    fn still_leads(&self) -> bool {
        self.this.raft.is_leader() && self.this.raft.term() == self.leadership.term
    }

    fn plan(&self) -> Vec<Change> {
        let observed = self.this.observed.borrow();
        let (state, timing) = (self.this.state(), &self.this.world.timing);
        let since = self.attention.since();
        reconcile::plan(&state, &observed, timing, since, self.this.now_ms())
    }

    /// A task that has just begun gets its node from the next round, with all others that wait.
    async fn start_what_is_needed(&mut self) {
        self.attention.round(self.this.now_ms());
        for _ in 0..ROUNDS_MAX {
            let changes = self.plan();
            if changes.is_empty() || !self.commit_all(changes).await {
                return;
            }
        }
    }

    /// Commits what a round has planned, all at a time; false when one of them was not committed.
    async fn commit_all(&self, changes: Vec<Change>) -> bool {
        let proposals = changes.into_iter().map(|change| self.commit(change));
        all(proposals).await.into_iter().all(|result| result.is_ok())
    }

    async fn commit(&self, change: Change) -> Result<(), ProposeError> {
        // Committing takes time in which a silent node may have been heard.
        if self.is_overtaken(&change) {
            return Ok(());
        }
        self.this.propose(change).await.map(drop)
    }

    fn is_overtaken(&self, change: &Change) -> bool {
        let Change::NodeUnknown { node, .. } = change else { return false };
        let observed = self.this.observed.borrow();
        let (state, timing) = (self.this.state(), &self.this.world.timing);
        let (since, now) = (self.attention.since(), self.this.now_ms());
        !reconcile::is_silent(&state, &observed, timing, since, now, *node)
    }

    /// Gives every task an executor.
    fn carry_on(&mut self) {
        while let Some(id) = self.ended.try_pop() {
            self.carried.remove(&id);
        }
        let state = self.this.state();
        for task in state.active_tasks() {
            if self.carried.contains_key(&task.id) {
                continue;
            }
            let executor = executor::Executor::new(&self.this, self.leadership, task.id);
            let (id, ended) = (task.id, self.ended.clone());
            let work = async move {
                executor.run().await;
                ended.push(id);
            };
            let no = self.this.world.kernel.spawn(self.this.process, work);
            self.carried.insert(id, no);
        }
    }
}
