//! Opening a state file and reading it, with every byte checked before it is given out.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use bellwether_types::{Epoch, VmId};
use rustix::fs::OFlags;
use xxhash_rust::xxh3::xxh3_64;

use crate::chunk::{self, CHUNK_PAGES, CHUNK_SIZE, ChunkEntry, PAGE_SIZE};
use crate::error::{FormatError, StateFileError, invalid, io_error};
use crate::header::{HEADER_AREA, Header, Identity, SLOT, TableRef};
use crate::io::{AlignedBuf, DirectFile};
use crate::layout::Layout;
use crate::rounds::{self, Rounds, Segment, Stretch};
use crate::section::{self, Record, Section, Sections};
use crate::segment::{self, PageVersion, SegmentRef};
use crate::writer::{GAP_PAGES_MAX, GROUP_CHUNKS};

/// Which file is wanted. All of it comes from replicated state, or from [`StateFile::inspect`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Expect {
    pub vm_id: VmId,
    /// The epoch of the runner that sealed it.
    pub epoch: Epoch,
    /// The generation, where it is known; the hash settles it in any case.
    pub generation: Option<u64>,
    /// Blake3 of the sealed header.
    pub hash: [u8; 32],
}

/// What a header alone tells of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inspection {
    pub header: Header,
    /// Blake3 of the header slot that counts.
    pub hash: [u8; 32],
}

/// A chunk that could not be given out.
#[derive(Debug, thiserror::Error)]
#[error("chunk {chunk}: {error}")]
pub struct ChunkFailure {
    pub chunk: u64,
    #[source]
    pub error: StateFileError,
}

impl ChunkFailure {
    /// Whether the storage, and not the file, is at fault: then it may be read later.
    pub fn may_pass(&self) -> bool {
        self.error.problem().is_none()
    }
}

/// A sealed state file, open for reading, with its header, tables and sections checked.
#[derive(Debug)]
pub struct StateFile {
    file: DirectFile,
    header: Header,
    layout: Layout,
    chunks: Vec<ChunkEntry>,
    segments: Vec<SegmentRef>,
    rounds: Rounds,
    sections: Vec<Section>,
}

impl StateFile {
    /// Reads only the header: for people and tools, and to learn what to expect of a file that one
    /// trusts for another reason.
    pub fn inspect(path: &Path) -> Result<Inspection, StateFileError> {
        read_header(&open(path)?).map(|(inspection, _)| inspection)
    }

    /// Opens a file and checks everything but the memory, whose chunks are checked as they are read.
    pub fn open(path: &Path, expect: &Expect) -> Result<Self, StateFileError> {
        Self::open_knowing(path, expect, HashMap::new())
    }

