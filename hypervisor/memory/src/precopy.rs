//! Writing guest memory into a state file while the guest runs, round after round.
//!
//! ```text
//! round 0   for each MiB:     clear the log -> copy -> sum -> write at its fixed place
//! round n   collect the log;  for each segment: clear its pages -> copy -> sum -> append
//! residue   the same with the guest stopped
//! ```
//!
//! **Clear, then copy**: what is written after the clearing is noted again, whether the copy has it
//! or not. **Copy, then sum**: the guest writes on, so only a copy has a checksum that stays right.
//! A round that is stopped in the middle gives back the pages that it did not come to.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bellwether_statefile::{
    AlignedBuf, CHUNK_SIZE, ChunkEntry, GROUP_CHUNKS, Layout, PAGE_SIZE, SEGMENT_PAGES_MAX,
    SegmentBuffer, SegmentRef, StateFileError, StateFileWriter,
};

use crate::dirty::{DirtyLog, PageSet};
use crate::pace::{RateLimit, StopSignal};
use crate::ram::{Content, GuestRam, RamError};

/// Segments that are smaller than this are not worth a thread of their own: 1 MiB.
const SEGMENT_PAGES_MIN: usize = 256;

/// A pre-copy of guest memory failed; the file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum PreCopyError {
    #[error("pre-copy: guest memory is still being loaded from its own state file; wait for that")]
    StillLoading,
    #[error("pre-copy: the load of guest memory has failed, so there is no whole memory to save")]
    LoadFailed,
    #[error("pre-copy: state file {path} was made for other memory regions")]
    OtherMemory { path: String },
    #[error("pre-copy: {0}")]
    File(#[from] StateFileError),
    #[error("pre-copy: {0}")]
    Ram(#[from] RamError),
    #[error("pre-copy: the log of dirty pages: {0}")]
    Log(#[source] io::Error),
}

/// A piece of the file that is complete, as a reader who tails it has to know it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Piece {
    /// Chunks in a row of one region.
    Chunks {
        first: u64,
        entries: Vec<ChunkEntry>,
    },
    Segment(SegmentRef),
}

/// Hears of pieces, from several threads.
pub type PieceSink<'a> = &'a (dyn Fn(Piece) + Sync);

/// How to copy.
pub struct Copier<'a> {
    pub ram: &'a GuestRam,
    /// The log to clear before each copy; none where nobody writes any more.
    pub log: Option<&'a dyn DirtyLog>,
    /// Threads, at least one.
    pub threads: usize,
    pub rate: Option<&'a RateLimit>,
    /// Ends a round early.
    pub stop: &'a StopSignal,
    /// Who tails the file, if somebody does.
    pub on_piece: Option<PieceSink<'a>>,
}

/// What a round has written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RoundStats {
    /// The pages that it was about, those of zeros included.
    pub pages: u64,
    pub bytes: u64,
    /// How long the threads worked, on average; waits for the rate limit do not count.
    pub busy: Duration,
    /// False if it was stopped before its end.
    pub is_whole: bool,
}

