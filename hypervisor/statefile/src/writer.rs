//! Writing a state file, up to the seal.
//!
//! ```text
//! create: O_EXCL, unsealed header, fsync of the directory
//!   |  memory (many threads) and sections, in any order
//! seal:   tables -> fdatasync -> sealed header -> fdatasync -> SealedFile
//!   |
//! drop without seal, or an error anywhere: the file is removed
//! ```
//!
//! The VM's memory stays where it is until the seal has returned, so an error costs nothing but
//! the file: the VM goes on.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::xxh3_64;

use crate::chunk::{self, CHUNK_SIZE, ChunkEntry, PAGE_SIZE};
use crate::error::{FormatError, StateFileError, invalid, io_error};
use crate::header::{HEADER_AREA, Header, Identity, SLOT, TableRef};
use crate::io::DirectFile;
use crate::layout::{Layout, MemoryRegion};
use crate::section::{self, Record, SECTIONS_MAX};

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
    tail: u64,
    bytes_written: AtomicU64,
    sealed: bool,
}

impl StateFileWriter {
    /// Creates `<directory>/<vm>.<epoch>.<generation>.state`, which must not exist, and makes its
    /// name durable. All chunks are absent (zero) until they are written.
    pub fn create(
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
            header: Header::unsealed(identity, regions, &layout),
            tail: layout.data_end(),
            file: DirectFile::new(&path, file, true),
            layout,
            entries,
            records: Vec::new(),
            bytes_written: AtomicU64::new(0),
            sealed: false,
        };
        writer.put("writing the header", &writer.header.encode(), 0)?;
        let buffered = writer.file.buffered();
        buffered.set_len(writer.tail).map_err(io_error("extension", &path))?;
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
        let record =
            Record::of(kind, version, bytes, self.tail).map_err(invalid(self.file.path()))?;
        if self.records.len() >= SECTIONS_MAX || self.records.iter().any(|r| r.name == kind) {
            let why = "it is there already, or there are too many";
            let problem = FormatError::BadSection { kind: kind.to_owned(), why };
            return Err(invalid(self.file.path())(problem));
        }
        self.put("writing a section", bytes, self.tail)?;
        self.tail += record.length;
        self.records.push(record);
        Ok(())
    }

    /// Makes the file complete and durable. After an error the file is gone and the VM's state is
    /// still only in memory.
    pub fn seal(mut self) -> Result<SealedFile, StateFileError> {
        let chunks = self.entries.iter().map(|cell| ChunkEntry {
            present: cell.present.load(Ordering::Acquire),
            checksum: cell.checksum.load(Ordering::Acquire),
        });
        let chunk_table = chunk::encode_table(chunks);
        self.put("writing the chunk table", &chunk_table, HEADER_AREA)?;
        self.header.chunk_table.checksum = xxh3_64(&chunk_table);
        let sections = section::encode_table(&self.header, &self.records);
        self.put("writing the section table", &sections, self.tail)?;
        self.header.section_table = TableRef {
            offset: self.tail,
            length: sections.len() as u64,
            checksum: xxh3_64(&sections),
        };
        self.header.file_length = self.tail + sections.len() as u64;
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
