//! Segments: pages that were written again after round 0, appended while the guest ran.
//!
//! ```text
//! offset in the segment
//! 0       magic `BWROUND\n`
//! 8       version of the segment (4), round (4)
//! 16      VM id (16), epoch (8), generation (8): whose save this is
//! 48      pages (4), pages with data (4)
//! 56      for each page, ascending: its number (8; bit 63: it is zero now and has no data),
//!         XXH3-64 of it, seeded with its number (8; 0 for a page of zeros)
//! ..      XXH3-64 over all bytes before (8)
//! ..      zeros, to a multiple of 4096; then the data of the pages, in the same order
//! ```
//!
//! A segment tells by itself what it is, so a reader that was told its place can check it before the
//! file is sealed; that it belongs to the file, only the segment table says, under the seal. A full
//! segment is 4 MiB. Each page has its own checksum, so that one page can be read alone.
//!
//! The segment table has a row of 24 bytes for each segment, in the order in which they count, a
//! later one over an earlier one: offset (8), round (4), pages (4), checksum of the head (8).

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::bytes::{Decoder, Encoder};
use crate::chunk::{PAGE_SIZE, is_zero};
use crate::error::FormatError;
use crate::header::Identity;
use crate::io::AlignedBuf;

/// The pages of a full segment: its head is 16 KiB then, and all of it 4 MiB.
pub const SEGMENT_PAGES_MAX: usize = 1020;
/// The bytes of a row of the segment table.
pub(crate) const ROW_SIZE: u64 = 24;
/// The longest segment table that is read: 4 TiB of later rounds.
pub(crate) const TABLE_MAX: u64 = (1 << 20) * ROW_SIZE;

const MAGIC: [u8; 8] = *b"BWROUND\n";
const VERSION: u32 = 1;
const PAGE: usize = PAGE_SIZE as usize;
const FIXED: usize = 56;
const HEAD_MAX: usize = 4 * PAGE;
const ZERO: u64 = 1 << 63;
/// No file is as long as this.
const OFFSET_MAX: u64 = 1 << 60;

/// Where a segment lies, and the checksum of its head: what the segment table says of it, and what
/// a source tells of one that it has just written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentRef {
    pub offset: u64,
    /// The round that wrote it, 1 or higher.
    pub round: u32,
    /// The pages that it is about, those of zeros included.
    pub pages: u32,
    /// XXH3-64 of the head, which holds the checksum of each page.
    pub checksum: u64,
}

/// One page in a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageVersion {
    pub page: u64,
    /// The round that wrote it.
    pub round: u32,
    /// Where its bytes are in the file; `None` for a page of zeros.
    pub offset: Option<u64>,
    checksum: u64,
}

impl PageVersion {
    /// Whether these are the bytes that were written.
    pub(crate) fn check(&self, bytes: &[u8]) -> Result<(), FormatError> {
        if page_checksum(self.page, bytes) == self.checksum {
            return Ok(());
        }
        Err(FormatError::PageDamaged { page: self.page })
    }
}

impl SegmentRef {
    /// The bytes of the head, padding included.
    pub(crate) fn head_length(&self) -> usize {
        head_length(self.pages as usize)
    }

    /// Refuses what no writer makes, so that one can compute with the rest.
    pub(crate) fn check_place(&self) -> Result<(), FormatError> {
        let sized = (1..=SEGMENT_PAGES_MAX).contains(&(self.pages as usize));
        let placed = self.offset.is_multiple_of(PAGE_SIZE) && self.offset < OFFSET_MAX;
        if sized && placed && self.round > 0 {
            return Ok(());
        }
        Err(FormatError::SegmentDamaged { offset: self.offset, what: "its place" })
    }

    pub(crate) fn encode(&self, e: &mut Encoder) {
        e.u64(self.offset).u32(self.round).u32(self.pages).u64(self.checksum);
    }

