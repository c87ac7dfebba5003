//! Reading a file that is still being written: only what its writer said is there.
//!
//! The reader is told places and checksums; it never concludes anything from the length of the file
//! or from what happens to lie in it. What it reads counts for nothing until the sealed tables name
//! the same checksums.

use std::path::Path;

use crate::chunk::{self, CHUNK_SIZE, ChunkEntry, PAGE_SIZE};
use crate::error::{FormatError, StateFileError, invalid};
use crate::header::{FORMAT_ROUNDS, Header, Identity};
use crate::io::{AlignedBuf, DirectFile};
use crate::layout::Layout;
use crate::reader::{self, ChunkFailure};
use crate::rounds::Segment;
use crate::segment::SegmentRef;
use crate::writer::GROUP_CHUNKS;

/// An unsealed file of format 2, open for reading.
#[derive(Debug)]
pub struct TailFile {
    file: DirectFile,
    header: Header,
    layout: Layout,
}

impl TailFile {
    /// Opens the file of exactly this save.
    pub fn open(path: &Path, identity: &Identity) -> Result<Self, StateFileError> {
        let file = reader::open(path)?;
        let (inspection, _) = reader::read_header(&file)?;
        let header = inspection.header;
        reader::check_save(&header, identity).map_err(invalid(path))?;
        if header.version < FORMAT_ROUNDS {
            return Err(invalid(path)(FormatError::NotSealed));
        }
        let layout =
            Layout::new(&header.regions).map_err(FormatError::from).map_err(invalid(path))?;
        Ok(Self { file, header, layout })
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

    /// Reads chunks in a row of one region, at most [`GROUP_CHUNKS`], of which the writer told these
    /// entries, and checks them. Only their present pages hold data afterwards.
    pub fn read_chunks(
        &self,
        first: u64,
        entries: &[ChunkEntry],
        buffer: &mut AlignedBuf,
    ) -> Result<(), ChunkFailure> {
        let start = reader::check_group(&self.layout, self.path(), first, entries.len(), buffer)?;
        let mut presents = [0; GROUP_CHUNKS as usize];
        for ((chunk, entry), present) in (first..).zip(entries).zip(&mut presents) {
            // What is told from outside may name pages beyond the end of a short chunk.
            let full = self.layout.place(chunk).map_or(0, |place| place.full_bitmap());
            *present = entry.present & full;
        }
        let presents = &presents[..entries.len()];
        self.file.forget_cached(start, entries.len() as u64 * CHUNK_SIZE);
        let buffer = buffer.as_mut_slice();
        reader::read_fixed(&self.file, start, first, presents, buffer)?;
        for ((chunk, entry), bytes) in
            (first..).zip(entries).zip(buffer.chunks(CHUNK_SIZE as usize))
        {
            if chunk::checksum(chunk, entry.present, bytes) != entry.checksum {
                let problem = FormatError::ChunkDamaged { chunk };
                return Err(ChunkFailure { chunk, error: invalid(self.path())(problem) });
            }
        }
        Ok(())
    }

    /// Reads a segment that the writer told of, and checks its head and each page. The data of its
    /// pages that are not zero comes in their order.
    pub fn read_segment(&self, at: &SegmentRef) -> Result<(Segment, AlignedBuf), StateFileError> {
        let operation = "reading a segment";
        at.check_place().map_err(invalid(self.path()))?;
        self.file.forget_cached(at.offset, 4 << 20);
        let mut head = AlignedBuf::new(at.head_length());
        self.file.read_exact_at(operation, head.as_mut_slice(), at.offset)?;
        let pages =
            at.decode_head(&self.header.identity, self.layout.page_count(), head.as_slice());
        let pages = pages.map_err(invalid(self.path()))?;
        let data_pages = pages.iter().filter(|version| version.offset.is_some()).count();
        let mut data = AlignedBuf::new(data_pages * PAGE_SIZE as usize);
        let start = at.offset + at.head_length() as u64;
        self.file.read_exact_at(operation, data.as_mut_slice(), start)?;
        let with_data = pages.iter().filter(|version| version.offset.is_some());
        for (version, bytes) in with_data.zip(data.as_slice().chunks(PAGE_SIZE as usize)) {
            version.check(bytes).map_err(invalid(self.path()))?;
        }
        Ok((Segment { at: *at, pages }, data))
    }
}