    /// The same when some segments, by their offset, were read before the file was sealed. They
    /// count if the sealed table names the same; the others are read.
    pub fn open_knowing(
        path: &Path,
        expect: &Expect,
        known: HashMap<u64, Segment>,
    ) -> Result<Self, StateFileError> {
        let file = open(path)?;
        let (Inspection { header, hash }, length) = read_header(&file)?;
        check_identity(&header, length, &hash, expect).map_err(invalid(path))?;
        let layout =
            Layout::new(&header.regions).map_err(FormatError::from).map_err(invalid(path))?;
        let bytes = read_table(&file, &header.chunk_table, "chunk")?;
        let chunks = chunk::decode_table(&bytes);
        check_chunks(&layout, &chunks).map_err(invalid(path))?;
        let table = read_section_table(&file, &header)?;
        let segments = match &table.rounds {
            Some(record) => read_segment_table(&file, &header, record)?,
            None => vec![],
        };
        let heads = rounds::read_heads(&file, &header.identity, &layout, &segments, known)?;
        let rounds = Rounds::new(&layout, heads).map_err(invalid(path))?;
        let sections = read_sections(&file, table.devices)?;
        Ok(Self { file, header, layout, chunks, segments, rounds, sections })
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The device sections. They are there once; a second call finds none.
    pub fn take_sections(&mut self) -> Sections {
        Sections::new(self.file.path(), std::mem::take(&mut self.sections))
    }

    /// Reads through the page cache from now on.
    pub fn refuse_direct(&self) {
        self.file.refuse_direct();
    }

    /// What the chunk table says of a chunk, without later rounds; `None` for an index that does not
    /// exist.
    pub fn chunk(&self, chunk: u64) -> Option<ChunkEntry> {
        self.chunks.get(usize::try_from(chunk).ok()?).copied()
    }

    /// Which pages of a chunk are not zero, by their newest versions; `None` for an index that does
    /// not exist.
    pub fn present(&self, chunk: u64) -> Option<u64> {
        let fixed = self.chunk(chunk)?.present;
        if self.rounds.is_empty() {
            return Some(fixed);
        }
        let newest = self.rounds.among(self.layout.pages(chunk)?);
        Some(newest.fold(fixed, |present, (page, version)| {
            present & !(1 << page) | u64::from(version.offset.is_some()) << page
        }))
    }

    /// The segments of later rounds, as the sealed table names them.
    pub fn segments(&self) -> &[SegmentRef] {
        &self.segments
    }

    /// The newest version of a page, if it is in a later round.
    pub fn newest(&self, page: u64) -> Option<&PageVersion> {
        self.rounds.newest(page)
    }

    /// Reads up to [`GROUP_CHUNKS`] chunks in a row of one region to the start of `buffer`, their
    /// pages in their newest versions, and checks them. Only the pages that [`Self::present`] names
    /// hold data afterwards; the rest of the buffer is undefined.
    pub fn read_group(
        &self,
        first: u64,
        count: u64,
        buffer: &mut AlignedBuf,
    ) -> Result<(), ChunkFailure> {
        let start = check_group(&self.layout, self.path(), first, count as usize, buffer)?;
        let mut presents = [0; GROUP_CHUNKS as usize];
        for (chunk, present) in (first..first + count).zip(&mut presents) {
            *present =
                if self.is_rewritten(chunk) { 0 } else { self.chunks[chunk as usize].present };
        }
        let presents = &presents[..count as usize];
        let buffer = buffer.as_mut_slice();
        read_fixed(&self.file, start, first, presents, buffer)?;
        for ((chunk, present), bytes) in
            (first..).zip(presents).zip(buffer.chunks_mut(CHUNK_SIZE as usize))
        {
            let entry = self.chunks[chunk as usize];
            if *present != 0 && chunk::checksum(chunk, entry.present, bytes) != entry.checksum {
                let problem = FormatError::ChunkDamaged { chunk };
                return Err(ChunkFailure { chunk, error: invalid(self.path())(problem) });
            }
            self.overlay(chunk, bytes)?;
        }
        Ok(())
    }

    /// Whether later rounds have all pages that the chunk table has, so that those need no reading.
    fn is_rewritten(&self, chunk: u64) -> bool {
        let Some(pages) = self.layout.pages(chunk).filter(|_| !self.rounds.is_empty()) else {
            return false;
        };
        let newest = self.rounds.among(pages).fold(0u64, |all, (page, _)| all | 1 << page);
        self.chunks[chunk as usize].present & !newest == 0
    }

    /// Puts the pages of later rounds over those of a chunk.
    fn overlay(&self, chunk: u64, bytes: &mut [u8]) -> Result<(), ChunkFailure> {
        let Some(pages) = self.layout.pages(chunk).filter(|_| !self.rounds.is_empty()) else {
            return Ok(());
        };
        let pages = pages.zip(bytes.chunks_mut(PAGE_SIZE as usize));
        self.read_newest(pages.filter_map(|(page, bytes)| Some((self.rounds.newest(page)?, bytes))))
    }

    /// Whether a later round has any page of a chunk.
    pub fn is_in_rounds(&self, chunk: u64) -> bool {
        self.layout.pages(chunk).is_some_and(|pages| self.rounds.has_any(pages))
    }

    /// The newest versions of these pages, as far as later rounds have them, in few requests.
    pub fn stretches(&self, pages: impl Iterator<Item = u64>) -> Vec<Stretch<'_>> {
        rounds::stretches(pages.filter_map(|page| self.rounds.newest(page)))
    }