    /// Decodes a head that was read from this place. Never panics.
    pub(crate) fn decode_head(
        &self,
        identity: &Identity,
        page_count: u64,
        head: &[u8],
    ) -> Result<Vec<PageVersion>, FormatError> {
        let offset = self.offset;
        let damaged = |what| FormatError::SegmentDamaged { offset, what };
        let covered = FIXED + 16 * self.pages as usize;
        let bytes = head.get(..covered).ok_or(damaged("too short"))?;
        let mut d = Decoder::new(head);
        if d.array() != Some(MAGIC) {
            return Err(damaged("no magic number"));
        }
        let version = d.u32().ok_or(damaged("too short"))?;
        if version != VERSION {
            return Err(FormatError::NewerSegment { offset, found: version });
        }
        let stored = head.get(covered..covered + 8).ok_or(damaged("too short"))?;
        if xxh3_64(bytes) != self.checksum || stored != self.checksum.to_le_bytes() {
            return Err(damaged("bad checksum of its head"));
        }
        let found = decode_fixed(&mut d).ok_or(damaged("too short"))?;
        if found.identity != *identity {
            let (found, expected) = (found.identity.to_string(), identity.to_string());
            return Err(FormatError::ForeignSegment { offset, found, expected });
        }
        if (found.round, found.pages) != (self.round, self.pages) {
            return Err(damaged("it is another segment"));
        }
        let data = offset + self.head_length() as u64;
        let pages = decode_pages(&mut d, &found, data).ok_or(damaged("its pages"))?;
        let ascending = pages.windows(2).all(|pair| pair[0].page < pair[1].page);
        let inside = pages.last().is_none_or(|last| last.page < page_count);
        if ascending && inside { Ok(pages) } else { Err(damaged("its page numbers")) }
    }
}

/// The fields before the pages.
struct Fixed {
    round: u32,
    identity: Identity,
    pages: u32,
    data_pages: u32,
}

fn decode_fixed(d: &mut Decoder<'_>) -> Option<Fixed> {
    use bellwether_types::{Epoch, VmId};
    let round = d.u32()?;
    let vm_id = VmId::from_uuid(uuid::Uuid::from_bytes(d.array()?));
    let identity = Identity { vm_id, epoch: Epoch(d.u64()?), generation: d.u64()? };
    Some(Fixed { round, identity, pages: d.u32()?, data_pages: d.u32()? })
}

fn decode_pages(d: &mut Decoder<'_>, fixed: &Fixed, data: u64) -> Option<Vec<PageVersion>> {
    let mut next = 0;
    let mut pages = Vec::with_capacity(fixed.pages as usize);
    for _ in 0..fixed.pages {
        let (number, checksum) = (d.u64()?, d.u64()?);
        let offset = (number & ZERO == 0).then(|| data + next * PAGE_SIZE);
        next += u64::from(offset.is_some());
        pages.push(PageVersion { page: number & !ZERO, round: fixed.round, offset, checksum });
    }
    (next == u64::from(fixed.data_pages)).then_some(pages)
}

/// The rows of a segment table, checked against the file: whole, in order of rounds, each in the
/// part of the file that lies between the memory and the section table.
pub(crate) fn decode_table(
    bytes: &[u8],
    between: std::ops::Range<u64>,
) -> Result<Vec<SegmentRef>, FormatError> {
    let bad = FormatError::Inconsistent { what: "segment table" };
    let mut d = Decoder::new(bytes);
    let mut rows: Vec<SegmentRef> = Vec::new();
    while !d.rest().is_empty() {
        let row = decode_row(&mut d).ok_or(bad.clone())?;
        row.check_place().map_err(|_| bad.clone())?;
        let end = row.offset + row.head_length() as u64;
        let inside = row.offset >= between.start && end <= between.end;
        let ordered = rows.last().is_none_or(|last| last.round <= row.round);
        if !(inside && ordered) {
            return Err(bad);
        }
        rows.push(row);
    }
    Ok(rows)
}

fn decode_row(d: &mut Decoder<'_>) -> Option<SegmentRef> {
    Some(SegmentRef { offset: d.u64()?, round: d.u32()?, pages: d.u32()?, checksum: d.u64()? })
}

