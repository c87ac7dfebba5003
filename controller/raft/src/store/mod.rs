//! One redb database per controller: the vote, the log and the last snapshot.
//!
//! ```text
//!   openraft core ──save_vote, append, truncate, purge──┐
//!   snapshot builder ──pieces, commit───────────────────┤ bounded queue
//!                                                       v
//!                                                 writer thread ── one transaction per batch ──> redb
//!   replication, applying <── Recent (memory) or a read transaction ────────────────────────────┘
//! ```
//!
//! The writer owns every write. A crash at any point leaves the last committed transaction, which
//! has everything that was ever acknowledged; pieces of an unfinished snapshot are swept at the
//! next start.

mod error;
mod log;
mod recent;
mod snapshot;
mod tables;
#[cfg(test)]
pub(crate) mod tests;
mod writer;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;

use redb::{Builder, Database, DatabaseError, ReadableDatabase, StorageError};
use tokio::sync::{mpsc, oneshot};

pub use self::error::StoreError;
use self::recent::Recent;
use self::tables::{FORMAT, KEY_FORMAT, KEY_NODE, SnapshotRecord};
use self::writer::{Done, Job, Writer};
use crate::types::{LogId, Vote};

/// The name of the database file in the data directory.
pub const DATABASE_FILE: &str = "raft.redb";

/// The name of a file that lies beside the database from its first use on. A controller whose
/// database is gone does not vote any more, because it has forgotten its vote.
pub const MARKER_FILE: &str = "raft.began";

/// Called when a commit has failed. The disk's contents are unknown from then on.
pub type FatalHook = Arc<dyn Fn(&StoreError) + Send + Sync>;

/// The hook for a real controller: no flush, no destructor, nothing that could still answer anyone.
pub fn abort_process(_error: &StoreError) {
    std::process::abort();
}

/// How a database is opened.
#[derive(Clone)]
pub struct StoreOptions {
    pub node_id: u64,
    pub cache_bytes: usize,
    pub write_queue: usize,
    pub on_fatal: FatalHook,
}

/// What readers find in memory.
#[derive(Debug, Default)]
struct Memory {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    /// The last entry, or the last purged one if there is no entry.
    last: Option<LogId>,
    recent: Recent,
    snapshot: Option<SnapshotRecord>,
}

struct Shared {
    /// `None` once the database is closed.
    db: RwLock<Option<Database>>,
    memory: Mutex<Memory>,
    /// Snapshots are written one at a time, so that an older one never replaces a newer one.
    snapshot_turn: tokio::sync::Mutex<u64>,
    on_fatal: FatalHook,
}

impl Shared {
    fn with_database<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let guard = self.db.read().unwrap_or_else(PoisonError::into_inner);
        work(guard.as_ref().ok_or(StoreError::Closed)?)
    }

    fn close(&self) {
        self.db.write().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// A cloneable handle to the database of one controller.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
}

impl Store {
    /// Opens `raft.redb` in a directory, or makes it, and checks everything that it holds.
    pub fn open(data_dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let path = data_dir.join(DATABASE_FILE);
        make_directory(data_dir)?;
        let marker = Marker::beside(&path);
        // A database has its name only once it is complete, so an empty one was lost.
        match fs::metadata(&path).map(|file| file.len()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                marker.require_absent(&path)?;
                make_database(data_dir, &path, &options)?;
            }
            Ok(0) => return Err(marker.lost(&path)),
            _ => {}
        }
        let db = builder(&options).open(&path).map_err(|error| open_error(path.clone(), error))?;
        let store = Self::from_database(db, options)?;
        // Before anything can be promised to anybody, and after the database is whole.
        marker.set()?;
        Ok(store)
    }

    /// Opens a database on any storage: tests bring one that fails.
    #[cfg(test)]
    pub(crate) fn open_backend(
        backend: impl redb::StorageBackend,
        options: StoreOptions,
    ) -> Result<Self, StoreError> {
        let db = builder(&options).create_with_backend(backend);
        let db = db.map_err(|error| open_error(DATABASE_FILE.into(), error))?;
        Self::from_database(db, options)
    }

    /// Takes over a database that is open already.
    fn from_database(db: Database, options: StoreOptions) -> Result<Self, StoreError> {
        prepare(&db, options.node_id)?;
        let loaded = read(&db, tables::load)?;
        let generation = loaded.snapshot.as_ref().map_or(0, |record| record.generation);
        sweep_snapshots(&db, generation)?;
        let mut recent = Recent::default();
        let last = loaded.entries.last().map(|(entry, _)| entry.log_id).or(loaded.purged);
        for (entry, size) in loaded.entries {
            let index = entry.log_id.index;
            recent.push(entry, size);
            recent.mark_durable(index);
        }
        let memory = Memory {
            vote: loaded.vote,
            committed: loaded.committed,
            purged: loaded.purged,
            last,
            recent,
            snapshot: loaded.snapshot,
        };
        let shared = Arc::new(Shared {
            db: RwLock::new(Some(db)),
            memory: Mutex::new(memory),
            snapshot_turn: tokio::sync::Mutex::new(generation),
            on_fatal: options.on_fatal,
        });
        let (jobs, queue) = mpsc::channel(options.write_queue.max(1));
        let writer =
            Writer { shared: Arc::clone(&shared), jobs: queue, committed: None, failed: None };
        thread::Builder::new().name("raft-writer".into()).spawn(move || writer.run()).map_err(
            |source| StoreError::Io {
                operation: "start the writer's thread for",
                path: DATABASE_FILE.into(),
                source,
            },
        )?;
        Ok(Self { shared, jobs })
    }

    /// Writes what still waits and closes the database; every later use is an error.
    pub async fn close(&self) -> Result<(), StoreError> {
        self.ask(Job::Stop).await
    }

    /// Blocks until everything that was asked of the writer before is done.
    #[cfg(test)]
    pub(crate) fn settle(&self) {
        let (done, answer) = oneshot::channel();
        // A writer that has ended has nothing left to do.
        if self.jobs.blocking_send(Job::Settle(done)).is_ok() {
            let _ = answer.blocking_recv();
        }
    }

    /// Sends a job and waits until it is on disk.
    async fn ask(&self, job: impl FnOnce(Done) -> Job) -> Result<(), StoreError> {
        let (done, answer) = oneshot::channel();
        self.jobs.send(job(done)).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// Reads from disk, away from the tasks that must not wait for one.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&redb::ReadTransaction) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || shared.with_database(|db| read(db, work)))
            .await
            .map_err(|_| StoreError::Closed)?
    }
}

