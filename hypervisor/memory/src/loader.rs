//! The loading of chunks, shared by fault threads and fill threads.
//!
//! ```text
//!   untouched --claimed--> loading ----------> loaded      its checksum was found right
//!       ^                     |--------------> failed      it is damaged: for good
//!       |  Loader::begin_again \-- patience --> unread     the storage did not give it
//!       \-----------------------------------------/
//! ```
//!
//! Whoever moves a chunk to `loading` loads it, alone. Pages of a chunk are handed out only after
//! its checksum was found right. A read that the storage fails is repeated until patience ends.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bellwether_statefile::{
    AlignedBuf, CHUNK_SIZE, ChunkFailure, GROUP_CHUNKS, PAGE_SIZE, StateFile, chunk,
};
use rustix::event::EventfdFlags;

use crate::ram::{Content, GuestRam};
use crate::restore::{EventSink, LazyEvent, LoadError, LoadPhase, Progress, RestoreError};
use crate::userfault::Userfaultfd;

const UNTOUCHED: u8 = 0;
const LOADING: u8 = 1;
const LOADED: u8 = 2;
const FAILED: u8 = 3;
const UNREAD: u8 = 4;

/// The first and the longest pause before a read that the storage failed is repeated.
const AGAIN_MIN: Duration = Duration::from_millis(10);
const AGAIN_MAX: Duration = Duration::from_secs(1);

/// How pages get into guest memory.
pub(crate) enum Sink {
    /// The memory may be in use: pages appear whole or not at all.
    Userfault(Userfaultfd),
    /// Nobody uses the memory yet.
    Mapping,
}

/// What a fault thread has to know of a chunk.
pub(crate) enum Claim {
    /// It is the caller's to load.
    Ours,
    /// Another thread loads it and will wake whoever waits.
    Theirs,
    /// Its pages are there.
    Loaded,
    /// It is damaged or cannot be read; whoever waits for it goes on waiting.
    Failed,
}

pub(crate) struct Loader {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) file: StateFile,
    pub(crate) sink: Sink,
    /// Readable when the fault threads shall end.
    pub(crate) ended: OwnedFd,
    chunks: Vec<AtomicU8>,
    /// The first chunk that no fill thread has looked at.
    next: AtomicU64,
    status: Mutex<Status>,
    changed: Condvar,
    on_event: Option<EventSink>,
    pace: Option<Pace>,
    /// How long a read that the storage fails is repeated.
    patience: Duration,
    total_bytes: u64,
    loaded_bytes: AtomicU64,
    pub(crate) faults_loaded: AtomicU64,
    pub(crate) faults_zero: AtomicU64,
    pub(crate) fault_micros_max: AtomicU64,
}

/// What a load may take, and who hears of it.
pub(crate) struct How {
    pub(crate) bytes_per_s: Option<u64>,
    pub(crate) patience: Duration,
    pub(crate) on_event: Option<EventSink>,
}

struct Status {
    /// Chunks with pages that are not loaded yet.
    remaining: u64,
    /// Faults that are being served; the fill stands back.
    urgent: usize,
    /// Somebody makes the memory ordinary, which happens once.
    completing: bool,
    complete: bool,
    failed: Option<Arc<LoadError>>,
}

struct Pace {
    started: Instant,
    bytes_per_s: u64,
    taken: AtomicU64,
}

