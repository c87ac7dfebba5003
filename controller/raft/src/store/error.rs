//! What can go wrong on disk.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::codec::CodecError;

/// Why the database of one controller cannot be used, or a part of it not read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("{operation} {path}: {source}", path = path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("open raft database {path}: another process has it open", path = path.display())]
    InUse { path: PathBuf },
    #[error("open raft database {path}: {source}", path = path.display())]
    Open { path: PathBuf, source: Box<redb::Error> },
    #[error(
        "open raft database {path}: the disk has damaged it ({found}); do not start this \
         controller on an older copy: what it promised since would be broken",
        path = path.display()
    )]
    Damaged { path: PathBuf, found: String },
    #[error(
        "open raft database: its format is version {found}, and this program reads version \
         {supported} at most; start the newer program"
    )]
    NewerFormat { found: u32, supported: u32 },
    /// Whoever forgets his vote could give it twice in one term.
    #[error(
        "open raft database {path}: it is gone or empty, but this controller may have taken part \
         in its cluster before (a whole database, or {marker}, was here). Put the data directory back as it was last. If it \
         is lost, never start this identity again: move {dir} away and join a controller under \
         another name with a new token (`bell cluster join-token --role controller`)",
        path = path.display(), marker = marker.display(), dir = dir.display()
    )]
    Lost { path: PathBuf, marker: PathBuf, dir: PathBuf },
    #[error("open raft database: it belongs to controller {found}, not to controller {expected}")]
    WrongNode { found: u64, expected: u64 },
    #[error("read {subject} from the raft database: {source}")]
    Corrupt { subject: String, source: CodecError },
    #[error("read the raft log: entry {expected} is missing, entry {found} follows")]
    Hole { expected: u64, found: u64 },
    #[error("encode {subject} for the raft database: {source}")]
    Encode { subject: String, source: CodecError },
    #[error("{operation}: {source}")]
    Database { operation: &'static str, source: Box<redb::Error> },
    /// A commit failed earlier. What is on disk is unknown, so nothing is ever written again.
    #[error("the raft database has failed: {0}")]
    Failed(String),
    #[error("the raft database is closed")]
    Closed,
}

impl StoreError {
    pub(crate) fn database(operation: &'static str, source: impl Into<redb::Error>) -> Self {
        Self::Database { operation, source: Box::new(source.into()) }
    }
}

impl From<StoreError> for io::Error {
    fn from(error: StoreError) -> Self {
        let kind = match &error {
            StoreError::Corrupt { .. } | StoreError::Hole { .. } => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}