impl Copier<'_> {
    /// Writes all memory to its fixed places. Returns when it is written, not when it is durable. A
    /// round 0 that was stopped is not whole, and the file is of no use.
    pub fn round_zero(&self, writer: &StateFileWriter) -> Result<RoundStats, PreCopyError> {
        match self.ram.content() {
            Content::Whole => {}
            Content::Loading => return Err(PreCopyError::StillLoading),
            Content::Failed => return Err(PreCopyError::LoadFailed),
        }
        if Layout::new(&self.ram.regions()).as_ref() != Ok(writer.layout()) {
            return Err(PreCopyError::OtherMemory { path: writer.path().display().to_string() });
        }
        let before = writer.counts().bytes;
        // What the VMM wrote until now is in memory, and in the copy.
        (0..self.ram.mapped().len()).for_each(|region| drop(self.ram.take_own_writes(region)));
        let groups = groups(writer.layout());
        let (next, pages) = (Progress::default(), AtomicU64::new(0));
        self.run_threads(|| {
            let mut buffer = AlignedBuf::new((GROUP_CHUNKS * CHUNK_SIZE) as usize);
            self.take_each(&next, &groups, |group| {
                let written = self.copy_group(writer, group, &mut buffer)?;
                pages.fetch_add(written, Ordering::Relaxed);
                Ok(written * PAGE_SIZE)
            })
        })?;
        Ok(RoundStats {
            pages: pages.into_inner(),
            bytes: writer.counts().bytes - before,
            busy: next.busy(self.threads),
            is_whole: next.taken() >= groups.len(),
        })
    }

    /// Appends these pages as round `round`, and takes those out of the set that it came to.
    pub fn round(
        &self,
        writer: &StateFileWriter,
        round: u32,
        set: &mut PageSet,
    ) -> Result<RoundStats, PreCopyError> {
        let pages: Vec<u64> = set.pages().collect();
        let share = pages.len().div_ceil(self.threads.max(1));
        let share = share.clamp(SEGMENT_PAGES_MIN, SEGMENT_PAGES_MAX);
        let parts: Vec<&[u64]> = pages.chunks(share).collect();
        let (next, bytes) = (Progress::default(), AtomicU64::new(0));
        self.run_threads(|| {
            let mut buffer = SegmentBuffer::new();
            self.take_each(&next, &parts, |part| {
                let written = self.copy_segment(writer, round, set, part, &mut buffer)?;
                bytes.fetch_add(written, Ordering::Relaxed);
                Ok(written)
            })
        })?;
        let done = next.taken().min(parts.len());
        *set = PageSet::empty(self.ram);
        parts[done..].iter().copied().flatten().for_each(|page| set.insert(*page));
        let pages = parts[..done].iter().map(|part| part.len() as u64).sum();
        let (bytes, busy) = (bytes.into_inner(), next.busy(self.threads));
        Ok(RoundStats { pages, bytes, busy, is_whole: done == parts.len() })
    }

    /// Does the work on several threads; the first error of any is the result.
    fn run_threads(
        &self,
        work: impl Fn() -> Result<(), PreCopyError> + Sync,
    ) -> Result<(), PreCopyError> {
        thread::scope(|scope| {
            let spawn = |_| {
                let builder = thread::Builder::new().name("pre-copy".to_owned());
                builder.spawn_scoped(scope, &work).ok()
            };
            let helpers: Vec<_> = (1..self.threads).map_while(spawn).collect();
            let mut outcome = work();
            for helper in helpers {
                let other = helper.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
                outcome = outcome.and(other);
            }
            outcome
        })
    }

    /// Takes items until none is left, the copy is stopped, or one fails. The work says how many
    /// bytes it wrote; the rate holds back the next item.
    fn take_each<T>(
        &self,
        progress: &Progress,
        items: &[T],
        mut work: impl FnMut(&T) -> Result<u64, PreCopyError>,
    ) -> Result<(), PreCopyError> {
        while !self.stop.is_set() {
            let Some(item) = items.get(progress.next.fetch_add(1, Ordering::Relaxed)) else {
                break;
            };
            let begun = Instant::now();
            let outcome = work(item);
            progress.busy_ns.fetch_add(begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
            match outcome {
                // What was begun is done: a stop only ends the waiting.
                Ok(bytes) => {
                    let _stopped = self.rate.is_some_and(|rate| !rate.take(bytes, self.stop));
                }
                Err(error) => {
                    progress.next.store(items.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn copy_group(
        &self,
        writer: &StateFileWriter,
        group: &Group,
        buffer: &mut AlignedBuf,
    ) -> Result<u64, PreCopyError> {
        let words = vec![u64::MAX; group.length.div_ceil(CHUNK_SIZE) as usize];
        let first_word = (group.offset / CHUNK_SIZE) as usize;
        self.clear(group.region, first_word, &words).map_err(PreCopyError::Log)?;
        let start = self.ram.mapped()[group.region].file_offset + group.offset;
        let data = self.ram.next_data(start)?;
        if data.is_none_or(|data| data >= start + group.length) {
            return Ok(0);
        }
        let bytes = &mut buffer.as_mut_slice()[..group.length as usize];
        self.ram.copy_out(group.region, group.offset, bytes)?;
        let pages = writer.memory().write_group(group.first_chunk, bytes)?;
        let chunks = group.first_chunk..group.first_chunk + words.len() as u64;
        self.tell(writer, || {
            let entries = chunks.filter_map(|chunk| writer.chunk_entry(chunk)).collect();
            Piece::Chunks { first: group.first_chunk, entries }
        })?;
        Ok(pages)
    }

    fn copy_segment(
        &self,
        writer: &StateFileWriter,
        round: u32,
        set: &PageSet,
        pages: &[u64],
        buffer: &mut SegmentBuffer,
    ) -> Result<u64, PreCopyError> {
        set.words_of(pages, |region, first, words| self.clear(region, first, words))
            .map_err(PreCopyError::Log)?;
        buffer.clear();
        let layout = writer.layout();
        let mut outcome = Ok(());
        for page in pages {
            let Some((region, offset)) = layout.page_place(*page) else { continue };
            buffer.push(*page, |bytes| {
                if let Err(error) = self.ram.copy_out(region, offset, bytes) {
                    outcome = Err(error);
                }
            });
        }
        outcome?;
        let segment = writer.memory().append(round, buffer)?;
        self.tell(writer, || Piece::Segment(segment))?;
        Ok(pages.len() as u64 * PAGE_SIZE)
    }

    fn clear(&self, region: usize, first: usize, words: &[u64]) -> io::Result<()> {
        self.log.map_or(Ok(()), |log| log.clear(region, first, words))
    }

    /// Tells of a piece, once another host can read it.
    fn tell(
        &self,
        writer: &StateFileWriter,
        piece: impl FnOnce() -> Piece,
    ) -> Result<(), PreCopyError> {
        if let Some(on_piece) = self.on_piece {
            writer.publish()?;
            on_piece(piece());
        }
        Ok(())
    }
}

/// How far the threads of a round have come.
#[derive(Default)]
struct Progress {
    /// The first item that nobody has taken; more than there are in the end.
    next: AtomicUsize,
    busy_ns: AtomicU64,
}

impl Progress {
    fn taken(&self) -> usize {
        self.next.load(Ordering::Relaxed)
    }

    fn busy(&self, threads: usize) -> Duration {
        let total = Duration::from_nanos(self.busy_ns.load(Ordering::Relaxed));
        total / u32::try_from(threads.max(1)).unwrap_or(1)
    }
}

/// A stretch of one region, at most [`GROUP_CHUNKS`] chunks, that starts with a chunk.
struct Group {
    region: usize,
    offset: u64,
    length: u64,
    first_chunk: u64,
}

/// All memory in stretches of 1 MiB.
fn groups(layout: &Layout) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for chunk in 0..layout.chunk_count() {
        let Some(place) = layout.place(chunk) else { break };
        match groups.last_mut() {
            Some(group)
                if group.region == place.region && group.length < GROUP_CHUNKS * CHUNK_SIZE =>
            {
                group.length += place.length;
            }
            _ => groups.push(Group {
                region: place.region,
                offset: place.offset,
                length: place.length,
                first_chunk: chunk,
            }),
        }
    }
    groups
}
