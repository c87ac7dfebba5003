//! The later rounds of a file: from a page to its newest version.

use std::collections::HashMap;
use std::ops::Range;
use std::thread;

use crate::chunk::PAGE_SIZE;
use crate::error::{FormatError, StateFileError, invalid};
use crate::header::Identity;
use crate::io::{AlignedBuf, DirectFile};
use crate::layout::Layout;
use crate::segment::{PageVersion, SegmentRef};
use crate::writer::GAP_PAGES_MAX;

/// Threads that read the heads of segments: a head is small, so most of the time is waiting.
const READERS: usize = 4;
/// Fewer heads than this are not worth another thread.
const HEADS_PER_READER: usize = 8;

/// A segment whose head was read and checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    pub at: SegmentRef,
    /// Its pages, ascending.
    pub pages: Vec<PageVersion>,
}

/// The newest version of each page that a later round has.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    versions: Vec<PageVersion>,
    /// For each page of the memory one more than the place in `versions`; 0 without a version. Empty
    /// in a file without later rounds.
    newest: Vec<u32>,
}

impl Rounds {
    /// Puts the segments together in the order of their table.
    pub(crate) fn new(layout: &Layout, segments: Vec<Segment>) -> Result<Self, FormatError> {
        if segments.is_empty() {
            return Ok(Self::default());
        }
        let mut newest = vec![0u32; layout.page_count() as usize];
        let mut versions = Vec::with_capacity(segments.iter().map(|s| s.pages.len()).sum());
        // The number of versions before the round that is being looked at.
        let (mut round, mut before) = (0, 0);
        for segment in segments {
            if segment.at.round != round {
                (round, before) = (segment.at.round, versions.len());
            }
            for version in segment.pages {
                versions.push(version);
                // Heads are checked: their pages are pages of the memory.
                let place = &mut newest[version.page as usize];
                if *place as usize > before {
                    return Err(FormatError::Inconsistent { what: "a page twice in one round" });
                }
                *place = u32::try_from(versions.len())
                    .map_err(|_| FormatError::Inconsistent { what: "too many pages" })?;
            }
        }
        Ok(Self { versions, newest })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.newest.is_empty()
    }

    /// The newest version of a page, if a later round has one.
    pub(crate) fn newest(&self, page: u64) -> Option<&PageVersion> {
        let place = *self.newest.get(usize::try_from(page).ok()?)?;
        self.versions.get((place as usize).checked_sub(1)?)
    }

    /// Whether a later round has any of these pages.
    pub(crate) fn has_any(&self, pages: Range<u64>) -> bool {
        let places = self.newest.get(pages.start as usize..pages.end as usize);
        places.is_some_and(|places| places.iter().any(|place| *place != 0))
    }

    /// The newest versions among the pages of a chunk: (page of the chunk, version).
    pub(crate) fn among(&self, pages: Range<u64>) -> impl Iterator<Item = (usize, &PageVersion)> {
        let pages = if self.has_any(pages.clone()) { pages } else { 0..0 };
        pages.enumerate().filter_map(|(index, page)| Some((index, self.newest(page)?)))
    }
}

/// Reads the heads of segments that are not known yet, several at once.
pub(crate) fn read_heads(
    file: &DirectFile,
    identity: &Identity,
    layout: &Layout,
    table: &[SegmentRef],
    mut known: HashMap<u64, Segment>,
) -> Result<Vec<Segment>, StateFileError> {
    let take = |at: &SegmentRef| known.remove(&at.offset).filter(|known| known.at == *at);
    let mut heads: Vec<Option<Segment>> = table.iter().map(take).collect();
    let unknown = heads.iter().filter(|head| head.is_none()).count();
    let readers = (unknown / HEADS_PER_READER).clamp(1, READERS);
    let share = table.len().div_ceil(readers).max(1);
    let fill = |(table, heads): (&[SegmentRef], &mut [Option<Segment>])| {
        for (at, head) in table.iter().zip(heads).filter(|(_, head)| head.is_none()) {
            *head = Some(read_head(file, identity, layout, at)?);
        }
        Ok(())
    };
    let fill = &fill;
    thread::scope(|scope| {
        let mut parts = table.chunks(share).zip(heads.chunks_mut(share));
        let first = parts.next();
        let others: Vec<_> = parts.map(|part| scope.spawn(move || fill(part))).collect();
        let mut outcome = first.map_or(Ok(()), fill);
        for other in others {
            let part = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome = outcome.and(part);
        }
        outcome
    })?;
    Ok(heads.into_iter().flatten().collect())
}