    /// Reads a stretch into the buffer of [`STRETCH_MAX`](crate::STRETCH_MAX) bytes, checks each of
    /// its pages, and hands it on with its number.
    pub fn read_stretch(
        &self,
        stretch: &Stretch<'_>,
        buffer: &mut AlignedBuf,
        place: impl FnMut(u64, &[u8]),
    ) -> Result<(), ChunkFailure> {
        rounds::read_stretch(&self.file, stretch, buffer, place)
            .map_err(|(page, error)| self.failure(page, error))
    }

    fn failure(&self, page: u64, error: StateFileError) -> ChunkFailure {
        ChunkFailure { chunk: self.layout.chunk_of_page(page).unwrap_or(u64::MAX), error }
    }

    /// Reads the newest versions of pages that later rounds have, each to the slice beside it.
    /// Sorted by page, those of one round are read in few requests.
    pub fn read_newest<'a>(
        &'a self,
        pages: impl Iterator<Item = (&'a PageVersion, &'a mut [u8])>,
    ) -> Result<(), ChunkFailure> {
        rounds::read_versions(&self.file, pages).map_err(|(page, error)| self.failure(page, error))
    }
}

/// The file offset of a group that exists, lies in one region and fits into the buffer.
pub(crate) fn check_group(
    layout: &Layout,
    path: &Path,
    first: u64,
    count: usize,
    buffer: &AlignedBuf,
) -> Result<u64, ChunkFailure> {
    let last = first.saturating_add(count as u64).saturating_sub(1);
    let fits = (1..=GROUP_CHUNKS as usize).contains(&count)
        && count * CHUNK_SIZE as usize <= buffer.as_slice().len();
    match (layout.place(first), layout.place(last)) {
        (Some(start), Some(end)) if fits && start.region == end.region => Ok(start.file_offset),
        _ => {
            let problem = FormatError::NoSuchChunk { chunk: last, count: layout.chunk_count() };
            Err(ChunkFailure { chunk: last, error: invalid(path)(problem) })
        }
    }
}

/// Reads the pages of chunks in a row that begin at this offset of the file.
pub(crate) fn read_fixed(
    file: &DirectFile,
    start: u64,
    first: u64,
    presents: &[u64],
    buffer: &mut [u8],
) -> Result<(), ChunkFailure> {
    for (page, pages) in chunk::extents(presents, GAP_PAGES_MAX) {
        let from = page * PAGE_SIZE as usize;
        let bytes = &mut buffer[from..from + pages * PAGE_SIZE as usize];
        let read = file.read_exact_at("reading memory", bytes, start + from as u64);
        let chunk = first + page as u64 / CHUNK_PAGES;
        read.map_err(|error| ChunkFailure { chunk, error })?;
    }
    Ok(())
}

pub(crate) fn open(path: &Path) -> Result<DirectFile, StateFileError> {
    // A name that leads elsewhere, or a device or a pipe under it, is not what was sealed here.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = file.map_err(io_error("opening", path))?;
    let metadata = file.metadata().map_err(io_error("examination", path))?;
    match metadata.is_file() {
        true => Ok(DirectFile::new(path, file, false)),
        false => Err(invalid(path)(FormatError::NotAStateFile)),
    }
}

/// Reads and decodes the header slots; also gives the length of the file.
pub(crate) fn read_header(file: &DirectFile) -> Result<(Inspection, u64), StateFileError> {
    let path = file.path();
    let metadata = file.buffered().metadata().map_err(io_error("examination", path))?;
    let length = metadata.len();
    let mut area = vec![0; length.min(HEADER_AREA) as usize];
    file.read_exact_at("reading the header", &mut area, 0)?;
    let (header, at) = Header::decode(&area).map_err(invalid(path))?;
    let hash = blake3::hash(area.get(at..at + SLOT).unwrap_or(&[])).into();
    Ok((Inspection { header, hash }, length))
}

/// Whether a header is of exactly this save.
pub(crate) fn check_save(header: &Header, identity: &Identity) -> Result<(), FormatError> {
    check_owner(header, identity.vm_id, identity.epoch, Some(identity.generation))
}

