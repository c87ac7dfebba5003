//! The one thread that writes.
//!
//! Jobs wait in a bounded queue; whatever has gathered while the disk was busy becomes one
//! transaction and one flush (group commit). The order of the queue is the order of the log, so
//! votes and appends are serialised. Nobody is answered before the commit has returned. A commit
//! that fails leaves unknown bytes behind: the hook is called, every later job fails, and nothing
//! is ever tried again.

use std::sync::Arc;

use redb::{Database, Durability};
use tokio::sync::{mpsc, oneshot};

use super::error::StoreError;
use super::tables::{
    self, KEY_COMMITTED, KEY_PURGED, KEY_SNAPSHOT, KEY_VOTE, SnapshotRecord, Tables,
};
use super::{Shared, lock};
use crate::types::{LogId, TypeConfig, Vote};

/// One transaction takes so many jobs and about so many bytes at most.
const BATCH_JOBS: usize = 256;
const BATCH_BYTES: usize = 16 << 20;

pub(crate) type Done = oneshot::Sender<Result<(), StoreError>>;
pub(crate) type AppendDone = openraft::storage::IOFlushed<TypeConfig>;

/// What the writer is asked to do.
pub(crate) enum Job {
    Vote(Vote, Done),
    /// Rides along with the next commit: a lost one only makes a restart wait for the leader.
    Committed(LogId),
    Append {
        records: Vec<(u64, Vec<u8>)>,
        done: AppendDone,
    },
    /// Removes the entries from this index on.
    Truncate(u64, Done),
    Purge(LogId, Done),
    SnapshotPieces {
        generation: u64,
        first: u32,
        pieces: Vec<Vec<u8>>,
        done: Done,
    },
    SnapshotCommit(SnapshotRecord, Done),
    Stop(Done),
    /// Only asks to be answered in its turn.
    #[cfg(test)]
    Settle(Done),
}

impl Job {
    fn bytes(&self) -> usize {
        match self {
            Self::Append { records, .. } => records.iter().map(|(_, bytes)| bytes.len()).sum(),
            Self::SnapshotPieces { pieces, .. } => pieces.iter().map(Vec::len).sum(),
            _ => 0,
        }
    }

    /// Puts what the job writes into an open transaction.
    fn write(&self, tables: &mut Tables<'_>) -> Result<(), StoreError> {
        let write = |e| StoreError::database("write to the raft database", e);
        match self {
            Self::Vote(vote, _) => put_meta(tables, KEY_VOTE, vote),
            Self::Append { records, .. } => {
                for (index, bytes) in records {
                    tables.log.insert(*index, bytes.as_slice()).map_err(write)?;
                }
                Ok(())
            }
            Self::Truncate(first, _) => tables.log.retain_in(*first.., |_, _| false).map_err(write),
            Self::Purge(upto, _) => {
                tables.log.retain_in(..=upto.index, |_, _| false).map_err(write)?;
                put_meta(tables, KEY_PURGED, upto)
            }
            Self::SnapshotPieces { generation, first, pieces, .. } => {
                for (number, piece) in (*first..).zip(pieces) {
                    let key = (*generation, number);
                    tables.snapshot.insert(key, piece.as_slice()).map_err(write)?;
                }
                Ok(())
            }
            Self::SnapshotCommit(record, _) => {
                let keep = record.generation;
                tables.snapshot.retain(|key, _| key.0 == keep).map_err(write)?;
                put_meta(tables, KEY_SNAPSHOT, record)
            }
            Self::Committed(_) | Self::Stop(_) => Ok(()),
            #[cfg(test)]
            Self::Settle(_) => Ok(()),
        }
    }

    /// Tells whoever waits.
    fn answer(self, shared: &Shared, result: Result<(), &StoreError>) {
        let result = result.map_err(|error| StoreError::Failed(error.to_string()));
        match self {
            Self::Append { records, done } => {
                if let (Ok(()), Some((last, _))) = (&result, records.last()) {
                    lock(&shared.memory).recent.mark_durable(*last);
                }
                done.io_completed(result.map_err(Into::into));
            }
            Self::Vote(_, done)
            | Self::Truncate(_, done)
            | Self::Purge(_, done)
            | Self::SnapshotPieces { done, .. }
            | Self::SnapshotCommit(_, done)
            | Self::Stop(done) => {
                // Whoever asked may have gone; the write stands nevertheless.
                let _ = done.send(result);
            }
            #[cfg(test)]
            Self::Settle(done) => drop(done.send(result)),
            Self::Committed(_) => {}
        }
    }
}

