//! The tables of the database, and how they are read.

use std::ops::Range;

use redb::{ReadTransaction, Table, TableDefinition, TableError, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::error::StoreError;
use crate::codec;
use crate::types::{Entry, LogId, SnapshotMeta, Vote};

/// Raised whenever an older program could misread what a newer one writes.
pub(crate) const FORMAT: u32 = 1;

/// Log index -> record of the entry.
pub(crate) const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
/// Name -> record; `format` alone is a bare `u32 LE`, so that every program can read it.
pub(crate) const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// (generation, number) -> one piece of a snapshot image.
pub(crate) const SNAPSHOT: TableDefinition<(u64, u32), &[u8]> = TableDefinition::new("snapshot");

pub(crate) const KEY_FORMAT: &str = "format";
pub(crate) const KEY_NODE: &str = "node_id";
pub(crate) const KEY_VOTE: &str = "vote";
pub(crate) const KEY_COMMITTED: &str = "committed";
pub(crate) const KEY_PURGED: &str = "purged";
pub(crate) const KEY_SNAPSHOT: &str = "snapshot";

/// Which pieces make the current snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    pub generation: u64,
    pub pieces: u32,
    pub length: u64,
    pub meta: SnapshotMeta,
}

/// What the database says when it is opened.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub vote: Option<Vote>,
    pub committed: Option<LogId>,
    pub purged: Option<LogId>,
    pub snapshot: Option<SnapshotRecord>,
    pub entries: Vec<(Entry, usize)>,
}

/// Opens a table to read; a table that nobody has written yet does not exist.
fn open_read<K: redb::Key + 'static, V: redb::Value + 'static>(
    tx: &ReadTransaction,
    table: TableDefinition<K, V>,
) -> Result<Option<redb::ReadOnlyTable<K, V>>, StoreError> {
    match tx.open_table(table) {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(StoreError::database("open a table of the raft database", error)),
    }
}

/// The format of the database, if it has one already.
pub(crate) fn read_format(tx: &ReadTransaction) -> Result<Option<u32>, StoreError> {
    let Some(meta) = open_read(tx, META)? else { return Ok(None) };
    let read = |e| StoreError::database("read the format of the raft database", e);
    let Some(value) = meta.get(KEY_FORMAT).map_err(read)? else { return Ok(None) };
    let bytes = value.value();
    let number = <[u8; 4]>::try_from(bytes).map_err(|_| StoreError::Corrupt {
        subject: KEY_FORMAT.into(),
        source: codec::CodecError::Short { found: bytes.len(), needed: 4 },
    })?;
    Ok(Some(u32::from_le_bytes(number)))
}

/// Reads one record of the `meta` table.
pub(crate) fn read_meta<T: DeserializeOwned>(
    tx: &ReadTransaction,
    key: &str,
) -> Result<Option<T>, StoreError> {
    let Some(meta) = open_read(tx, META)? else { return Ok(None) };
    let read = |e| StoreError::database("read metadata from the raft database", e);
    let Some(value) = meta.get(key).map_err(read)? else { return Ok(None) };
    codec::decode_record(seed(key), value.value())
        .map(Some)
        .map_err(|source| StoreError::Corrupt { subject: key.into(), source })
}

/// Encodes one record of the `meta` table.
pub(crate) fn encode_meta<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>, StoreError> {
    codec::encode_record(seed(key), value)
        .map_err(|source| StoreError::Encode { subject: key.into(), source })
}

/// Encodes one entry of the log.
pub(crate) fn encode_entry(entry: &Entry) -> Result<Vec<u8>, StoreError> {
    let index = entry.log_id.index;
    codec::encode_record(index, entry)
        .map_err(|source| StoreError::Encode { subject: format!("log entry {index}"), source })
}

