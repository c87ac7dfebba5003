//! Restoring guest memory on demand: the VM starts at once, its pages come when they are touched.
//!
//! ```text
//!   start ----> loading ----> complete    unregistered, memory like any other
//!                 ^  |
//!           retry |  +------> failed      a chunk cannot be read in time, or its checksum is wrong
//!                 \--------------/        (never, when it is damaged)
//! ```
//!
//! - **Fault threads** answer whoever waits for a page: read its chunk (256 KiB), check it, and only
//!   then hand out its pages. A page that is not in the file is zero, without any reading.
//! - **Fill threads** load the rest in order, 1 MiB at a time, and stand back while a fault is served.
//! - Faults of vCPUs in KVM, of device threads and of system calls on guest memory are all served
//!   alike, because all go through the one mapping.
//!
//! **A read that the storage fails** is repeated, ever more slowly, until `read_patience` ends. After
//! that the load has failed; [`LazyRestore::retry`] begins it again where nothing is damaged, and
//! those who wait for a page get it then.
//!
//! **After a failure** the damaged chunk stays missing for ever: whoever touches it blocks. It never
//! reads zeros or wrong data. All other chunks are still served when touched, so that the VMM can
//! stop its other threads and report. There is no way to unblock a thread that waits for a damaged
//! page but to end the process (`SIGKILL` reaches it); the VMM must not close the userfaultfd, which
//! would let the thread read zeros. That is why dropping a [`LazyRestore`] closes nothing: the load
//! goes on, its threads keep the descriptor and the memory.
//!
//! **Until it is complete** guest memory must not be saved ([`crate::save_memory`] refuses), and no
//! page may be given back to the host (balloon, `MADV_REMOVE`): its user would wait for ever.
//!
//! Without userfaultfd the whole memory is read and checked before [`LazyRestore::start`] returns.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bellwether_statefile::{ChunkFailure, StateFile};

use crate::ahead::Ahead;
use crate::faults;
use crate::loader::{self, How, Loader, Sink};
use crate::ram::{GuestRam, RamError};
use crate::userfault::Userfaultfd;

/// Where the userfaultfd comes from.
#[derive(Debug, Default)]
pub enum UserfaultSource {
    /// Open it now; without it, load everything before the start.
    #[default]
    Open,
    /// It was opened before, say before a jail was entered.
    Given(Userfaultfd),
    /// Load everything before the start.
    Never,
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// What a load reports: `Complete` once, `Failed` once for each try. `Failed` means that the VM must
/// stop, and must not go on before a retry is accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LazyEvent {
    Complete,
    Failed { chunk: Option<u64>, error: String },
}

/// Who hears the event; called on a thread of the load. It must not block.
pub type EventSink = Box<dyn Fn(LazyEvent) + Send + Sync>;

/// How to load.
pub struct LazyOptions {
    /// Threads that answer faults, at least one: more hide the latency of the storage when several
    /// vCPUs wait.
    pub fault_threads: usize,
    /// Threads that load the rest, at least one.
    pub fill_threads: usize,
    /// The most that the fill threads read a second together; faults are not held back.
    pub fill_bytes_per_s_max: Option<u64>,
    pub userfaultfd: UserfaultSource,
    /// After loading ahead, a residue of this size is loaded before the guest runs. It lies in a row
    /// in the file, so that reading it at once takes less than taking its old pages out of memory one
    /// by one, to have them read on demand; and a guest that waits for no page is not slow at first.
    pub at_once_bytes_max: u64,
    /// How long a read that the storage fails is repeated before the load has failed.
    pub read_patience: Duration,
    pub on_event: Option<EventSink>,
}

impl Default for LazyOptions {
    fn default() -> Self {
        Self {
            fault_threads: 2,
            fill_threads: 2,
            fill_bytes_per_s_max: None,
            userfaultfd: UserfaultSource::default(),
            at_once_bytes_max: 128 << 20,
            read_patience: Duration::from_secs(30),
            on_event: None,
        }
    }
}

/// How the memory comes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RestoreMode {
    /// Pages come when they are touched; the rest follows in the background.
    OnDemand,
    /// All was loaded before the start, because userfaultfd is not to be had.
    Eager { reason: String },
    /// All was loaded before the start, most of it before the file was sealed.
    Ahead,
}

