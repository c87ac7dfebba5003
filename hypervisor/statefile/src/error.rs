//! What can go wrong with a state file, each mistake by its own name.

use std::io;
use std::path::{Path, PathBuf};

use crate::header::FORMAT_VERSION;
use crate::layout::LayoutError;

/// A state file could not be written, opened or read.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// The storage refused: no space, no permission, an I/O error.
    #[error("{operation} of state file {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    /// The file can be read, but it is not what was expected.
    #[error("state file {}: {problem}", path.display())]
    Invalid { path: PathBuf, problem: FormatError },
}

impl StateFileError {
    /// The format problem, if it is one.
    pub fn problem(&self) -> Option<&FormatError> {
        match self {
            Self::Invalid { problem, .. } => Some(problem),
            Self::Io { .. } => None,
        }
    }
}

/// Gives an I/O error its operation and its file.
pub(crate) fn io_error(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> StateFileError {
    move |source| StateFileError::Io { operation, path: path.to_owned(), source }
}

/// Gives a format problem its file.
pub(crate) fn invalid(path: &Path) -> impl FnOnce(FormatError) -> StateFileError {
    move |problem| StateFileError::Invalid { path: path.to_owned(), problem }
}

/// Why a file is not the state file that was asked for, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    #[error("is not a state file of Bellwether (no magic number); check the path")]
    NotAStateFile,
    #[error(
        "both headers are damaged (bad checksum); the file cannot be restored, use another one \
         or start the VM from its disks"
    )]
    HeaderDamaged,
    #[error(
        "was written by a newer Bellwether, format {found}, this one reads up to {FORMAT_VERSION}; \
         restore it on an upgraded node"
    )]
    NewerFormat { found: u32 },
    #[error("was written on architecture {found}, this host is {ours}; restore it on a like host")]
    OtherArchitecture { found: u32, ours: u32 },
    #[error(
        "has a page size of {pages} and chunks of {chunks} bytes, which this build cannot read"
    )]
    OtherSizes { pages: u32, chunks: u32 },
    #[error("has a header that contradicts itself ({what}); the file cannot be restored")]
    Inconsistent { what: &'static str },
    #[error("describes memory that cannot be: {0}")]
    Memory(#[from] LayoutError),
    #[error(
        "belongs to VM {found}, not to VM {expected}; somebody mixed up the files, nothing was \
         restored"
    )]
    OtherVm { found: String, expected: String },
    #[error(
        "is of epoch {found_epoch} generation {found_generation}, wanted {wanted}; it is an older \
         or newer save of the same VM, restoring it would bring back the wrong past"
    )]
    OtherGeneration { found_epoch: u64, found_generation: u64, wanted: String },
    #[error(
        "is not sealed: its writer died or is still at work; the VM's state is not in it, delete it"
    )]
    NotSealed,
    #[error("is {found} bytes long instead of {expected}: truncated or grown; use another copy")]
    WrongLength { found: u64, expected: u64 },
    #[error("has the hash {found}, expected {expected}: it is another file than the one sealed")]
    OtherHash { found: String, expected: String },
    #[error("has a damaged {table} table (bad checksum); the file cannot be restored")]
    TableDamaged { table: &'static str },
    #[error("section {kind:?} is damaged (bad checksum); the file cannot be restored")]
    SectionDamaged { kind: String },
    #[error("has a section of the unknown kind {kind} ({name:?}); restore it on an upgraded node")]
    UnknownSection { kind: u32, name: String },
    #[error("has the section {kind:?} twice; the file cannot be restored")]
    DuplicateSection { kind: String },
    #[error("cannot hold section {kind:?}: {why}")]
    BadSection { kind: String, why: &'static str },
    #[error("lacks the section {kind:?}; the VM was saved with other devices than it has now")]
    SectionMissing { kind: String },
    #[error("has sections that no device took: {kinds}; the VM has other devices than when saved")]
    SectionsLeft { kinds: String },
    #[error("memory chunk {chunk} is damaged (bad checksum); the VM must not go on, start it anew")]
    ChunkDamaged { chunk: u64 },
    #[error("segment at offset {offset} is damaged ({what}); the VM must not go on, start it anew")]
    SegmentDamaged { offset: u64, what: &'static str },
    #[error(
        "segment at offset {offset} is of another save ({found}, wanted {expected}); the file \
         cannot be restored"
    )]
    ForeignSegment { offset: u64, found: String, expected: String },
    #[error(
        "segment at offset {offset} has version {found}, this one reads version 1; restore it on \
         an upgraded node"
    )]
    NewerSegment { offset: u64, found: u32 },
    #[error("page {page} is damaged (bad checksum); the VM must not go on, start it anew")]
    PageDamaged { page: u64 },
    #[error("has no memory chunk {chunk}, its memory has {count} chunks")]
    NoSuchChunk { chunk: u64, count: u64 },
}