/// The sign that a database has been made here.
struct Marker(PathBuf);

impl Marker {
    fn beside(database: &Path) -> Self {
        Self(database.with_file_name(MARKER_FILE))
    }

    /// For a database that is not there, or has never been written.
    fn require_absent(&self, path: &Path) -> Result<(), StoreError> {
        if self.0.exists() { Err(self.lost(path)) } else { Ok(()) }
    }

    fn lost(&self, path: &Path) -> StoreError {
        let dir = path.parent().unwrap_or(path).to_owned();
        StoreError::Lost { path: path.to_owned(), marker: self.0.clone(), dir }
    }

    fn set(&self) -> Result<(), StoreError> {
        if self.0.exists() {
            return Ok(());
        }
        let made = File::create(&self.0).and_then(|file| file.sync_all());
        made.map_err(|source| StoreError::Io { operation: "make", path: self.0.clone(), source })?;
        self.0.parent().map_or(Ok(()), sync_directory)
    }
}

/// Every page is compared with its checksum before anything is believed. redb by itself trusts a
/// file that was closed well: one flipped bit in the name of a record hid the vote.
fn builder(options: &StoreOptions) -> Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(options.cache_bytes).set_check_integrity_on_open(true);
    builder
}

/// Makes a database under another name, and gives it its own when it is complete: a crash in
/// between leaves nothing that the next start would have to refuse.
fn make_database(data_dir: &Path, path: &Path, options: &StoreOptions) -> Result<(), StoreError> {
    let scratch = path.with_extension("redb.new");
    let io = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| StoreError::Io { operation, path, source }
    };
    match fs::remove_file(&scratch) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io("remove the unfinished database", &scratch)(error));
        }
        _ => {}
    }
    let db = builder(options).create(&scratch).map_err(|e| open_error(scratch.clone(), e))?;
    prepare(&db, options.node_id)?;
    db.close().map_err(|error| open_error(scratch.clone(), error))?;
    // A link, unlike a rename, never replaces what another process was faster to make.
    match fs::hard_link(&scratch, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io("name the new database", path)(error));
        }
        _ => {}
    }
    fs::remove_file(&scratch).map_err(io("remove the second name", &scratch))?;
    // The file's name must survive a power failure as its contents do.
    sync_directory(data_dir)
}

/// Makes the directory if it is not there. What the cluster agrees upon is nobody else's business.
fn make_directory(path: &Path) -> Result<(), StoreError> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| {
        StoreError::Io { operation: "create directory", path: path.to_owned(), source }
    })?;
    path.parent().filter(|parent| parent.is_dir()).map_or(Ok(()), sync_directory)
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|source| StoreError::Io {
        operation: "sync directory",
        path: path.to_owned(),
        source,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(
    db: &Database,
    work: impl FnOnce(&redb::ReadTransaction) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    work(&db.begin_read().map_err(|e| StoreError::database("begin a raft read", e))?)
}

fn open_error(path: PathBuf, error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path },
        DatabaseError::Storage(StorageError::Corrupted(found)) => {
            StoreError::Damaged { path, found }
        }
        error => StoreError::Open { path, source: Box::new(error.into()) },
    }
}

/// Refuses a database of a newer program or of another controller; marks a new one.
fn prepare(db: &Database, node_id: u64) -> Result<(), StoreError> {
    match read(db, tables::read_format)? {
        Some(found) if found > FORMAT => Err(StoreError::NewerFormat { found, supported: FORMAT }),
        Some(_) => match read(db, |tx| tables::read_meta::<u64>(tx, KEY_NODE))? {
            Some(found) if found != node_id => {
                Err(StoreError::WrongNode { found, expected: node_id })
            }
            _ => Ok(()),
        },
        None => writer::commit(db, |tables| {
            let write = |e| StoreError::database("mark a new raft database", e);
            let node = tables::encode_meta(KEY_NODE, &node_id)?;
            tables.meta.insert(KEY_FORMAT, FORMAT.to_le_bytes().as_slice()).map_err(write)?;
            tables.meta.insert(KEY_NODE, node.as_slice()).map_err(write)?;
            Ok(())
        }),
    }
}

/// Removes what a crash left of a snapshot that never became the current one.
fn sweep_snapshots(db: &Database, current: u64) -> Result<(), StoreError> {
    writer::commit(db, |tables| {
        let swept = tables.snapshot.retain(|key, _| key.0 == current);
        swept.map_err(|e| StoreError::database("sweep unfinished raft snapshots", e))
    })
}
