//! Writing a state file, up to the seal.
//!
//! ```text
//! create: O_EXCL, unsealed header, fsync of the directory
//!   |  memory at its fixed offsets (many threads)
//!   |  with later rounds: freeze_fixed -> segments, appended (many threads)
//!   |  sections, at any time
//! seal:   tables -> fdatasync -> sealed header -> fdatasync -> SealedFile
//!   |
//! drop without seal, or an error anywhere: the file is removed
//! ```
//!
//! The VM's memory stays where it is until the seal has returned, so an error costs nothing but
//! the file: the VM goes on.
//!
//! A file of later rounds ([`StateFileWriter::create_with_rounds`]) is written while the guest
//! runs; what the rounds are, [`crate::segment`] tells.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use xxhash_rust::xxh3::xxh3_64;

use crate::bytes::Encoder;
use crate::chunk::{self, CHUNK_SIZE, ChunkEntry, PAGE_SIZE};
use crate::error::{FormatError, StateFileError, invalid, io_error};
use crate::header::{FORMAT_FIXED, FORMAT_ROUNDS, HEADER_AREA, Header, Identity, SLOT, TableRef};
use crate::io::DirectFile;
use crate::layout::{Layout, MemoryRegion};
use crate::section::{self, Record, SECTIONS_MAX};
use crate::segment::{SegmentBuffer, SegmentRef};

/// The chunks that one request transfers at most: 1 MiB.
pub const GROUP_CHUNKS: u64 = 4;
/// Absent pages in a row that are written (or read) along with their neighbours, because a request
/// more costs more: a request takes about 70 us here, a page 2 us. They stay absent in the table,
/// and their content is never looked at.
pub(crate) const GAP_PAGES_MAX: usize = 16;

/// A complete, durable, restorable file: the receipt of a seal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedFile {
    pub path: PathBuf,
    /// Blake3 of the sealed header slot, which holds the checksums of everything else.
    pub hash: [u8; 32],
    /// What was written, without the holes.
    pub bytes_written: u64,
    /// The length of the file, holes included.
    pub len: u64,
}

/// What writing the memory has cost so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteCounts {
    pub bytes: u64,
    pub requests: u64,
    /// Whether the page cache was bypassed (as far as requests were aligned).
    pub direct: bool,
}

#[derive(Default, Debug)]
struct EntryCell {
    present: AtomicU64,
    checksum: AtomicU64,
}

/// An unsealed state file. Dropping it removes the file.
#[derive(Debug)]
pub struct StateFileWriter {
    file: DirectFile,
    header: Header,
    layout: Layout,
    entries: Vec<EntryCell>,
    records: Vec<Record>,
    segments: Mutex<Vec<SegmentRef>>,
    /// Behind everything that has a place in the file.
    tail: AtomicU64,
    /// The checksum of the chunk table, once it is written and no chunk may change any more.
    fixed: Option<u64>,
    bytes_written: AtomicU64,
    sealed: bool,
}

impl EntryCell {
    fn load(&self) -> ChunkEntry {
        let present = self.present.load(Ordering::Acquire);
        ChunkEntry { present, checksum: self.checksum.load(Ordering::Acquire) }
    }
}

impl StateFileWriter {
    /// Creates `<directory>/<vm>.<epoch>.<generation>.state`, which must not exist, and makes its
    /// name durable. All chunks are absent (zero) until they are written.
    pub fn create(
        directory: &Path,
        identity: Identity,
        regions: &[MemoryRegion],
    ) -> Result<Self, StateFileError> {
        Self::create_as(FORMAT_FIXED, directory, identity, regions)
    }

    /// The same for a file that can take later rounds of memory. Hosts that know only format 1
    /// cannot restore it.
    pub fn create_with_rounds(
        directory: &Path,
        identity: Identity,
        regions: &[MemoryRegion],
    ) -> Result<Self, StateFileError> {
        Self::create_as(FORMAT_ROUNDS, directory, identity, regions)
    }

