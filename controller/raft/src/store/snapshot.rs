//! The last snapshot, kept as pieces so that votes and appends never wait behind a large write.

use super::error::StoreError;
use super::tables::{self, SnapshotRecord};
use super::writer::Job;
use super::{Store, lock};
use crate::types::{Snapshot, SnapshotMeta};

/// The size of a row, and how many rows go into one transaction.
const PIECE_BYTES: usize = 1 << 20;
const PIECES_PER_JOB: usize = 4;

impl Store {
    /// Makes an image the current snapshot. When this returns it is on disk; until then, whatever
    /// happens, the previous one is the current one. An older image than the current is dropped.
    pub(crate) async fn write_snapshot(
        &self,
        meta: &SnapshotMeta,
        image: &[u8],
    ) -> Result<(), StoreError> {
        let mut turn = self.shared.snapshot_turn.lock().await;
        let current = lock(&self.shared.memory).snapshot.as_ref().map(|r| r.meta.last_log_id);
        if current.is_some_and(|last| last >= meta.last_log_id) {
            return Ok(());
        }
        let generation = *turn + 1;
        *turn = generation;
        let mut pieces = 0;
        for group in image.chunks(PIECE_BYTES * PIECES_PER_JOB) {
            let group: Vec<_> = group.chunks(PIECE_BYTES).map(<[u8]>::to_vec).collect();
            let (first, count) = (pieces, group.len());
            self.ask(|done| Job::SnapshotPieces { generation, first, pieces: group, done }).await?;
            pieces += u32::try_from(count).unwrap_or(u32::MAX);
        }
        let length = image.len() as u64;
        let record = SnapshotRecord { generation, pieces, length, meta: meta.clone() };
        self.ask(|done| Job::SnapshotCommit(record.clone(), done)).await?;
        lock(&self.shared.memory).snapshot = Some(record);
        Ok(())
    }

    /// The current snapshot, checked.
    pub(crate) async fn read_snapshot(&self) -> Result<Option<Snapshot>, StoreError> {
        let found = self.read(tables::read_snapshot).await?;
        Ok(found.map(|(record, image)| Snapshot { meta: record.meta, snapshot: image }))
    }
}
