//! Follows one VM through all its incarnations: what its guest printed, and when each VMM ran.
//!
//! ```text
//! agents' runtime directories ──a new `vms/<vm>.<epoch>`──> one follower per incarnation
//!     console: lines with the host's time of arrival   ┐
//!     status:  when its vCPUs were seen running        ├─> Record ──> questions, `check`
//! ```
//!
//! It asks the VMMs themselves, past agents and controllers: an oracle must not believe those whose
//! work it judges.

mod follow;
mod record;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::task::JoinHandle;

use crate::lines::Line;
use crate::wait::wait_for;
pub use record::{Gap, Heard, Record, Tick};

type Shared = Arc<Mutex<Record>>;

/// Everything that is known of one VM. Dropping it ends the watching.
#[derive(Debug)]
pub struct Watch {
    vm_id: String,
    record: Shared,
    task: JoinHandle<()>,
}

impl Watch {
    pub fn start(runtime_dirs: Vec<(usize, PathBuf)>, vm_id: &str) -> Self {
        let record = Shared::default();
        let task = tokio::spawn(follow::follow(runtime_dirs, vm_id.to_owned(), record.clone()));
        Self { vm_id: vm_id.to_owned(), record, task }
    }

    pub fn vm_id(&self) -> &str {
        &self.vm_id
    }

    /// The record as it is now; hold it only for a moment.
    pub fn record(&self) -> MutexGuard<'_, Record> {
        lock(&self.record)
    }

    /// Where the record ends now: questions can be about what comes after.
    pub fn mark(&self) -> usize {
        self.record().lines.len()
    }

    /// Waits for a line that comes (or came) after a mark.
    pub async fn heard_since(
        &self,
        mark: usize,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Line) -> bool,
    ) -> Result<Heard> {
        let seen = wait_for(what, timeout, async || {
            let record = self.record();
            Ok(record.lines[mark..].iter().find(|heard| wanted(&heard.line)).cloned())
        });
        seen.await.with_context(|| format!("the last lines: {}", self.record().tail(5)))
    }

    /// Waits until the guest has printed one more tick.
    pub async fn ticks_on(&self, timeout: Duration) -> Result<Heard> {
        let is_tick = |line: &Line| matches!(line, Line::Tick { .. });
        self.heard_since(self.mark(), "the guest's next tick", timeout, is_tick).await
    }

    /// Waits until the guest has verified all its memory once more, from beginning to end.
    pub async fn verifies_again(&self, timeout: Duration) -> Result<()> {
        let mark = self.mark();
        wait_for("the guest to verify its memory", timeout, async || {
            let record = self.record();
            let is_pass = |heard: &&Heard| matches!(heard.line, Line::Pattern { .. });
            // The first line may be about a pass that had begun before.
            Ok((record.lines[mark..].iter().filter(is_pass).count() >= 2).then_some(()))
        })
        .await
        .with_context(|| format!("the last lines: {}", self.record().tail(5)))
    }

    /// The newest journal record that the guest has called durable.
    pub fn acknowledged(&self) -> u64 {
        self.record().acknowledged()
    }

    /// Fails if the guest found anything wrong, or if the VM ever ran twice.
    pub fn check(&self) -> Result<()> {
        self.record().check()
    }

    /// The largest time without a tick after a mark, by the guest's clock and by the host's.
    pub fn largest_gap(&self, mark: usize) -> Option<Gap> {
        self.record().largest_gap(mark)
    }

    /// The first tick that arrived after a time.
    pub async fn tick_after(&self, time: Instant, mark: usize, timeout: Duration) -> Result<Heard> {
        wait_for("the guest's next tick", timeout, async || {
            let record = self.record();
            let is_it = |heard: &&Heard| heard.at > time && matches!(heard.line, Line::Tick { .. });
            Ok(record.lines[mark..].iter().find(is_it).cloned())
        })
        .await
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The record is whole at every moment: no line of it is changed after it was added.
fn lock(record: &Shared) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}
