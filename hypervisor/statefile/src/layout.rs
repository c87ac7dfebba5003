//! Where everything lies in a state file, as a pure function of the guest's memory regions.

use std::ops::Range;

use crate::chunk::{CHUNK_ENTRY_SIZE, CHUNK_SIZE, PAGE_SIZE};
use crate::header::HEADER_AREA;

/// The most memory regions of one VM.
pub const REGIONS_MAX: usize = 32;
/// The most guest memory that one file can hold: 2 TiB, twice the largest VM.
pub const MEMORY_MAX: u64 = 2 << 40;
/// Memory starts at a multiple of this, so that requests do not straddle stripes needlessly.
const DATA_ALIGNMENT: u64 = 64 << 10;

/// A piece of guest physical memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryRegion {
    /// The guest physical address of the first byte, a multiple of the page size.
    pub start: u64,
    /// The length in bytes, a multiple of the page size and not zero.
    pub length: u64,
}

/// Why a list of memory regions cannot be saved.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LayoutError {
    #[error("{found} memory regions are more than the {REGIONS_MAX} that a state file holds")]
    TooManyRegions { found: usize },
    #[error(
        "memory region {start:#x}+{length:#x} is empty, not made of whole pages, or out of range"
    )]
    BadRegion { start: u64, length: u64 },
    #[error("memory region at {start:#x} overlaps its predecessor or comes out of order")]
    Overlap { start: u64 },
    #[error("{length} bytes of memory are more than the {MEMORY_MAX} that a state file holds")]
    TooLarge { length: u64 },
}

/// Where a chunk belongs, in the guest and in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkPlace {
    /// The index of the memory region.
    pub region: usize,
    /// The offset in the region.
    pub offset: u64,
    /// The length; only the last chunk of a region can be shorter than [`CHUNK_SIZE`].
    pub length: u64,
    /// The offset in the file.
    pub file_offset: u64,
}

impl ChunkPlace {
    /// The bitmap of a chunk of which every page is there.
    pub fn full_bitmap(&self) -> u64 {
        let pages = self.length / PAGE_SIZE;
        if pages >= 64 { u64::MAX } else { (1 << pages) - 1 }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct RegionPlace {
    region: MemoryRegion,
    first_chunk: u64,
    file_offset: u64,
}

/// The places of all chunks of a VM. Equal regions give equal layouts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    places: Vec<RegionPlace>,
    chunk_count: u64,
    data_offset: u64,
    data_end: u64,
}

impl Layout {
    /// Checks the regions (sorted, disjoint, whole pages) and lays them out.
    pub fn new(regions: &[MemoryRegion]) -> Result<Self, LayoutError> {
        check_regions(regions)?;
        let chunk_count: u64 = regions.iter().map(|r| r.length.div_ceil(CHUNK_SIZE)).sum();
        let table_end = HEADER_AREA + chunk_count * CHUNK_ENTRY_SIZE;
        let data_offset = table_end.next_multiple_of(DATA_ALIGNMENT);
        let mut places = Vec::with_capacity(regions.len());
        let (mut first_chunk, mut file_offset) = (0, data_offset);
        for region in regions {
            places.push(RegionPlace { region: *region, first_chunk, file_offset });
            first_chunk += region.length.div_ceil(CHUNK_SIZE);
            file_offset += region.length;
        }
        Ok(Self { places, chunk_count, data_offset, data_end: file_offset })
    }

    /// The number of chunks in all regions.
    pub fn chunk_count(&self) -> u64 {
        self.chunk_count
    }

    /// The length of the chunk table, which lies right behind the header slots.
    pub fn chunk_table_length(&self) -> u64 {
        self.chunk_count * CHUNK_ENTRY_SIZE
    }

    /// The offset of the first byte of memory.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// The offset behind the last byte of memory, where the sections start.
    pub fn data_end(&self) -> u64 {
        self.data_end
    }

    /// Where a chunk belongs; `None` for an index that does not exist.
    pub fn place(&self, chunk: u64) -> Option<ChunkPlace> {
        if chunk >= self.chunk_count {
            return None;
        }
        let region = self.places.partition_point(|p| p.first_chunk <= chunk).checked_sub(1)?;
        let place = self.places.get(region)?;
        let offset = (chunk - place.first_chunk) * CHUNK_SIZE;
        let length = CHUNK_SIZE.min(place.region.length - offset);
        Some(ChunkPlace { region, offset, length, file_offset: place.file_offset + offset })
    }

    /// The pages of all memory. Pages are numbered through all regions, in the order of the file.
    pub fn page_count(&self) -> u64 {
        (self.data_end - self.data_offset) / PAGE_SIZE
    }