    fn create_as(
        version: u32,
        directory: &Path,
        identity: Identity,
        regions: &[MemoryRegion],
    ) -> Result<Self, StateFileError> {
        let path = directory.join(identity.file_name());
        let layout = Layout::new(regions).map_err(FormatError::from).map_err(invalid(&path))?;
        let mut create = OpenOptions::new();
        // Guest memory holds secrets: nobody else may read it.
        create.read(true).write(true).create_new(true).mode(0o600);
        let file = create.open(&path).map_err(io_error("creation", &path))?;
        let mut entries = Vec::new();
        entries.resize_with(layout.chunk_count() as usize, EntryCell::default);
        // From here on the drop of the writer removes the file.
        let writer = Self {
            header: Header::unsealed(version, identity, regions, &layout),
            tail: AtomicU64::new(layout.data_end()),
            segments: Mutex::default(),
            fixed: None,
            file: DirectFile::new(&path, file, true),
            layout,
            entries,
            records: Vec::new(),
            bytes_written: AtomicU64::new(0),
            sealed: false,
        };
        writer.put("writing the header", &writer.header.encode(), 0)?;
        let buffered = writer.file.buffered();
        buffered.set_len(writer.layout.data_end()).map_err(io_error("extension", &path))?;
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io_error("fsync of the directory", &path))?;
        Ok(writer)
    }

    /// Where the file is. It does not count before it is sealed.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// A handle with which several threads write memory.
    pub fn memory(&self) -> MemoryWriter<'_> {
        MemoryWriter { writer: self }
    }

    /// Sends everything through the page cache from now on.
    pub fn refuse_direct(&self) {
        self.file.refuse_direct();
    }

    pub fn counts(&self) -> WriteCounts {
        WriteCounts {
            bytes: self.bytes_written.load(Ordering::Relaxed),
            requests: self.file.requests(),
            direct: self.file.is_direct(),
        }
    }

    /// Adds the state of a device. The kind is unique, like `virtio-blk.0`.
    pub fn add_section(
        &mut self,
        kind: &str,
        version: u32,
        bytes: &[u8],
    ) -> Result<(), StateFileError> {
        let at = *self.tail.get_mut();
        let record = Record::of(kind, version, bytes, at).map_err(invalid(self.file.path()))?;
        if self.records.len() >= SECTIONS_MAX || self.records.iter().any(|r| r.name == kind) {
            let why = "it is there already, or there are too many";
            let problem = FormatError::BadSection { kind: kind.to_owned(), why };
            return Err(invalid(self.file.path())(problem));
        }
        self.put("writing a section", bytes, at)?;
        *self.tail.get_mut() += record.length;
        self.records.push(record);
        Ok(())
    }

    pub fn identity(&self) -> Identity {
        self.header.identity
    }

    /// What the chunk table will say of a chunk.
    pub fn chunk_entry(&self, chunk: u64) -> Option<ChunkEntry> {
        Some(self.entries.get(usize::try_from(chunk).ok()?)?.load())
    }

    /// Ends the writing of chunks: writes their table, so that the seal need not. Later versions of
    /// pages go into segments.
    pub fn freeze_fixed(&mut self) -> Result<(), StateFileError> {
        let table = chunk::encode_table(self.entries.iter().map(EntryCell::load));
        self.put("writing the chunk table", &table, HEADER_AREA)?;
        self.fixed = Some(xxh3_64(&table));
        Ok(())
    }

    /// Makes durable what was written so far, so that the seal has less to wait for.
    pub fn flush(&self) -> Result<(), StateFileError> {
        self.sync("fdatasync of the memory")
    }

    /// Makes what was written so far readable from other hosts: past the page cache it is already.
    pub fn publish(&self) -> Result<(), StateFileError> {
        if self.file.is_direct() { Ok(()) } else { self.flush() }
    }

    /// Makes the file complete and durable. After an error the file is gone and the VM's state is
    /// still only in memory.
    pub fn seal(mut self) -> Result<SealedFile, StateFileError> {
        if self.fixed.is_none() {
            self.freeze_fixed()?;
        }
        self.header.chunk_table.checksum = self.fixed.unwrap_or_default();
        let rounds = self.write_segment_table()?;
        let sections = section::encode_table(&self.header, rounds.as_ref(), &self.records);
        let at = self.reserve(sections.len() as u64, 1);
        self.put("writing the section table", &sections, at)?;
        self.header.section_table =
            TableRef { offset: at, length: sections.len() as u64, checksum: xxh3_64(&sections) };
        self.header.file_length = at + sections.len() as u64;
        self.sync("fdatasync of the data")?;
        self.header.serial += 1;
        self.header.sealed = true;
        let slot = self.header.encode();
        self.put("writing the sealed header", &slot, SLOT as u64)?;
        self.sync("fdatasync of the sealed header")?;
        self.sealed = true;
        Ok(SealedFile {
            path: self.file.path().to_owned(),
            hash: blake3::hash(&slot).into(),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
            len: self.header.file_length,
        })
    }

    /// The record of the segment table, in a file that has one.
    fn write_segment_table(&self) -> Result<Option<Record>, StateFileError> {
        if self.header.version < FORMAT_ROUNDS {
            return Ok(None);
        }
        let mut segments = self.segments().clone();
        // Of two versions of a page the one in the later round counts.
        segments.sort_by_key(|segment| (segment.round, segment.offset));
        let mut e = Encoder::default();
        segments.iter().for_each(|segment| segment.encode(&mut e));
        let table = e.into_bytes();
        let offset = self.reserve(table.len() as u64, 1);
        self.put("writing the segment table", &table, offset)?;
        let (length, checksum) = (table.len() as u64, xxh3_64(&table));
        Ok(Some(Record { name: String::new(), version: 1, offset, length, checksum }))
    }

    /// A place behind everything else.
    fn reserve(&self, length: u64, alignment: u64) -> u64 {
        let place = |tail: u64| tail.next_multiple_of(alignment);
        let take = |tail| Some(place(tail) + length);
        // The closure never refuses.
        let (Ok(tail) | Err(tail)) =
            self.tail.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        place(tail)
    }

    fn segments(&self) -> MutexGuard<'_, Vec<SegmentRef>> {
        self.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, operation: &'static str, bytes: &[u8], at: u64) -> Result<(), StateFileError> {
        self.file.write_all_at(operation, bytes, at)?;
        self.bytes_written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn sync(&self, operation: &'static str) -> Result<(), StateFileError> {
        self.file.buffered().sync_data().map_err(io_error(operation, self.file.path()))
    }
}

