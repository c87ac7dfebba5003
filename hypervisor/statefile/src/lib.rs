//! The state file of a VM: everything that a stopped VM is, in one file on shared storage.
//!
//! A save writes it, a quick migration passes it from host to host, a restore reads it. The file
//! describes itself, and every byte that matters is under a checksum, so that a torn, truncated,
//! foreign or damaged file is a clear error and never a guess.
//!
//! ```text
//! offset
//! 0         header slot A   written unsealed when the file is created
//! 4096      header slot B   written when the file is sealed; its blake3 is the file's hash
//! 8192      chunk table     16 bytes for each 256 KiB of memory: which pages are there, checksum
//! (64 KiB)  memory          region after region at fixed offsets; zero pages are left out (holes)
//!           segments        format 2: pages that were written again while the guest ran
//!           sections        the payload of each device section; the segment table
//!           section table   (kind, version, offset, length, checksum, name) of each section
//! ```
//!
//! The sealed header holds the lengths and checksums of both tables, and the tables hold the
//! checksums of all the rest; so whoever knows the hash of the header knows the whole file. The
//! replicated state keeps that hash.
//!
//! | who | owns | after a crash |
//! |---|---|---|
//! | [`StateFileWriter`] | the unsealed file | the file is unsealed, no reader accepts it; delete it |
//! | [`SealedFile`] | nothing, it is a receipt | the file is complete, the hash proves it |
//! | [`StateFile`] | a read-only view | nothing changed |
//! | [`TailFile`] | a read-only view of an unsealed file | nothing changed |
//!
//! The format is specified in [`header`], [`chunk`], [`segment`] and [`section`]; all numbers in it are little
//! endian. The magic, format version, architecture, serial and header checksum keep their places
//! in every future version, so that an old reader can say "newer" instead of "damaged".
#![forbid(unsafe_code)]

mod bytes;
pub mod chunk;
mod error;
pub mod header;
mod io;
mod layout;
mod reader;
mod rounds;
pub mod section;
pub mod segment;
mod tail;
mod writer;

pub use chunk::{CHUNK_PAGES, CHUNK_SIZE, ChunkEntry, PAGE_SIZE};
pub use error::{FormatError, StateFileError};
pub use header::{FORMAT_FIXED, FORMAT_ROUNDS, FORMAT_VERSION, Header, Identity};
pub use io::AlignedBuf;
pub use layout::{ChunkPlace, Layout, LayoutError, MemoryRegion, REGIONS_MAX};
pub use reader::{ChunkFailure, Expect, Inspection, StateFile};
pub use rounds::{STRETCH_MAX, Segment, Stretch};
pub use section::{Section, Sections};
pub use segment::{PageVersion, SEGMENT_PAGES_MAX, SegmentBuffer, SegmentRef};
pub use tail::TailFile;
pub use writer::{GROUP_CHUNKS, MemoryWriter, SealedFile, StateFileWriter, WriteCounts};