fn put_meta<T: serde::Serialize>(
    tables: &mut Tables<'_>,
    key: &'static str,
    value: &T,
) -> Result<(), StoreError> {
    let bytes = tables::encode_meta(key, value)?;
    let written = tables.meta.insert(key, bytes.as_slice());
    written.map(drop).map_err(|e| StoreError::database("write to the raft database", e))
}

/// Commits one transaction with everything that `write` puts into it.
pub(crate) fn commit(
    db: &Database,
    write: impl FnOnce(&mut Tables<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut tx = db.begin_write().map_err(|e| StoreError::database("begin a raft write", e))?;
    tx.set_durability(Durability::Immediate)
        .map_err(|e| StoreError::database("make a raft write durable", e))?;
    // Two phases: after a crash the last commit is whole, and is never given up for the one before.
    tx.set_quick_repair(true);
    write(&mut Tables::open(&tx)?)?;
    tx.commit().map_err(|e| StoreError::database("commit to the raft database", e))
}

/// The state of the thread.
pub(crate) struct Writer {
    pub shared: Arc<Shared>,
    pub jobs: mpsc::Receiver<Job>,
    pub committed: Option<LogId>,
    pub failed: Option<StoreError>,
}

impl Writer {
    /// Works until it is stopped, or until nobody is left who could ask.
    pub fn run(mut self) {
        while let Some(first) = self.jobs.blocking_recv() {
            let (batch, stop) = self.gather(first);
            self.commit_batch(batch, stop.is_some());
            if let Some(stop) = stop {
                self.close(stop);
                return;
            }
        }
    }

    /// Takes what waits already, up to the bounds of one transaction. Returns a stop separately.
    fn gather(&mut self, first: Job) -> (Vec<Job>, Option<Job>) {
        let (mut batch, mut bytes, mut next) = (Vec::new(), 0, Some(first));
        while let Some(job) = next.take() {
            match job {
                Job::Stop(_) => return (batch, Some(job)),
                Job::Committed(id) => self.committed = Some(id),
                job => {
                    bytes += job.bytes();
                    batch.push(job);
                }
            }
            if batch.len() < BATCH_JOBS && bytes < BATCH_BYTES {
                next = self.jobs.try_recv().ok();
            }
        }
        (batch, None)
    }

    fn commit_batch(&mut self, batch: Vec<Job>, stopping: bool) {
        let pending = stopping && self.committed.is_some();
        #[cfg(test)]
        if batch.iter().all(|job| matches!(job, Job::Settle(_))) && !pending {
            return batch.into_iter().for_each(|job| job.answer(&self.shared, Ok(())));
        }
        if batch.is_empty() && !pending {
            return;
        }
        if self.failed.is_none() {
            if let Err(error) = self.try_commit(&batch) {
                tracing::error!(%error, "the raft database failed; this process must end");
                (self.shared.on_fatal)(&error);
                self.failed = Some(error);
            } else {
                self.committed = None;
            }
        }
        for job in batch {
            job.answer(&self.shared, self.failed.as_ref().map_or(Ok(()), Err));
        }
    }

    fn try_commit(&self, batch: &[Job]) -> Result<(), StoreError> {
        self.shared.with_database(|db| {
            commit(db, |tables| {
                for job in batch {
                    job.write(tables)?;
                }
                match &self.committed {
                    Some(id) => put_meta(tables, KEY_COMMITTED, id),
                    None => Ok(()),
                }
            })
        })
    }

    /// Closes the database, so that its lock is free when the stop is answered.
    fn close(&mut self, stop: Job) {
        self.shared.close();
        stop.answer(&self.shared, self.failed.as_ref().map_or(Ok(()), Err));
    }
}