impl Drop for StateFileWriter {
    fn drop(&mut self) {
        if !self.sealed {
            // What cannot be removed is unsealed all the same: no reader accepts it.
            let _removed = std::fs::remove_file(self.file.path());
        }
    }
}

/// Writes memory into a state file, from any number of threads.
#[derive(Clone, Copy, Debug)]
pub struct MemoryWriter<'a> {
    writer: &'a StateFileWriter,
}

impl MemoryWriter<'_> {
    /// Writes the memory of up to [`GROUP_CHUNKS`] chunks in a row of one region: finds the zero
    /// pages, leaves them out, sums the others. Returns the number of pages that are in the file.
    ///
    /// `memory` is what the guest has there and must not change meanwhile; it ends with a chunk or
    /// with the region. Page-aligned memory is written with O_DIRECT.
    pub fn write_group(&self, first_chunk: u64, memory: &[u8]) -> Result<u64, StateFileError> {
        assert!(self.writer.fixed.is_none(), "after freeze_fixed pages go into segments");
        let place = self.check_group(first_chunk, memory.len() as u64)?;
        let mut presents = [0; GROUP_CHUNKS as usize];
        let mut pages = 0;
        for (index, bytes) in memory.chunks(CHUNK_SIZE as usize).enumerate() {
            let chunk = first_chunk + index as u64;
            let entry = ChunkEntry::of(chunk, bytes);
            presents[index] = entry.present;
            pages += entry.page_count();
            let cell = &self.writer.entries[chunk as usize];
            cell.present.store(entry.present, Ordering::Release);
            cell.checksum.store(entry.checksum, Ordering::Release);
        }
        for (first, count) in chunk::extents(&presents, GAP_PAGES_MAX) {
            let start = first * PAGE_SIZE as usize;
            let bytes = &memory[start..start + count * PAGE_SIZE as usize];
            self.writer.put("writing memory", bytes, place + start as u64)?;
        }
        Ok(pages)
    }

    /// Appends a segment of this round, 1 or higher. Segments of one round must not share pages.
    pub fn append(
        &self,
        round: u32,
        buffer: &mut SegmentBuffer,
    ) -> Result<SegmentRef, StateFileError> {
        let header = &self.writer.header;
        assert!(header.version >= FORMAT_ROUNDS && round > 0, "the file takes no later rounds");
        let offset = self.writer.reserve(buffer.length(), PAGE_SIZE);
        let (bytes, segment) = buffer.finish(&header.identity, round, offset);
        self.writer.put("writing memory", bytes, offset)?;
        self.writer.segments().push(segment);
        Ok(segment)
    }

    /// The file offset of a group that is whole, in one region, and not too long.
    fn check_group(&self, first: u64, length: u64) -> Result<u64, StateFileError> {
        let layout = &self.writer.layout;
        let last = first.saturating_add(length.div_ceil(CHUNK_SIZE)).saturating_sub(1);
        let bad = || {
            let problem = FormatError::NoSuchChunk { chunk: last, count: layout.chunk_count() };
            invalid(self.writer.path())(problem)
        };
        let start = layout.place(first).ok_or_else(bad)?;
        let end = layout.place(last).ok_or_else(bad)?;
        let whole = end.region == start.region
            && end.file_offset + end.length == start.file_offset + length
            && length <= GROUP_CHUNKS * CHUNK_SIZE;
        if whole { Ok(start.file_offset) } else { Err(bad()) }
    }
}