/// Where a load stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoadPhase {
    Loading,
    Complete,
    Failed,
}

/// How far a load has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    pub phase: LoadPhase,
    pub loaded_bytes: u64,
    /// The pages that are in the file; zero pages do not count.
    pub total_bytes: u64,
    /// Faults that read a chunk.
    pub faults_loaded: u64,
    /// Faults on pages that are zero.
    pub faults_zero: u64,
    /// The longest time from a fault's message to its page.
    pub fault_micros_max: u64,
}

/// Why memory could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Chunk(#[from] ChunkFailure),
    #[error("memory chunk {chunk}: handing its pages to the guest: {source}")]
    Place { chunk: u64, source: io::Error },
    #[error("{operation}: {source}")]
    Userfault { operation: &'static str, source: io::Error },
}

impl LoadError {
    /// Whether the storage, and not the file, is at fault: then it may be read later.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Chunk(failure) if failure.may_pass())
    }

    /// The chunk, if it is about one.
    pub fn chunk(&self) -> Option<u64> {
        match self {
            Self::Chunk(failure) => Some(failure.chunk),
            Self::Place { chunk, .. } => Some(*chunk),
            Self::Userfault { .. } => None,
        }
    }
}

/// A restore of guest memory could not be started, or has failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("restore of guest memory from {path}: the file has other memory regions than the VM")]
    OtherMemory { path: String },
    #[error("restore of guest memory from {path}: this memory was restored into before")]
    NotFresh { path: String },
    #[error("restore of guest memory: {operation}: {source}")]
    Setup { operation: &'static str, source: Arc<io::Error> },
    #[error("restore of guest memory: {0}; the VM must not go on")]
    Load(Arc<LoadError>),
    #[error("restore of guest memory: {0}")]
    Ram(Arc<RamError>),
}

/// A load under way. Dropping it detaches: the load goes on.
pub struct LazyRestore {
    loader: Arc<Loader>,
    mode: RestoreMode,
    fill_threads: usize,
}

impl LazyRestore {
    /// Starts to load the memory of a file into fresh guest memory with the same regions. The VM
    /// may run and devices may use the memory as soon as this returns.
    ///
    /// On an error nothing may use the memory: drop it.
    pub fn start(
        ram: Arc<GuestRam>,
        file: StateFile,
        options: LazyOptions,
    ) -> Result<Self, RestoreError> {
        let path = || file.path().display().to_string();
        if file.header().regions != ram.regions() {
            return Err(RestoreError::OtherMemory { path: path() });
        }
        if !ram.begin_loading() {
            return Err(RestoreError::NotFresh { path: path() });
        }
        Self::begin(ram, file, options, |_| false)
    }

    /// The same for memory into which the same file was loaded before its seal. If little is
    /// missing, it is loaded before this returns; otherwise it comes on demand.
    pub fn start_after(
        ahead: Ahead,
        file: StateFile,
        options: LazyOptions,
    ) -> Result<Self, RestoreError> {
        let ram = Arc::clone(ahead.ram());
        if file.header().regions != ram.regions() {
            return Err(RestoreError::OtherMemory { path: file.path().display().to_string() });
        }
        let begun = Instant::now();
        let compared = ahead.compare(&file);
        let (missing_bytes, compare_us) = (compared.missing_bytes(), micros(begun));
        let of_ram = |error| RestoreError::Ram(Arc::new(error));
        if missing_bytes > options.at_once_bytes_max {
            compared.take_out_stale(&ram, &file).map_err(of_ram)?;
            return Self::begin(ram, file, options, |chunk| compared.is_there(chunk));
        }
        compared.take_out_zero(&ram, &file).map_err(of_ram)?;
        let take_out_us = micros(begun);
        compared.load_missing(&ram, &file)?;
        let read_us = micros(begun);
        tracing::info!(missing_bytes, compare_us, take_out_us, read_us, "memory was loaded ahead");
        let LazyOptions { fill_threads, read_patience: patience, on_event, .. } = options;
        let how = How { bytes_per_s: None, patience, on_event };
        let loader = Loader::new(ram, file, Sink::Mapping, how, |_| true)
            .map_err(|source| setup("making an eventfd", source))?;
        let (loader, fill_threads) = (Arc::new(loader), fill_threads.max(1));
        let this = Self { loader, mode: RestoreMode::Ahead, fill_threads };
        loader::fill_all(&this.loader, 1);
        this.wait_done()?;
        Ok(this)
    }

