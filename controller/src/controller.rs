//! What every part of the controller shares.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bellwether_core::command::Change;
use bellwether_core::observe::NodeReport;
use bellwether_core::task::Measures;
use bellwether_core::{Command, Observed, Outcome, State, Timing};
use bellwether_member::MemberConfig;
use bellwether_pki::IdentityFiles;
use bellwether_raft::{ProposeError, RaftHandle};
use bellwether_types::{NodeId, TaskId, WatchdogTiming};
use tokio::sync::watch;

use crate::clock::Clock;
use crate::links::Links;

/// What an administrator sets for one controller.
pub struct Settings {
    pub timing: Timing,
    pub watchdog: Option<WatchdogTiming>,
    pub power_dir: PathBuf,
}

/// One controller of the cluster.
pub struct Controller {
    pub member: MemberConfig,
    pub files: IdentityFiles,
    pub timing: Timing,
    /// The times of the fence proof `watchdog`, if there is one.
    pub watchdog: Option<WatchdogTiming>,
    /// Where the settings of the nodes' power switches are.
    pub power_dir: PathBuf,
    pub raft: RaftHandle,
    pub links: Links,
    pub clock: Clock,
    observed: Mutex<Observed>,
    /// How far the pre-copies are that this leader follows.
    progress: watch::Sender<BTreeMap<TaskId, Measures>>,
    /// Counts reports, so that whoever waits for one wakes up.
    reports: watch::Sender<u64>,
}

/// The state of a moment, to look at and to let go of: a task that keeps one across an await does not
/// compile. For as long as somebody holds an older state, every commit has to copy all of it before
/// it can change it, and a large cluster has many orders under way at any time.
pub struct Glance {
    state: Arc<State>,
    /// Makes it stay in its thread, and so between two awaits.
    _here: PhantomData<*const ()>,
}

impl Deref for Glance {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl Controller {
    pub fn new(
        member: MemberConfig,
        files: IdentityFiles,
        settings: Settings,
        raft: RaftHandle,
        links: Links,
    ) -> Self {
        let Settings { timing, watchdog, power_dir } = settings;
        Self {
            member,
            files,
            timing,
            watchdog,
            power_dir,
            raft,
            links,
            clock: Clock::start(),
            observed: Mutex::default(),
            progress: watch::Sender::default(),
            reports: watch::Sender::new(0),
        }
    }

    /// The state as of the last entry applied here.
    pub fn state(&self) -> Glance {
        Glance { state: self.raft.view().state, _here: PhantomData }
    }

    /// The same for long work in a thread of its own; see [`Glance`] for what keeping it costs.
    pub fn state_to_keep(&self) -> Arc<State> {
        self.raft.view().state
    }

    /// What agents last reported to this controller. The lock is never held across an await.
    pub fn observed(&self) -> MutexGuard<'_, Observed> {
        self.observed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a report and wakes those who wait for one.
    pub fn note(&self, change: impl FnOnce(&mut Observed)) {
        change(&mut self.observed());
        self.reports.send_modify(|count| *count += 1);
    }

    /// How far a task is within its step; volatile, as it is old in a moment.
    pub fn note_progress(&self, task: TaskId, measures: Measures) {
        self.progress.send_modify(|all| drop(all.insert(task, measures)));
    }

    pub fn forget_progress(&self, task: TaskId) {
        self.progress.send_modify(|all| drop(all.remove(&task)));
    }

    pub fn watch_progress(&self) -> watch::Receiver<BTreeMap<TaskId, Measures>> {
        self.progress.subscribe()
    }

    /// Takes note of what an agent reports; those who wait are woken when it says something new, and
    /// not by every sign of life.
    pub fn take_report(&self, node: NodeId, report: NodeReport) {
        let state = self.state();
        if self.observed().take(node, report, &state) {
            self.reports.send_modify(|count| *count += 1);
        }
    }

    pub fn watch_reports(&self) -> watch::Receiver<u64> {
        self.reports.subscribe()
    }

    /// Commits a change, stamped with this leader's clock.
    pub async fn propose(&self, change: Change) -> Result<Outcome, ProposeError> {
        self.raft.propose(Command { at: self.clock.now_ms(), change }).await
    }
}