impl Loader {
    /// A load of all chunks but those without pages, and those that `is_there`.
    pub(crate) fn new(
        ram: Arc<GuestRam>,
        file: StateFile,
        sink: Sink,
        how: How,
        is_there: impl Fn(u64) -> bool,
    ) -> io::Result<Self> {
        let How { bytes_per_s, patience, on_event } = how;
        let count = file.layout().chunk_count();
        let (mut chunks, mut remaining) = (Vec::with_capacity(count as usize), 0);
        let (mut pages, mut loaded_pages) = (0, 0);
        for (chunk, present) in (0..count).filter_map(|chunk| Some((chunk, file.present(chunk)?))) {
            let (count, there) = (u64::from(present.count_ones()), is_there(chunk));
            let done = present == 0 || there;
            chunks.push(AtomicU8::new(if done { LOADED } else { UNTOUCHED }));
            remaining += u64::from(!done);
            pages += count;
            loaded_pages += if there { count } else { 0 };
        }
        let pace = bytes_per_s.map(|rate| Pace {
            started: Instant::now(),
            bytes_per_s: rate.max(1),
            taken: AtomicU64::new(0),
        });
        Ok(Self {
            ended: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            status: Mutex::new(Status {
                remaining,
                urgent: 0,
                completing: false,
                complete: false,
                failed: None,
            }),
            next: AtomicU64::new(0),
            changed: Condvar::new(),
            total_bytes: pages * PAGE_SIZE,
            loaded_bytes: AtomicU64::new(loaded_pages * PAGE_SIZE),
            faults_loaded: AtomicU64::new(0),
            faults_zero: AtomicU64::new(0),
            fault_micros_max: AtomicU64::new(0),
            ram,
            file,
            sink,
            chunks,
            on_event,
            pace,
            patience,
        })
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn progress(&self) -> Progress {
        let status = self.status();
        let phase = match &*status {
            Status { failed: Some(_), .. } => LoadPhase::Failed,
            Status { complete: true, .. } => LoadPhase::Complete,
            _ => LoadPhase::Loading,
        };
        Progress {
            phase,
            loaded_bytes: self.loaded_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes,
            faults_loaded: self.faults_loaded.load(Ordering::Relaxed),
            faults_zero: self.faults_zero.load(Ordering::Relaxed),
            fault_micros_max: self.fault_micros_max.load(Ordering::Relaxed),
        }
    }

    /// Waits for the end of the load; `None` if it has not come in time.
    pub(crate) fn wait_done(&self, longest: Option<Duration>) -> Option<Result<(), RestoreError>> {
        let under_way = |status: &mut Status| !status.complete && status.failed.is_none();
        let status = match longest {
            None => self.changed.wait_while(self.status(), under_way),
            Some(longest) => self
                .changed
                .wait_timeout_while(self.status(), longest, under_way)
                .map(|(status, _)| status)
                .map_err(|poisoned| PoisonError::new(poisoned.into_inner().0)),
        }
        .unwrap_or_else(PoisonError::into_inner);
        match (&status.failed, status.complete) {
            (Some(error), _) => Some(Err(RestoreError::Load(Arc::clone(error)))),
            (None, true) => Some(Ok(())),
            (None, false) => None,
        }
    }

    /// Tries to take a chunk for loading.
    pub(crate) fn claim(&self, chunk: u64) -> Claim {
        let Some(state) = self.chunks.get(chunk as usize) else { return Claim::Failed };
        match state.compare_exchange(UNTOUCHED, LOADING, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Claim::Ours,
            Err(LOADING) => Claim::Theirs,
            Err(LOADED) => Claim::Loaded,
            Err(_) => Claim::Failed,
        }
    }

    /// Loads chunks in a row that the caller has claimed. If one of them is bad, the others are
    /// loaded all the same, each by itself. Returns the bytes that the guest has got.
    pub(crate) fn load(&self, first: u64, count: u64, buffer: &mut AlignedBuf) -> u64 {
        let outcome = self.file.read_group(first, count, buffer);
        match outcome {
            Ok(()) => {
                let bytes = buffer.as_slice().chunks(CHUNK_SIZE as usize);
                (first..first + count)
                    .zip(bytes)
                    .map(|(chunk, bytes)| self.place(chunk, bytes))
                    .sum()
            }
            Err(_) if count > 1 => {
                (first..first + count).map(|chunk| self.load(chunk, 1, buffer)).sum()
            }
            Err(failure) => match self.read_again(first, failure, buffer) {
                Ok(()) => self.place(first, buffer.as_slice()),
                Err(failure) => {
                    let error = LoadError::Chunk(failure);
                    self.set_state(first, if error.may_pass() { UNREAD } else { FAILED });
                    self.fail(error);
                    0
                }
            },
        }
    }

    /// Storage that fails a read may answer the next one. Damage is not asked about twice.
    fn read_again(
        &self,
        chunk: u64,
        mut failure: ChunkFailure,
        buffer: &mut AlignedBuf,
    ) -> Result<(), ChunkFailure> {
        let deadline = Instant::now() + self.patience;
        let mut pause = AGAIN_MIN;
        while failure.may_pass() && Instant::now() < deadline && !self.has_failed_within(pause) {
            match self.file.read_group(chunk, 1, buffer) {
                Ok(()) => return Ok(()),
                Err(again) => failure = again,
            }
            pause = (pause * 2).min(AGAIN_MAX);
        }
        Err(failure)
    }

    /// Waits, for as long as nobody gives the load up.
    fn has_failed_within(&self, longest: Duration) -> bool {
        let under_way = |status: &mut Status| status.failed.is_none();
        let waited = self.changed.wait_timeout_while(self.status(), longest, under_way);
        waited.unwrap_or_else(PoisonError::into_inner).0.failed.is_some()
    }

    /// Makes a load that failed for want of a read begin again; false if none has failed. `accepted`
    /// runs before anything can fail anew.
    pub(crate) fn begin_again(&self, accepted: impl FnOnce()) -> Result<bool, RestoreError> {
        let mut status = self.status();
        let Some(error) = status.failed.clone() else { return Ok(false) };
        let damaged = self.chunks.iter().any(|chunk| chunk.load(Ordering::Acquire) == FAILED);
        if damaged || !error.may_pass() || status.completing {
            return Err(RestoreError::Load(error));
        }
        for chunk in &self.chunks {
            let (from, to) = (UNREAD, UNTOUCHED);
            let _other = chunk.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        }
        self.next.store(0, Ordering::Relaxed);
        self.ram.set_content(Content::Loading);
        status.failed = None;
        accepted();
        Ok(true)
    }

    /// Hands the pages of a checked chunk to the guest.
    fn place(&self, chunk: u64, bytes: &[u8]) -> u64 {
        let bytes = bytes.get(..CHUNK_SIZE as usize).unwrap_or(bytes);
        match self.place_pages(chunk, bytes) {
            Ok(placed) => {
                self.loaded_bytes.fetch_add(placed, Ordering::Relaxed);
                self.set_state(chunk, LOADED);
                let mut status = self.status();
                status.remaining -= 1;
                if status.remaining == 0 {
                    self.changed.notify_all();
                }
                placed
            }
            Err(source) => {
                self.set_state(chunk, FAILED);
                self.fail(LoadError::Place { chunk, source });
                0
            }
        }
    }

    fn place_pages(&self, chunk: u64, bytes: &[u8]) -> io::Result<u64> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let place = self.file.layout().place(chunk).ok_or_else(missing)?;
        let host = self.ram.host_address(place.region).ok_or_else(missing)?;
        let present = self.file.present(chunk).ok_or_else(missing)?;
        let mut placed = 0;
        for (first, count) in chunk::runs(present) {
            let (from, length) = (first * PAGE_SIZE as usize, count * PAGE_SIZE as usize);
            let pages = bytes.get(from..from + length).ok_or_else(missing)?;
            match &self.sink {
                Sink::Userfault(fd) => fd.copy(host + place.offset as usize + from, pages)?,
                Sink::Mapping => self.ram.fill(place.region, place.offset + from as u64, pages),
            }
            placed += length as u64;
        }
        Ok(placed)
    }