fn head_length(pages: usize) -> usize {
    (FIXED + 16 * pages + 8).next_multiple_of(PAGE)
}

fn page_checksum(page: u64, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, page)
}

/// A segment in the making: the writer of a round copies pages into it, in ascending order.
#[derive(Debug)]
pub struct SegmentBuffer {
    /// Room for the longest head, then for the data of each page.
    bytes: AlignedBuf,
    /// Number, with the bit for zero, and checksum of each page.
    pages: Vec<(u64, u64)>,
    data_pages: usize,
}

impl Default for SegmentBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl SegmentBuffer {
    pub fn new() -> Self {
        let bytes = AlignedBuf::new(HEAD_MAX + SEGMENT_PAGES_MAX * PAGE);
        Self { bytes, pages: Vec::with_capacity(SEGMENT_PAGES_MAX), data_pages: 0 }
    }

    pub fn clear(&mut self) {
        self.pages.clear();
        self.data_pages = 0;
    }

    pub fn is_full(&self) -> bool {
        self.pages.len() == SEGMENT_PAGES_MAX
    }

    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Adds a page, which `copy` puts into the slice that it is given. The page is summed as it was
    /// copied, so the guest may go on writing to the original.
    ///
    /// Panics if the segment is full or the pages do not ascend: both are mistakes of the caller.
    pub fn push(&mut self, page: u64, copy: impl FnOnce(&mut [u8])) {
        assert!(!self.is_full(), "a segment holds {SEGMENT_PAGES_MAX} pages");
        assert!(self.pages.last().is_none_or(|(last, _)| last & !ZERO < page), "pages ascend");
        let at = HEAD_MAX + self.data_pages * PAGE;
        let bytes = &mut self.bytes.as_mut_slice()[at..at + PAGE];
        copy(bytes);
        if is_zero(bytes) {
            self.pages.push((page | ZERO, 0));
        } else {
            self.pages.push((page, page_checksum(page, bytes)));
            self.data_pages += 1;
        }
    }

    /// The bytes of the segment in the file.
    pub(crate) fn length(&self) -> u64 {
        (head_length(self.pages.len()) + self.data_pages * PAGE) as u64
    }

    /// Completes the head: the bytes to write, and what the segment table says of them.
    pub(crate) fn finish(
        &mut self,
        identity: &Identity,
        round: u32,
        offset: u64,
    ) -> (&[u8], SegmentRef) {
        let (pages, data_pages) = (self.pages.len() as u32, self.data_pages as u32);
        let mut e = Encoder::default();
        e.raw(&MAGIC).u32(VERSION).u32(round);
        e.raw(identity.vm_id.uuid().as_bytes()).u64(identity.epoch.0).u64(identity.generation);
        e.u32(pages).u32(data_pages);
        self.pages.iter().for_each(|(page, checksum)| {
            e.u64(*page).u64(*checksum);
        });
        let mut head = e.into_bytes();
        let checksum = xxh3_64(&head);
        head.extend_from_slice(&checksum.to_le_bytes());
        let length = head_length(self.pages.len());
        head.resize(length, 0);
        let start = HEAD_MAX - length;
        let bytes = self.bytes.as_mut_slice();
        bytes[start..HEAD_MAX].copy_from_slice(&head);
        let end = HEAD_MAX + self.data_pages * PAGE;
        (&bytes[start..end], SegmentRef { offset, round, pages, checksum })
    }
}

#[cfg(test)]
mod tests {
    use bellwether_types::{Epoch, VmId};
    use proptest::prelude::*;

    use super::*;

    fn identity() -> Identity {
        let vm_id = VmId::from_uuid(uuid::Uuid::from_u128(7));
        Identity { vm_id, epoch: Epoch(3), generation: 4 }
    }

    fn sample() -> (Vec<u8>, SegmentRef) {
        let mut buffer = SegmentBuffer::new();
        for page in [3u64, 5, 8] {
            buffer.push(page, |bytes| bytes.fill(if page == 5 { 0 } else { page as u8 }));
        }
        assert_eq!(buffer.length(), 3 * PAGE_SIZE);
        let (bytes, segment) = buffer.finish(&identity(), 2, 40960);
        (bytes.to_vec(), segment)
    }

