//! The database as openraft's log storage.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};

use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{LogIdOptionExt, OptionalSend};

use super::error::StoreError;
use super::tables;
use super::writer::Job;
use super::{Store, lock};
use crate::types::{Entry, LogId, TypeConfig, Vote};

/// What replication reads at once. It leaves room in a message of 16 MiB.
const READ_BYTES: usize = 4 << 20;

impl Store {
    /// Reads entries without a hole: those in memory from there, older ones from disk.
    async fn entries(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Entry>, StoreError> {
        // Memory first: what it has forgotten by the time of the read from disk was on disk before.
        let (recent, disk_end) = {
            let memory = lock(&self.shared.memory);
            let first = memory.recent.first().unwrap_or(range.end);
            (memory.recent.range(range.clone()), first.min(range.end))
        };
        let mut found = Vec::new();
        if range.start < disk_end {
            let start = range.start;
            found =
                self.read(move |tx| tables::read_entries(tx, start..disk_end, max_bytes)).await?;
        }
        let reached = found.last().is_none_or(|(entry, _)| entry.log_id.index + 1 == disk_end);
        if reached {
            found.extend(recent);
        }
        limit(found, max_bytes)
    }
}

/// Cuts entries to a number of bytes, but leaves one at least, and refuses a hole.
fn limit(found: Vec<(Entry, usize)>, max_bytes: usize) -> Result<Vec<Entry>, StoreError> {
    let (mut entries, mut total) = (Vec::<Entry>::with_capacity(found.len()), 0_usize);
    for (entry, size) in found {
        if let Some(last) = entries.last() {
            let (expected, index) = (last.log_id.index + 1, entry.log_id.index);
            if index != expected {
                return Err(StoreError::Hole { expected, found: index });
            }
        }
        total = total.saturating_add(size);
        if total > max_bytes && !entries.is_empty() {
            break;
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn exclusive(range: impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    start..end.max(start)
}

impl RaftLogReader<TypeConfig> for Store {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        Ok(self.entries(exclusive(range), usize::MAX).await?)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        Ok(self.entries(start..end, READ_BYTES).await?)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(lock(&self.shared.memory).vote)
    }
}

impl RaftLogStorage<TypeConfig> for Store {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let memory = lock(&self.shared.memory);
        Ok(LogState { last_purged_log_id: memory.purged, last_log_id: memory.last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.ask(|done| Job::Vote(*vote, done)).await?;
        lock(&self.shared.memory).vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        lock(&self.shared.memory).committed = committed;
        if let Some(id) = committed {
            // In the queue behind the entries it covers, so it is never on disk before them.
            self.jobs.send(Job::Committed(id)).await.map_err(|_| StoreError::Closed)?;
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(lock(&self.shared.memory).committed)
    }

    async fn append<I>(&mut self, entries: I, done: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut records = Vec::new();
        let mut fresh = Vec::new();
        for entry in entries {
            let bytes = tables::encode_entry(&entry)?;
            fresh.push((entry.clone(), bytes.len()));
            records.push((entry.log_id.index, bytes));
        }
        {
            // Readable when this returns, although not on disk yet.
            let mut memory = lock(&self.shared.memory);
            for (entry, size) in fresh {
                memory.last = Some(entry.log_id);
                memory.recent.push(entry, size);
            }
        }
        let sent = self.jobs.send(Job::Append { records, done }).await;
        sent.map_err(|_| StoreError::Closed.into())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let first = last.next_index();
        self.ask(|done| Job::Truncate(first, done)).await?;
        // Only now: an append that was still in the queue marks its entries durable until here.
        let mut memory = lock(&self.shared.memory);
        memory.recent.truncate(first);
        if memory.last.next_index() > first {
            memory.last = last.max(memory.purged);
        }
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.ask(|done| Job::Purge(upto, done)).await?;
        let mut memory = lock(&self.shared.memory);
        memory.recent.purge(upto.index);
        memory.purged = memory.purged.max(Some(upto));
        memory.last = memory.last.max(Some(upto));
        Ok(())
    }
}