    fn set_state(&self, chunk: u64, state: u8) {
        self.chunks[chunk as usize].store(state, Ordering::Release);
    }

    /// Notes the first failure and reports it. The memory is not whole, and will not be by itself.
    pub(crate) fn fail(&self, error: LoadError) {
        let event = LazyEvent::Failed { chunk: error.chunk(), error: error.to_string() };
        {
            let mut status = self.status();
            if status.failed.is_some() || status.complete {
                return;
            }
            self.ram.set_content(Content::Failed);
            status.failed = Some(Arc::new(error));
            self.changed.notify_all();
        }
        self.report(event);
    }

    fn report(&self, event: LazyEvent) {
        if let Some(on_event) = &self.on_event {
            on_event(event);
        }
    }

    /// Makes the fill stand back while the work is done.
    pub(crate) fn urgently(&self, work: impl FnOnce()) {
        self.status().urgent += 1;
        work();
        let mut status = self.status();
        status.urgent -= 1;
        if status.urgent == 0 {
            self.changed.notify_all();
        }
    }

    /// Takes the next chunks in a row that have pages and that nobody has loaded.
    fn next_group(&self) -> Option<(u64, u64)> {
        let count = self.chunks.len() as u64;
        loop {
            let start = self.next.fetch_add(GROUP_CHUNKS, Ordering::Relaxed);
            if start >= count {
                return None;
            }
            let end = (start + GROUP_CHUNKS).min(count);
            if (start..end).all(|chunk| self.state(chunk) != UNTOUCHED) {
                continue;
            }
            return Some((start, end));
        }
    }

    fn state(&self, chunk: u64) -> u8 {
        self.chunks[chunk as usize].load(Ordering::Acquire)
    }

