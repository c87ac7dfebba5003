//! Memory chunks: the unit of checksum, of loading on demand, and of the chunk table.
//!
//! A chunk is 256 KiB of one region, 64 pages, so that one word says which of its pages are there.
//! A page that is not there is all zero; whatever the file has at its place is never looked at.
//! The checksum is XXH3-64 over the pages that are there, in order, seeded with the index of the
//! chunk, so that data of another chunk at this place is found out as well.
//!
//! Why 256 KiB: a fault of a running guest costs the reading of one chunk. Measured with O_DIRECT
//! on the build machines: 64 KiB in 0.21 ms, 256 KiB in 0.61 ms, 1 MiB in 1.5 ms. 1 MiB makes each
//! fault 2.5 times slower, 64 KiB makes the table four times larger and halves the throughput.
//! Bulk transfers take [`crate::GROUP_CHUNKS`] chunks (1 MiB) at once and do not care.

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use crate::bytes::{Decoder, Encoder};

/// The page size of the format. x86-64 knows no other base page.
pub const PAGE_SIZE: u64 = 4096;
/// The pages of a chunk, one bit each.
pub const CHUNK_PAGES: u64 = 64;
/// The bytes of a chunk.
pub const CHUNK_SIZE: u64 = PAGE_SIZE * CHUNK_PAGES;
/// The bytes of a chunk table entry: presence bitmap, checksum.
pub(crate) const CHUNK_ENTRY_SIZE: u64 = 16;

/// A page as a length in memory.
const PAGE: usize = 4096;

/// What the chunk table says about a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ChunkEntry {
    /// Bit n: page n of the chunk is in the file; else it is zero.
    pub present: u64,
    /// XXH3-64 over the present pages, seeded with the index of the chunk; 0 when there are none.
    pub checksum: u64,
}

impl ChunkEntry {
    /// Describes the memory of a chunk: finds its zero pages and sums the others.
    pub fn of(chunk: u64, memory: &[u8]) -> Self {
        let present = present_pages(memory);
        Self { present, checksum: checksum(chunk, present, memory) }
    }

    /// The number of pages in the file.
    pub fn page_count(&self) -> u64 {
        u64::from(self.present.count_ones())
    }
}

/// The bitmap of the pages that have a byte other than zero. Takes at most one chunk.
fn present_pages(memory: &[u8]) -> u64 {
    let mut present = 0;
    for (page, bytes) in memory.chunks(PAGE).take(64).enumerate() {
        present |= u64::from(!is_zero(bytes)) << page;
    }
    present
}

/// Whether all bytes are zero. It stops at the first line of a page in use.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The checksum over the present pages of a chunk. Pages beyond the end of `memory` count as empty.
pub(crate) fn checksum(chunk: u64, present: u64, memory: &[u8]) -> u64 {
    let run_bytes = |first: usize, count: usize| {
        let end = ((first + count) * PAGE).min(memory.len());
        memory.get(first * PAGE..end).unwrap_or(&[])
    };
    let mut all = runs(present);
    match (all.next(), all.next()) {
        (None, _) => 0,
        (Some((first, count)), None) => xxh3_64_with_seed(run_bytes(first, count), chunk),
        _ => {
            let mut hasher = Xxh3::with_seed(chunk);
            runs(present).for_each(|(first, count)| hasher.update(run_bytes(first, count)));
            hasher.digest()
        }
    }
}

/// The runs of set bits, as (first page, number of pages), in order.
pub fn runs(mut present: u64) -> impl Iterator<Item = (usize, usize)> {
    let mut base = 0usize;
    std::iter::from_fn(move || {
        if present == 0 {
            return None;
        }
        let gap = present.trailing_zeros();
        present >>= gap;
        let length = present.trailing_ones();
        present = present.checked_shr(length).unwrap_or(0);
        let first = base + gap as usize;
        base = first + length as usize;
        Some((first, length as usize))
    })
}

/// The runs of present pages over several chunks in a row, as (first page, number of pages), where
/// a gap of up to `gap_max` absent pages does not end a run: one request more costs more.
pub(crate) fn extents(presents: &[u64], gap_max: usize) -> Vec<(usize, usize)> {
    let mut extents: Vec<(usize, usize)> = Vec::new();
    for (chunk, present) in presents.iter().enumerate() {
        for (first, count) in runs(*present) {
            let first = chunk * CHUNK_PAGES as usize + first;
            match extents.last_mut() {
                Some((start, length)) if first - (*start + *length) <= gap_max => {
                    *length = first + count - *start;
                }
                _ => extents.push((first, count)),
            }
        }
    }
    extents
}

/// The chunk table as bytes.
pub(crate) fn encode_table(entries: impl Iterator<Item = ChunkEntry>) -> Vec<u8> {
    let mut encoder = Encoder::default();
    entries.for_each(|entry| {
        encoder.u64(entry.present).u64(entry.checksum);
    });
    encoder.into_bytes()
}

/// The entries of a chunk table; a torn entry at the end is left out and found by its length.
pub(crate) fn decode_table(bytes: &[u8]) -> Vec<ChunkEntry> {
    let entry = |bytes: &[u8]| {
        let mut decoder = Decoder::new(bytes);
        Some(ChunkEntry { present: decoder.u64()?, checksum: decoder.u64()? })
    };
    bytes.chunks_exact(CHUNK_ENTRY_SIZE as usize).filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_exactly_the_set_bits() {
        for present in [0, 1, 1 << 63, u64::MAX, 0b1011_0001, 0xf000_0000_0000_000f] {
            let mut covered = 0u64;
            for (first, count) in runs(present) {
                (first..first + count).for_each(|page| covered |= 1 << page);
            }
            assert_eq!(covered, present);
        }
        assert_eq!(runs(u64::MAX).collect::<Vec<_>>(), [(0, 64)]);
    }

    #[test]
    fn extents_join_over_small_gaps_and_chunk_borders() {
        assert_eq!(extents(&[1 << 63, 1], 0), [(63, 2)]);
        assert_eq!(extents(&[0b1001, 0], 2), [(0, 4)]);
        assert_eq!(extents(&[0b1001, 0], 1), [(0, 1), (3, 1)]);
        assert_eq!(extents(&[0, 0], 9), []);
    }

    #[test]
    fn a_checksum_depends_on_place_and_presence_but_not_on_absent_pages() {
        let mut memory = vec![0u8; 4 * PAGE];
        memory[PAGE] = 7;
        memory[3 * PAGE] = 9;
        let entry = ChunkEntry::of(5, &memory);
        assert_eq!(entry.present, 0b1010);
        assert_ne!(entry.checksum, ChunkEntry::of(6, &memory).checksum);
        memory[0] = 1;
        assert_eq!(checksum(5, entry.present, &memory), entry.checksum);
        memory[3 * PAGE] = 8;
        assert_ne!(checksum(5, entry.present, &memory), entry.checksum);
    }

    #[test]
    fn one_run_sums_like_a_stream() {
        let memory: Vec<u8> = (0..2 * PAGE).map(|i| (i % 251) as u8).collect();
        let mut hasher = Xxh3::with_seed(3);
        memory.chunks(1000).for_each(|piece| hasher.update(piece));
        assert_eq!(checksum(3, 0b11, &memory), hasher.digest());
    }
}