    /// The numbers of the pages of a chunk; `None` for an index that does not exist.
    pub fn pages(&self, chunk: u64) -> Option<Range<u64>> {
        let place = self.place(chunk)?;
        let first = (place.file_offset - self.data_offset) / PAGE_SIZE;
        Some(first..first + place.length / PAGE_SIZE)
    }

    /// The chunk that holds a page; `None` outside of the memory.
    pub fn chunk_of_page(&self, page: u64) -> Option<u64> {
        let (region, offset) = self.page_place(page)?;
        self.chunk_at(region, offset)
    }

    /// The region of a page and the offset in it; `None` outside of the memory.
    pub fn page_place(&self, page: u64) -> Option<(usize, u64)> {
        let at = page.checked_mul(PAGE_SIZE)?.checked_add(self.data_offset)?;
        let region = self.places.partition_point(|p| p.file_offset <= at).checked_sub(1)?;
        let offset = at - self.places.get(region)?.file_offset;
        (at < self.data_end).then_some((region, offset))
    }

    /// The last chunk of each region: the only ones that can be short.
    pub fn last_chunks(&self) -> impl Iterator<Item = u64> {
        self.places.iter().map(|p| p.first_chunk + (p.region.length - 1) / CHUNK_SIZE)
    }

    /// The chunk that holds this offset of a region; `None` outside of the memory.
    pub fn chunk_at(&self, region: usize, offset: u64) -> Option<u64> {
        let place = self.places.get(region)?;
        (offset < place.region.length).then(|| place.first_chunk + offset / CHUNK_SIZE)
    }
}

fn check_regions(regions: &[MemoryRegion]) -> Result<(), LayoutError> {
    if regions.len() > REGIONS_MAX {
        return Err(LayoutError::TooManyRegions { found: regions.len() });
    }
    let (mut end, mut total) = (0u64, 0u64);
    for region in regions {
        let MemoryRegion { start, length } = *region;
        let pages = length != 0 && start % PAGE_SIZE == 0 && length % PAGE_SIZE == 0;
        let region_end = start.checked_add(length).filter(|_| pages);
        let region_end = region_end.ok_or(LayoutError::BadRegion { start, length })?;
        if start < end {
            return Err(LayoutError::Overlap { start });
        }
        end = region_end;
        total = total.saturating_add(length);
    }
    if total > MEMORY_MAX { Err(LayoutError::TooLarge { length: total }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn chunks_never_span_regions() {
        let regions = [
            MemoryRegion { start: 0, length: CHUNK_SIZE + PAGE_SIZE },
            MemoryRegion { start: 4 * GIB, length: 2 * CHUNK_SIZE },
        ];
        let layout = Layout::new(&regions).unwrap();
        assert_eq!(layout.chunk_count(), 4);
        let short = layout.place(1).unwrap();
        assert_eq!((short.region, short.length, short.full_bitmap()), (0, PAGE_SIZE, 1));
        let first = layout.place(2).unwrap();
        assert_eq!((first.region, first.offset, first.length), (1, 0, CHUNK_SIZE));
        assert_eq!(first.file_offset, short.file_offset + short.length);
        assert_eq!(layout.place(4), None);
        assert_eq!(layout.chunk_at(1, CHUNK_SIZE), Some(3));
        assert_eq!(layout.chunk_at(1, 2 * CHUNK_SIZE), None);
        assert_eq!(layout.chunk_at(2, 0), None);
        assert_eq!((layout.pages(1), layout.pages(2)), (Some(64..65), Some(65..129)));
        assert_eq!(layout.page_place(64), Some((0, CHUNK_SIZE)));
        assert_eq!(layout.page_place(65), Some((1, 0)));
        assert_eq!((layout.page_count(), layout.page_place(65 + 128)), (65 + 128, None));
        assert_eq!(layout.page_place(u64::MAX), None);
    }

    #[test]
    fn impossible_regions_are_refused() {
        let region = |start, length| MemoryRegion { start, length };
        let bad = |regions: &[MemoryRegion]| Layout::new(regions).unwrap_err();
        assert!(matches!(bad(&[region(0, 0)]), LayoutError::BadRegion { .. }));
        assert!(matches!(bad(&[region(1, 4096)]), LayoutError::BadRegion { .. }));
        assert!(matches!(bad(&[region(u64::MAX - 4095, 8192)]), LayoutError::BadRegion { .. }));
        assert!(matches!(
            bad(&[region(0, 8192), region(4096, 4096)]),
            LayoutError::Overlap { start: 4096 }
        ));
        assert!(matches!(bad(&[region(0, MEMORY_MAX + 4096)]), LayoutError::TooLarge { .. }));
        assert!(matches!(bad(&[region(0, 4096); 33]), LayoutError::TooManyRegions { found: 33 }));
    }
}