    #[test]
    fn a_full_segment_is_4_mib() {
        let mut buffer = SegmentBuffer::new();
        (0..SEGMENT_PAGES_MAX as u64).for_each(|page| buffer.push(page, |bytes| bytes.fill(1)));
        assert!(buffer.is_full());
        assert_eq!(buffer.length(), 4 << 20);
        let (bytes, segment) = buffer.finish(&identity(), 1, 0);
        assert_eq!((bytes.len(), segment.head_length()), (4 << 20, 16 << 10));
    }

    #[test]
    fn a_segment_tells_what_it_is() {
        let (bytes, segment) = sample();
        let pages = segment.decode_head(&identity(), 9, &bytes).unwrap();
        let places: Vec<_> = pages.iter().map(|version| (version.page, version.offset)).collect();
        assert_eq!(places, [(3, Some(45056)), (5, None), (8, Some(49152))]);
        pages[0].check(&bytes[PAGE..2 * PAGE]).unwrap();
        assert_eq!(pages[0].check(&bytes[..PAGE]), Err(FormatError::PageDamaged { page: 3 }));
    }

    #[test]
    fn each_foreign_segment_has_its_own_error() {
        let (bytes, segment) = sample();
        let decode = |segment: SegmentRef, identity, bytes: &[u8]| {
            segment.decode_head(&identity, 9, bytes).unwrap_err()
        };
        let other = Identity { generation: 5, ..identity() };
        assert!(matches!(decode(segment, other, &bytes), FormatError::ForeignSegment { .. }));
        let other = SegmentRef { checksum: 1, ..segment };
        assert!(matches!(decode(other, identity(), &bytes), FormatError::SegmentDamaged { .. }));
        let other = SegmentRef { round: 3, ..segment };
        assert!(matches!(decode(other, identity(), &bytes), FormatError::SegmentDamaged { .. }));
        let mut newer = bytes.clone();
        newer[8] = 9;
        assert!(matches!(
            decode(segment, identity(), &newer),
            FormatError::NewerSegment { found: 9, .. }
        ));
        assert!(segment.decode_head(&identity(), 8, &bytes).is_err(), "page 8 of 8 pages");
        assert!(segment.decode_head(&identity(), 9, &bytes[..60]).is_err(), "torn");
    }

    #[test]
    fn a_table_is_whole_and_in_order() {
        let row = |offset, round| SegmentRef { offset, round, pages: 1, checksum: 9 };
        let table = |rows: &[SegmentRef]| {
            let mut e = Encoder::default();
            rows.iter().for_each(|row| row.encode(&mut e));
            e.into_bytes()
        };
        let good = [row(8192, 1), row(4096, 2)];
        assert_eq!(decode_table(&table(&good), 4096..20000).unwrap(), good);
        assert!(decode_table(&table(&good)[1..], 4096..20000).is_err());
        let bad = |rows: &[SegmentRef]| decode_table(&table(rows), 4096..20000).is_err();
        assert!(bad(&[row(8192, 2), row(4096, 1)]), "rounds go back");
        assert!(bad(&[row(0, 1)]) && bad(&[row(16384, 1)]) && bad(&[row(4097, 1)]));
        assert!(bad(&[row(8192, 0)]) && bad(&[SegmentRef { pages: 0, ..row(8192, 1) }]));
        assert!(bad(&[row(u64::MAX - 4095, 1)]));
    }

    proptest! {
        #[test]
        fn random_heads_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), pages in 0u32..2000,
        ) {
            let (good, segment) = sample();
            let segment = SegmentRef { pages, ..segment };
            prop_assert!(segment.decode_head(&identity(), 9, &bytes).is_err());
            let mut mixed = good;
            mixed.splice(8..8, bytes.iter().copied());
            let _outcome = segment.decode_head(&identity(), 9, &mixed);
            let _outcome = decode_table(&bytes, 0..1 << 40);
        }
    }
}
