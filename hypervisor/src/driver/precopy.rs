//! Pre-copy: the driver starts it, a save takes its file, anything else ends it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bellwether_statefile::Identity;
use bellwether_types::Epoch;

use super::save::SLICE;
use super::{Command, Driver, VmmError};
use crate::gate::Hold;
use crate::lifecycle::Verb;
use crate::locks::Locks;
use crate::precopy::{Job, JobError, Options, Warm, Watched};

/// How long an abort waits for writes that are under way.
const ABORT_WAIT: Duration = Duration::from_secs(10);

impl Driver {
    /// Starts a pre-copy, or joins the one that was asked for with the same words.
    pub(super) fn pre_copy(&mut self, options: Options) -> Result<Arc<Watched>, VmmError> {
        self.next(Verb::PreCopy)?;
        if let Some(job) = self.job.as_ref().filter(|job| job.options == options) {
            return Ok(Arc::clone(&job.watched));
        }
        let machine = Arc::clone(self.machine()?);
        if machine.gate.is_held(Hold::Superseded) {
            return Err(VmmError::Superseded);
        }
        self.abort_pre_copy();
        self.wait_memory_whole()?;
        let identity = self.save_identity(options.generation)?;
        let commands = self.commands.clone();
        let watched_end = move || {
            let _driver_gone = commands.send(Command::PreCopyEnded);
        };
        let job = Job::start(&machine, identity, options, watched_end)?;
        let watched = Arc::clone(&job.watched);
        self.board.update(|view| view.pre_copy = Some(Arc::clone(&watched)));
        self.job = Some(job);
        tracing::info!(%identity, "pre-copy");
        Ok(watched)
    }

    /// Ends a pre-copy; without one there is nothing to do.
    pub(super) fn abort_pre_copy(&mut self) {
        if let Some(job) = self.job.take() {
            job.abort(ABORT_WAIT);
        }
    }

    /// A job has ended by itself; what it had to say, its watchers have heard.
    pub(super) fn pre_copy_ended(&mut self) {
        // The message may be about an earlier job than the one that runs now.
        if self.job.as_ref().is_some_and(|job| job.watched.now().phase.is_last()) {
            self.job = None;
        }
    }

    /// The file of a pre-copy for exactly this save; without one the save writes all memory. A
    /// pre-copy for another save ends.
    pub(super) fn take_warm(
        &mut self,
        directory: &Path,
        generation: u64,
    ) -> Result<Option<Warm>, VmmError> {
        let is_ours =
            |options: &Options| options.generation == generation && options.directory == directory;
        if !self.job.as_ref().is_some_and(|job| is_ours(&job.options)) {
            self.abort_pre_copy();
            return Ok(None);
        }
        let Some(job) = self.job.take() else { return Ok(None) };
        let is_cancelled = || self.cancel.load(Ordering::SeqCst);
        match job.finish(SLICE, is_cancelled) {
            Ok(warm) => Ok(Some(warm)),
            Err(error @ JobError::Aborted) => Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "the save writes all memory with the guest stopped");
                Ok(None)
            }
        }
    }

    /// Whose state a save of this generation is.
    pub(super) fn save_identity(&self, generation: u64) -> Result<Identity, VmmError> {
        let epoch = Epoch(self.locks.as_ref().map_or(0, Locks::epoch));
        let vm_id = self.claimant.as_ref().ok_or(VmmError::NoMachine)?.vm_id;
        Ok(Identity { vm_id, epoch, generation })
    }
}