/// Reads entries of the log with the sizes of their records, at most `max_bytes` of them but one
/// at least. The answer has no hole.
pub(crate) fn read_entries(
    tx: &ReadTransaction,
    range: Range<u64>,
    max_bytes: usize,
) -> Result<Vec<(Entry, usize)>, StoreError> {
    let read = |e| StoreError::database("read the raft log", e);
    let Some(log) = open_read(tx, LOG)? else { return Ok(Vec::new()) };
    let (mut entries, mut total) = (Vec::new(), 0);
    let mut expected = None;
    for row in log.range(range).map_err(read)? {
        let (key, value) = row.map_err(read)?;
        let (index, bytes) = (key.value(), value.value());
        if expected.is_some_and(|expected| expected != index) {
            return Err(StoreError::Hole { expected: expected.unwrap_or(0), found: index });
        }
        total += bytes.len();
        if total > max_bytes && !entries.is_empty() {
            break;
        }
        entries.push((decode_entry(index, bytes)?, bytes.len()));
        expected = Some(index + 1);
    }
    Ok(entries)
}

fn decode_entry(index: u64, bytes: &[u8]) -> Result<Entry, StoreError> {
    let corrupt = |source| StoreError::Corrupt { subject: format!("log entry {index}"), source };
    let entry: Entry = codec::decode_record(index, bytes).map_err(corrupt)?;
    if entry.log_id.index == index { Ok(entry) } else { Err(corrupt(codec::CodecError::Checksum)) }
}

/// Reads everything that is kept in memory. Every log record is checked now: a controller that
/// cannot read its log must not take part in an election first.
pub(crate) fn load(tx: &ReadTransaction) -> Result<Loaded, StoreError> {
    let purged: Option<LogId> = read_meta(tx, KEY_PURGED)?;
    let entries = read_entries(tx, 0..u64::MAX, usize::MAX)?;
    let expected = purged.as_ref().map_or(0, |id| id.index + 1);
    match entries.first() {
        Some((first, _)) if first.log_id.index != expected => {
            return Err(StoreError::Hole { expected, found: first.log_id.index });
        }
        _ => {}
    }
    Ok(Loaded {
        vote: read_meta(tx, KEY_VOTE)?,
        committed: read_meta(tx, KEY_COMMITTED)?,
        purged,
        snapshot: read_meta(tx, KEY_SNAPSHOT)?,
        entries,
    })
}

/// Reads the image of the current snapshot and checks it.
pub(crate) fn read_snapshot(
    tx: &ReadTransaction,
) -> Result<Option<(SnapshotRecord, Vec<u8>)>, StoreError> {
    let Some(record) = read_meta::<SnapshotRecord>(tx, KEY_SNAPSHOT)? else { return Ok(None) };
    let read = |e| StoreError::database("read the raft snapshot", e);
    let mut image = Vec::new();
    if let Some(table) = open_read(tx, SNAPSHOT)? {
        let first = (record.generation, 0);
        for row in table.range(first..(record.generation, record.pieces)).map_err(read)? {
            image.extend_from_slice(row.map_err(read)?.1.value());
        }
    }
    let corrupt = |source| StoreError::Corrupt { subject: "the snapshot".into(), source };
    let found = image.len() as u64;
    if found != record.length {
        let said = record.length;
        return Err(corrupt(codec::CodecError::Length { said, found }));
    }
    codec::verify_snapshot(&image).map_err(corrupt)?;
    Ok(Some((record, image)))
}

/// The tables of one write transaction.
pub(crate) struct Tables<'tx> {
    pub log: Table<'tx, u64, &'static [u8]>,
    pub meta: Table<'tx, &'static str, &'static [u8]>,
    pub snapshot: Table<'tx, (u64, u32), &'static [u8]>,
}

impl<'tx> Tables<'tx> {
    pub fn open(tx: &'tx WriteTransaction) -> Result<Self, StoreError> {
        let open = |e| StoreError::database("open a table of the raft database", e);
        Ok(Self {
            log: tx.open_table(LOG).map_err(open)?,
            meta: tx.open_table(META).map_err(open)?,
            snapshot: tx.open_table(SNAPSHOT).map_err(open)?,
        })
    }
}

fn seed(key: &str) -> u64 {
    xxh3_64(key.as_bytes())
}