fn read_head(
    file: &DirectFile,
    identity: &Identity,
    layout: &Layout,
    at: &SegmentRef,
) -> Result<Segment, StateFileError> {
    let mut buffer = AlignedBuf::new(at.head_length());
    file.read_exact_at("reading a segment", buffer.as_mut_slice(), at.offset)?;
    let pages = at.decode_head(identity, layout.page_count(), buffer.as_slice());
    Ok(Segment { at: *at, pages: pages.map_err(invalid(file.path()))? })
}

/// Versions of pages that lie so near to each other in the file that one request reads them all.
#[derive(Debug)]
pub struct Stretch<'a> {
    offset: u64,
    length: usize,
    versions: Vec<&'a PageVersion>,
}

/// One request reads this at most.
pub const STRETCH_MAX: usize = 4 << 20;

impl Stretch<'_> {
    pub fn pages(&self) -> usize {
        self.versions.len()
    }
}

/// Puts versions together that are near to each other. Those without data are left out.
pub(crate) fn stretches<'a>(versions: impl Iterator<Item = &'a PageVersion>) -> Vec<Stretch<'a>> {
    let mut placed: Vec<(u64, &PageVersion)> =
        versions.filter_map(|version| Some((version.offset?, version))).collect();
    placed.sort_unstable_by_key(|(offset, _)| *offset);
    let mut stretches: Vec<Stretch<'_>> = Vec::new();
    for (offset, version) in placed {
        let joins = |last: &&mut Stretch<'_>| {
            let length = offset + PAGE_SIZE - last.offset;
            let gap = offset - (last.offset + last.length as u64);
            length <= STRETCH_MAX as u64 && gap <= GAP_PAGES_MAX as u64 * PAGE_SIZE
        };
        match stretches.last_mut().filter(joins) {
            Some(last) => {
                last.length = (offset + PAGE_SIZE - last.offset) as usize;
                last.versions.push(version);
            }
            None => {
                let length = PAGE_SIZE as usize;
                stretches.push(Stretch { offset, length, versions: vec![version] });
            }
        }
    }
    stretches
}

/// Reads a stretch into the buffer, which has room for [`STRETCH_MAX`], checks each page, and hands
/// it on with its number.
pub(crate) fn read_stretch(
    file: &DirectFile,
    stretch: &Stretch<'_>,
    buffer: &mut AlignedBuf,
    mut place: impl FnMut(u64, &[u8]),
) -> Result<(), (u64, StateFileError)> {
    let Some(first) = stretch.versions.first() else { return Ok(()) };
    let bytes = &mut buffer.as_mut_slice()[..stretch.length];
    file.read_exact_at("reading memory", bytes, stretch.offset)
        .map_err(|error| (first.page, error))?;
    for version in &stretch.versions {
        let Some(offset) = version.offset else { continue };
        let from = (offset - stretch.offset) as usize;
        let page = &bytes[from..from + PAGE_SIZE as usize];
        version.check(page).map_err(|problem| (version.page, invalid(file.path())(problem)))?;
        place(version.page, page);
    }
    Ok(())
}

/// Reads versions of pages, each given with the slice where it belongs, and checks them. Versions
/// that lie in a row in the file are read at once.
pub(crate) fn read_versions<'a>(
    file: &DirectFile,
    versions: impl Iterator<Item = (&'a PageVersion, &'a mut [u8])>,
) -> Result<(), (u64, StateFileError)> {
    let mut row: Vec<(&PageVersion, &mut [u8])> = Vec::new();
    for (version, bytes) in versions {
        let Some(offset) = version.offset else {
            bytes.fill(0);
            continue;
        };
        let last = row.last().and_then(|(last, _)| last.offset);
        if last.is_some_and(|last| last + PAGE_SIZE != offset) {
            read_row(file, &mut row)?;
        }
        row.push((version, bytes));
    }
    read_row(file, &mut row)
}

fn read_row(
    file: &DirectFile,
    row: &mut Vec<(&PageVersion, &mut [u8])>,
) -> Result<(), (u64, StateFileError)> {
    let Some((page, offset)) = row.first().and_then(|(v, _)| Some((v.page, v.offset?))) else {
        return Ok(());
    };
    let mut buffer = AlignedBuf::new(row.len() * PAGE_SIZE as usize);
    file.read_exact_at("reading memory", buffer.as_mut_slice(), offset)
        .map_err(|error| (page, error))?;
    let pages = buffer.as_slice().chunks(PAGE_SIZE as usize);
    for ((version, target), bytes) in row.drain(..).zip(pages) {
        version.check(bytes).map_err(|problem| (version.page, invalid(file.path())(problem)))?;
        target.copy_from_slice(bytes);
    }
    Ok(())
}