fn check_owner(
    header: &Header,
    vm_id: VmId,
    epoch: Epoch,
    generation: Option<u64>,
) -> Result<(), FormatError> {
    let found = header.identity;
    if found.vm_id != vm_id {
        let (found, expected) = (found.vm_id.to_string(), vm_id.to_string());
        return Err(FormatError::OtherVm { found, expected });
    }
    let generation_differs = generation.is_some_and(|wanted| wanted != found.generation);
    if found.epoch != epoch || generation_differs {
        let generation = generation.map_or("any".to_owned(), |wanted| wanted.to_string());
        return Err(FormatError::OtherGeneration {
            found_epoch: found.epoch.0,
            found_generation: found.generation,
            wanted: format!("epoch {epoch} generation {generation}"),
        });
    }
    Ok(())
}

/// Compares a header with the file that is wanted, the most telling mistake first.
fn check_identity(
    header: &Header,
    length: u64,
    hash: &[u8; 32],
    expect: &Expect,
) -> Result<(), FormatError> {
    check_owner(header, expect.vm_id, expect.epoch, expect.generation)?;
    if !header.sealed {
        return Err(FormatError::NotSealed);
    }
    if length != header.file_length {
        return Err(FormatError::WrongLength { found: length, expected: header.file_length });
    }
    if hash != &expect.hash {
        let text = |hash: [u8; 32]| blake3::Hash::from(hash).to_hex().to_string();
        return Err(FormatError::OtherHash { found: text(*hash), expected: text(expect.hash) });
    }
    Ok(())
}

fn read_table(
    file: &DirectFile,
    table: &TableRef,
    name: &'static str,
) -> Result<Vec<u8>, StateFileError> {
    let mut bytes = vec![0; table.length as usize];
    file.read_exact_at("reading a table", &mut bytes, table.offset)?;
    if xxh3_64(&bytes) != table.checksum {
        return Err(invalid(file.path())(FormatError::TableDamaged { table: name }));
    }
    Ok(bytes)
}

/// A right checksum does not make a table right: the pages must exist.
fn check_chunks(layout: &Layout, chunks: &[ChunkEntry]) -> Result<(), FormatError> {
    let inconsistent = FormatError::Inconsistent { what: "chunk table" };
    if chunks.len() as u64 != layout.chunk_count() {
        return Err(inconsistent);
    }
    for chunk in layout.last_chunks() {
        let full = layout.place(chunk).map_or(0, |place| place.full_bitmap());
        if chunks.get(chunk as usize).is_none_or(|entry| entry.present & !full != 0) {
            return Err(inconsistent);
        }
    }
    Ok(())
}

fn read_section_table(
    file: &DirectFile,
    header: &Header,
) -> Result<section::Table, StateFileError> {
    if header.section_table.length > section::TABLE_MAX {
        let problem = FormatError::Inconsistent { what: "section table is too long" };
        return Err(invalid(file.path())(problem));
    }
    let table = read_table(file, &header.section_table, "section")?;
    section::decode_table(header, &table).map_err(invalid(file.path()))
}

fn read_segment_table(
    file: &DirectFile,
    header: &Header,
    record: &Record,
) -> Result<Vec<SegmentRef>, StateFileError> {
    let Record { offset, length, checksum, .. } = *record;
    let bytes = read_table(file, &TableRef { offset, length, checksum }, "segment")?;
    let between = header.data_offset + header.data_length..header.section_table.offset;
    segment::decode_table(&bytes, between).map_err(invalid(file.path()))
}

fn read_sections(file: &DirectFile, records: Vec<Record>) -> Result<Vec<Section>, StateFileError> {
    let mut sections = Vec::with_capacity(records.len());
    for record in records {
        let mut bytes = vec![0; record.length as usize];
        file.read_exact_at("reading a section", &mut bytes, record.offset)?;
        record.check(&bytes).map_err(invalid(file.path()))?;
        sections.push(Section { kind: record.name, version: record.version, bytes });
    }
    Ok(sections)
}