    fn begin(
        ram: Arc<GuestRam>,
        file: StateFile,
        options: LazyOptions,
        is_there: impl Fn(u64) -> bool,
    ) -> Result<Self, RestoreError> {
        let LazyOptions {
            fault_threads,
            fill_threads,
            fill_bytes_per_s_max,
            userfaultfd,
            read_patience: patience,
            on_event,
            ..
        } = options;
        let how = How { bytes_per_s: fill_bytes_per_s_max, patience, on_event };
        let (sink, mode) = choose_sink(&ram, userfaultfd);
        let loader = Loader::new(ram, file, sink, how, is_there)
            .map_err(|source| setup("making an eventfd", source))?;
        let loader = Arc::new(loader);
        let this = Self { loader, mode, fill_threads: fill_threads.max(1) };
        match &this.mode {
            RestoreMode::OnDemand => this.spawn(fault_threads.max(1))?,
            RestoreMode::Eager { reason } => {
                tracing::warn!(%reason, "guest memory is loaded before the start");
                loader::fill_all(&this.loader, this.fill_threads);
                this.wait_done()?;
            }
            RestoreMode::Ahead => {}
        }
        Ok(this)
    }

    /// Whether pages come on demand or have all come.
    pub fn mode(&self) -> &RestoreMode {
        &self.mode
    }

    pub fn progress(&self) -> Progress {
        self.loader.progress()
    }

    /// Waits until all is loaded, or until it has failed.
    pub fn wait_done(&self) -> Result<(), RestoreError> {
        self.loader.wait_done(None).unwrap_or(Ok(()))
    }

    /// The same for at most this long; `None` if it is still loading then.
    pub fn wait_done_for(&self, longest: Duration) -> Option<Result<(), RestoreError>> {
        self.loader.wait_done(Some(longest))
    }

    /// Begins a load again that failed because the storage did not give a chunk; false if it has
    /// not failed. `accepted` runs before anything can fail anew. An error says that the memory is
    /// lost: a chunk is damaged.
    pub fn retry(&self, accepted: impl FnOnce()) -> Result<bool, RestoreError> {
        let again = self.loader.begin_again(accepted)?;
        if again {
            self.spawn_fill()?;
        }
        Ok(again)
    }

    fn spawn(&self, fault_threads: usize) -> Result<(), RestoreError> {
        for index in 0..fault_threads {
            let loader = Arc::clone(&self.loader);
            spawn(format!("ram-fault-{index}"), move || faults::serve(&loader))?;
        }
        self.spawn_fill()
    }

    fn spawn_fill(&self) -> Result<(), RestoreError> {
        let (loader, threads) = (Arc::clone(&self.loader), self.fill_threads);
        spawn("ram-fill".to_owned(), move || loader::fill_all(&loader, threads))
    }
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<(), RestoreError> {
    let outcome = thread::Builder::new().name(name).spawn(work);
    outcome.map(drop).map_err(|source| setup("starting a thread", source))
}

fn setup(operation: &'static str, source: io::Error) -> RestoreError {
    RestoreError::Setup { operation, source: Arc::new(source) }
}

/// Registers all memory with a userfaultfd, or says why it has to go without.
fn choose_sink(ram: &GuestRam, source: UserfaultSource) -> (Sink, RestoreMode) {
    let userfaultfd = match source {
        UserfaultSource::Open => Userfaultfd::open().map_err(|e| format!("userfaultfd: {e}")),
        UserfaultSource::Given(userfaultfd) => Ok(userfaultfd),
        UserfaultSource::Never => Err("asked for".to_owned()),
    };
    let registered = userfaultfd.and_then(|userfaultfd| {
        let register =
            |r: &crate::ram::MappedRegion| userfaultfd.register(r.host, r.guest.length as usize);
        let outcome = ram.mapped().iter().try_for_each(register);
        // Dropping the descriptor takes back what was registered; nothing was touched yet.
        outcome.map(|()| userfaultfd).map_err(|e| format!("userfaultfd registration: {e}"))
    });
    match registered {
        Ok(userfaultfd) => (Sink::Userfault(userfaultfd), RestoreMode::OnDemand),
        Err(reason) => (Sink::Mapping, RestoreMode::Eager { reason }),
    }
}
