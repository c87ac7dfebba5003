//! One pre-copy and its thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use bellwether_memory::{
    Copier, PageSet, Piece, PreCopyError, RateLimit, RoundStats, StopSignal, collect_dirty,
};
use bellwether_statefile::{Identity, PAGE_SIZE, StateFileError, StateFileWriter};

use super::converge::{Convergence, Limits, Round, Verdict};
use super::progress::{Phase, Watched};
use crate::kvm::KvmError;
use crate::kvm::dirty::KvmDirtyLog;
use crate::machine::Machine;
use crate::snapshot::SaveError;

/// More threads than cores, as for a save: while some wait for the storage, others sum.
const THREADS: usize = 4;
/// How often a pre-copy that is ready looks at what became dirty.
const READY_INTERVAL: Duration = Duration::from_millis(5);
/// Nobody keeps a ready pre-copy waiting for longer than this.
const READY_MAX: Duration = Duration::from_secs(60);

/// What a pre-copy is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    pub directory: PathBuf,
    pub generation: u64,
    pub limits: Limits,
    /// Be ready all the same when it cannot converge; otherwise it gives up.
    pub finish_anyway: bool,
    pub rate_bytes_per_s: Option<u64>,
}

/// Why a pre-copy ended without a file.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error(transparent)]
    Copy(#[from] PreCopyError),
    #[error("pre-copy: {0}")]
    Kvm(#[from] KvmError),
    #[error("pre-copy: {0}")]
    File(#[from] StateFileError),
    #[error(transparent)]
    Create(#[from] SaveError),
    #[error("pre-copy: the log of dirty pages: {0}")]
    Log(#[source] std::io::Error),
    #[error("pre-copy: start its thread: {0}")]
    Thread(#[source] std::io::Error),
    #[error(
        "pre-copy: it cannot converge: the guest dirties {dirty_mib_s} MiB/s, the storage takes \
         {bandwidth_mib_s} MiB/s; a save now would stop the guest for about {outage_ms} ms. Ask to \
         finish all the same, allow a longer outage, or calm the guest"
    )]
    CannotConverge { dirty_mib_s: u64, bandwidth_mib_s: u64, outage_ms: u128 },
    #[error("pre-copy: nobody asked for the save within {} s", READY_MAX.as_secs())]
    NoSave,
    #[error("pre-copy: aborted")]
    Aborted,
}

/// A file that holds all but the residue, and what is needed to write that.
pub struct Warm {
    pub writer: StateFileWriter,
    pub log: KvmDirtyLog,
    /// Pages that were found dirty and are not written yet.
    pub rest: PageSet,
    /// The number of the round that writes the residue.
    pub round: u32,
}

/// A pre-copy under way.
pub struct Job {
    pub options: Options,
    pub watched: Arc<Watched>,
    signals: Arc<Signals>,
    result: Receiver<Result<Warm, JobError>>,
}

#[derive(Default)]
struct Signals {
    /// Ends everything.
    abort: StopSignal,
    /// Ends the rounds, once round 0 is written.
    finish: StopSignal,
}

impl Job {
    /// Starts to copy; `on_end` is called when the job has ended by itself, without a file.
    pub fn start(
        machine: &Arc<Machine>,
        identity: Identity,
        options: Options,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<Self, JobError> {
        let watched = Arc::new(Watched::default());
        let signals = Arc::new(Signals::default());
        let writer = machine.create_rounds_file(&options.directory, identity)?;
        let log = machine.vm.start_dirty_log()?;
        let run = Run {
            machine: Arc::clone(machine),
            options: options.clone(),
            watched: Arc::clone(&watched),
            signals: Arc::clone(&signals),
            convergence: Convergence::new(options.limits, machine.ram.size()),
            writer,
            log,
            rest: PageSet::empty(&machine.ram),
            round: 0,
            begun: Instant::now(),
        };
        watched.update(|progress| {
            progress.path = options.directory.join(identity.file_name());
            (progress.epoch, progress.generation) = (identity.epoch.0, identity.generation);
            progress.memory_bytes = machine.ram.size();
        });
        let (told, result) = sync_channel(1);
        let watchers = Arc::clone(&watched);
        let work = move || {
            let outcome = run.run();
            if let Err(error) = &outcome {
                tracing::warn!(%error, "the pre-copy has ended");
                watchers.update(|progress| progress.phase = Phase::Ended(error.to_string()));
            }
            let has_failed = outcome.is_err();
            let _driver_gone = told.send(outcome);
            if has_failed {
                on_end();
            }
        };
        let thread = thread::Builder::new().name("pre-copy".into()).spawn(work);
        thread.map_err(JobError::Thread)?;
        Ok(Self { options, watched, signals, result })
    }

    /// Takes the file over. The guest runs until this returns; if round 0 was not written yet, that
    /// is the time for the rest of it. `is_cancelled` is asked meanwhile, every `slice`.
    pub fn finish(
        self,
        slice: Duration,
        is_cancelled: impl Fn() -> bool,
    ) -> Result<Warm, JobError> {
        self.signals.finish.set();
        loop {
            match self.result.recv_timeout(slice) {
                Ok(outcome) => {
                    let warm = outcome?;
                    self.watched.update(|progress| progress.phase = Phase::Saving);
                    return Ok(warm);
                }
                Err(RecvTimeoutError::Timeout) if is_cancelled() => self.signals.abort.set(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(JobError::Aborted),
            }
        }
    }

    /// Ends it and waits, at most this long, until its file is removed and the log is off.
    pub fn abort(self, longest: Duration) {
        self.signals.abort.set();
        self.signals.finish.set();
        match self.result.recv_timeout(longest) {
            // A file that came at the last moment goes with the drop.
            Ok(Ok(_)) | Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => {}
            Err(RecvTimeoutError::Timeout) => {
                tracing::warn!(
                    "the pre-copy still waits for the storage; its file may stay behind"
                );
            }
        }
        let aborted = || Phase::Ended(JobError::Aborted.to_string());
        self.watched.update(|progress| {
            if !progress.phase.is_last() {
                progress.phase = aborted();
            }
        });
    }
}

/// What the thread works with.
struct Run {
    machine: Arc<Machine>,
    options: Options,
    watched: Arc<Watched>,
    signals: Arc<Signals>,
    convergence: Convergence,
    writer: StateFileWriter,
    log: KvmDirtyLog,
    rest: PageSet,
    /// The round that is being written.
    round: u32,
    begun: Instant,
}

impl Run {
    fn run(mut self) -> Result<Warm, JobError> {
        let rate = self.options.rate_bytes_per_s.map(RateLimit::new);
        let mut verdict = self.round_zero(rate.as_ref())?;
        while verdict == Verdict::GoOn && !self.is_to_end()? {
            verdict = self.next_round(rate.as_ref())?;
        }
        if !self.is_to_end()? {
            self.decide(verdict)?;
            self.wait_ready(rate.as_ref())?;
        }
        let Self { writer, log, rest, round, .. } = self;
        Ok(Warm { writer, log, rest, round: round + 1 })
    }

    fn is_to_end(&self) -> Result<bool, JobError> {
        if self.signals.abort.is_set() {
            return Err(JobError::Aborted);
        }
        Ok(self.signals.finish.is_set())
    }

    fn round_zero(&mut self, rate: Option<&RateLimit>) -> Result<Verdict, JobError> {
        let begun = Instant::now();
        let stats = self.copy(&Arc::clone(&self.signals).abort, rate, |copier, run| {
            copier.round_zero(run.writer)
        })?;
        if !stats.is_whole {
            return Err(JobError::Aborted);
        }
        self.writer.freeze_fixed()?;
        let round = self.measure(begun, &stats)?;
        let verdict = self.convergence.after_round_zero(&round);
        self.show(&round);
        Ok(verdict)
    }

    fn next_round(&mut self, rate: Option<&RateLimit>) -> Result<Verdict, JobError> {
        let begun = Instant::now();
        self.round += 1;
        let number = self.round;
        self.watched.update(|progress| progress.round = number);
        let stats = self.copy(&Arc::clone(&self.signals).finish, rate, |copier, run| {
            copier.round(run.writer, number, run.rest)
        })?;
        let round = self.measure(begun, &stats)?;
        let verdict = self.convergence.after_round(&round);
        self.show(&round);
        Ok(verdict)
    }

    fn copy(
        &mut self,
        stop: &StopSignal,
        rate: Option<&RateLimit>,
        work: impl FnOnce(&Copier<'_>, &mut Rest<'_>) -> Result<RoundStats, PreCopyError>,
    ) -> Result<RoundStats, JobError> {
        let watched = &self.watched;
        let on_piece = |piece: Piece| watched.add_piece(piece);
        let copier = Copier {
            ram: &self.machine.ram,
            log: Some(&self.log),
            threads: THREADS,
            rate,
            stop,
            on_piece: Some(&on_piece),
        };
        Ok(work(&copier, &mut Rest { writer: &self.writer, rest: &mut self.rest })?)
    }

    /// Makes the round durable, so that the seal has less to wait for, and looks at what is dirty.
    fn measure(&mut self, begun: Instant, stats: &RoundStats) -> Result<Round, JobError> {
        let syncing = Instant::now();
        self.writer.flush()?;
        let sync = syncing.elapsed();
        self.collect()?;
        let residue = self.rest.count() * PAGE_SIZE;
        let RoundStats { bytes, busy, .. } = *stats;
        Ok(Round { bytes, took: begun.elapsed(), busy, residue, sync })
    }

    fn collect(&mut self) -> Result<(), JobError> {
        collect_dirty(&self.machine.ram, &self.log, &mut self.rest).map_err(JobError::Log)
    }

    fn show(&self, round: &Round) {
        let outage = self.convergence.outage(round.residue);
        tracing::debug!(number = self.round, ?round, ?outage, "round");
        self.watched.update(|progress| {
            progress.bytes_written += round.bytes;
            progress.residue_bytes = round.residue;
            progress.dirty_bytes_per_s = self.convergence.dirty_rate();
            progress.bandwidth_bytes_per_s = self.convergence.bandwidth();
            progress.outage_us = outage.as_micros() as u64;
            progress.elapsed_us = self.begun.elapsed().as_micros() as u64;
        });
    }

    /// What the measurements mean for whoever asked.
    fn decide(&self, verdict: Verdict) -> Result<(), JobError> {
        let converged = verdict == Verdict::Converged;
        if !converged && !self.options.finish_anyway {
            let residue = self.rest.count() * PAGE_SIZE;
            return Err(JobError::CannotConverge {
                dirty_mib_s: self.convergence.dirty_rate() >> 20,
                bandwidth_mib_s: self.convergence.bandwidth() >> 20,
                outage_ms: self.convergence.outage(residue).as_millis(),
            });
        }
        self.watched.update(|progress| progress.phase = Phase::Ready { converged });
        Ok(())
    }

    /// Keeps the residue small until somebody saves.
    fn wait_ready(&mut self, rate: Option<&RateLimit>) -> Result<(), JobError> {
        let until = Instant::now() + READY_MAX;
        // One that did not converge is not written again and again for nothing.
        let usual = self.rest.count() * PAGE_SIZE * 5 / 4;
        while !self.signals.finish.wait(READY_INTERVAL) {
            if Instant::now() >= until {
                return Err(JobError::NoSave);
            }
            self.collect()?;
            let residue = self.rest.count() * PAGE_SIZE;
            let is_worth_it = !self.convergence.is_small(residue) && residue > usual;
            if is_worth_it && self.convergence.has_room(residue) {
                self.next_round(rate)?;
            }
        }
        self.is_to_end().map(drop)
    }
}

/// The parts of a [`Run`] that a copy changes.
struct Rest<'a> {
    writer: &'a StateFileWriter,
    rest: &'a mut PageSet,
}