    /// Loads what is still to be loaded of a stretch, in runs that lie in one region.
    fn fill_group(&self, start: u64, end: u64, buffer: &mut AlignedBuf) -> u64 {
        let region = |chunk| self.file.layout().place(chunk).map(|place| place.region);
        let (mut run, mut loaded) = (None::<(u64, u64)>, 0);
        for chunk in start..end {
            let ours = matches!(self.claim(chunk), Claim::Ours);
            if let Some((first, count)) = run
                && (!ours || region(first) != region(chunk))
            {
                loaded += self.load(first, count, buffer);
                run = None;
            }
            if ours {
                run = Some(run.map_or((chunk, 1), |(first, count)| (first, count + 1)));
            }
        }
        loaded + run.map_or(0, |(first, count)| self.load(first, count, buffer))
    }

    /// Waits until no fault is urgent and the rate allows more; false when the fill shall end.
    fn wait_turn(&self) -> bool {
        let mut status = self.status();
        loop {
            // When fault threads have loaded the last chunk, there is no turn to wait for.
            if status.failed.is_some() || status.remaining == 0 {
                return false;
            }
            let delay = self.pace.as_ref().map_or(Duration::ZERO, Pace::delay);
            if status.urgent == 0 && delay.is_zero() {
                return true;
            }
            // A fault in service ends with a notification; the rate, with time.
            let longest = if delay.is_zero() { Duration::from_secs(1) } else { delay };
            status = self
                .changed
                .wait_timeout(status, longest)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn fill(&self) {
        let mut buffer = AlignedBuf::new((GROUP_CHUNKS * CHUNK_SIZE) as usize);
        while self.wait_turn() {
            let Some((start, end)) = self.next_group() else { return };
            let loaded = self.fill_group(start, end, &mut buffer);
            if let Some(pace) = &self.pace {
                pace.taken.fetch_add(loaded, Ordering::Relaxed);
            }
        }
    }

    /// Waits until fault threads, too, have loaded what they took; then makes the memory ordinary.
    fn complete(&self) {
        let under_way = |status: &mut Status| status.remaining > 0 && status.failed.is_none();
        let waited = self.changed.wait_while(self.status(), under_way);
        {
            let mut status = waited.unwrap_or_else(PoisonError::into_inner);
            // After a load that began again there are two that wait for its end.
            if status.failed.is_some() || status.completing {
                return;
            }
            status.completing = true;
        }
        if let Err(source) = self.release() {
            // The memory is all there and faults on zero pages are still served; but a state of
            // which nobody knows is not one to go on with.
            return self.fail(LoadError::Userfault { operation: "UFFDIO_UNREGISTER", source });
        }
        {
            let mut status = self.status();
            if status.failed.is_some() {
                return;
            }
            self.ram.set_content(Content::Whole);
            status.complete = true;
            self.changed.notify_all();
        }
        self.report(LazyEvent::Complete);
    }

    /// Gives the memory back to the kernel and ends the fault threads.
    fn release(&self) -> io::Result<()> {
        let Sink::Userfault(userfaultfd) = &self.sink else { return Ok(()) };
        for region in self.ram.mapped() {
            let length = region.guest.length as usize;
            userfaultfd.unregister(region.host, length)?;
            // The kernel wakes who waits before it takes the memory back: a fault under a lock of its
            // own mapping alone may come in between, and would wait for ever (seen on Linux 6).
            userfaultfd.wake(region.host, length)?;
        }
        rustix::io::write(&self.ended, &1u64.to_ne_bytes())?;
        Ok(())
    }
}

impl Drop for Loader {
    /// Closing the userfaultfd of an unfinished load would let whoever waits for a page read zeros.
    fn drop(&mut self) {
        if !self.status().complete {
            std::mem::forget(std::mem::replace(&mut self.sink, Sink::Mapping));
            std::mem::forget(Arc::clone(&self.ram));
        }
    }
}

impl Pace {
    /// How long to wait until the rate allows the next piece.
    fn delay(&self) -> Duration {
        let taken = self.taken.load(Ordering::Relaxed) as f64;
        let due = Duration::from_secs_f64(taken / self.bytes_per_s as f64);
        due.saturating_sub(self.started.elapsed())
    }
}

/// Loads everything, with so many threads, the calling one included.
pub(crate) fn fill_all(loader: &Loader, threads: usize) {
    std::thread::scope(|scope| {
        for index in 1..threads {
            let builder = std::thread::Builder::new().name(format!("ram-fill-{index}"));
            if builder.spawn_scoped(scope, || loader.fill()).is_err() {
                break;
            }
        }
        loader.fill();
    });
    loader.complete();
}
