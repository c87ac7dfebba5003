//! Loading memory before its file is sealed: the destination of a move tails what the source writes.
//!
//! ```text
//! open ---> load pieces, as the source tells of them ---> LazyRestore::start_after(sealed file)
//!   |            a piece that is damaged is left out          compares, takes out what is stale,
//!   \-> discard: memory is fresh again                        loads the rest
//! ```
//!
//! The memory is used by nobody meanwhile. What was loaded counts only if the sealed tables name the
//! same checksums: a chunk its entry, a segment the checksum of its head. A segment that was told and
//! is not in the sealed table spoils its whole round, since it may have overwritten others of it.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use bellwether_statefile::{
    AlignedBuf, CHUNK_SIZE, ChunkEntry, GROUP_CHUNKS, Identity, PAGE_SIZE, PageVersion,
    STRETCH_MAX, Segment, SegmentRef, StateFile, StateFileError, Stretch, TailFile, chunk,
};

use crate::precopy::Piece;
use crate::ram::{Content, GuestRam, RamError};
use crate::restore::{LoadError, RestoreError};

const PAGE: usize = PAGE_SIZE as usize;
/// Threads that load pieces: while some wait for the storage, others sum.
const THREADS: usize = 4;

/// Memory cannot be loaded ahead.
#[derive(Debug, thiserror::Error)]
pub enum AheadError {
    #[error("loading ahead: {0}")]
    File(#[from] StateFileError),
    #[error("loading ahead from {path}: the file has other memory regions than the VM")]
    OtherMemory { path: String },
    #[error("loading ahead: this memory was loaded into before")]
    NotFresh,
    #[error("loading ahead: {0}")]
    Ram(#[from] RamError),
}

/// What a call has loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AheadStats {
    pub bytes: u64,
    /// Pieces that could not be read, or not as they were told; they are read after the seal.
    pub left_out: u64,
}

/// Memory that is being loaded ahead of the seal.
#[derive(Debug)]
pub struct Ahead {
    ram: Arc<GuestRam>,
    file: TailFile,
    placed: Mutex<Placed>,
}

/// What is in memory. Pages are put there under its lock, so that the two always agree.
#[derive(Debug)]
struct Placed {
    /// The entries of the chunks whose pages were put in their places.
    chunks: Vec<Option<ChunkEntry>>,
    /// For each page the later round that was put over it; 0 for none.
    rounds: Vec<u32>,
    segments: HashMap<u64, Segment>,
    /// Those of which somebody else has the heads by now.
    given: Vec<SegmentRef>,
    /// Rounds of which a segment could be put in place only in part.
    torn: HashSet<u32>,
}

impl Ahead {
    /// Opens the unsealed file of exactly this save, for fresh memory with the same regions.
    pub fn open(ram: Arc<GuestRam>, path: &Path, identity: &Identity) -> Result<Self, AheadError> {
        let file = TailFile::open(path, identity)?;
        if file.header().regions != ram.regions() {
            return Err(AheadError::OtherMemory { path: path.display().to_string() });
        }
        if !ram.begin_loading() {
            return Err(AheadError::NotFresh);
        }
        let placed = Placed {
            chunks: vec![None; file.layout().chunk_count() as usize],
            rounds: vec![0; file.layout().page_count() as usize],
            segments: HashMap::new(),
            given: Vec::new(),
            torn: HashSet::new(),
        };
        Ok(Self { ram, file, placed: Mutex::new(placed) })
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    pub fn identity(&self) -> Identity {
        self.file.header().identity
    }

    /// Loads pieces. One that cannot be read is left out, and read when the file is sealed; that is
    /// no error, since nothing depends on it yet. `is_cancelled` ends it early.
    pub fn load(&self, pieces: &[Piece], is_cancelled: &(dyn Fn() -> bool + Sync)) -> AheadStats {
        let mut stats = AheadStats::default();
        // A later round goes over an earlier one, so the rounds come one after the other.
        let round = |piece: &Piece| match piece {
            Piece::Chunks { .. } => 0,
            Piece::Segment(segment) => segment.round,
        };
        for same in pieces.chunk_by(|one, other| round(one) == round(other)) {
            let AheadStats { bytes, left_out } = self.load_round(same, is_cancelled);
            stats.bytes += bytes;
            stats.left_out += left_out;
        }
        stats
    }

    /// Loads pieces of one round on several threads.
    fn load_round(&self, pieces: &[Piece], is_cancelled: &(dyn Fn() -> bool + Sync)) -> AheadStats {
        let (next, done) = (AtomicUsize::new(0), Mutex::new(AheadStats::default()));
        let work = || {
            let mut buffer = AlignedBuf::new((GROUP_CHUNKS * CHUNK_SIZE) as usize);
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                if is_cancelled() {
                    return;
                }
                let loaded = self.load_one(piece, &mut buffer);
                let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                match loaded {
                    Ok(bytes) => done.bytes += bytes,
                    Err(error) => {
                        tracing::debug!(error, "a piece is left out");
                        done.left_out += 1;
                    }
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..THREADS.min(pieces.len()) {
                let builder = thread::Builder::new().name("ram-ahead".to_owned());
                if builder.spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
        done.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a piece is in memory already: whoever tells them begins anew after its own death.
    fn has(&self, piece: &Piece) -> bool {
        let placed = self.placed();
        match piece {
            Piece::Chunks { first, entries } => (0..).zip(entries).all(|(index, entry)| {
                let chunk = first.checked_add(index).and_then(|at| usize::try_from(at).ok());
                let placed = chunk.and_then(|chunk| placed.chunks.get(chunk)?.as_ref());
                placed == Some(entry)
            }),
            Piece::Segment(at) => placed.segments.get(&at.offset).is_some_and(|it| it.at == *at),
        }
    }

    fn load_one(&self, piece: &Piece, buffer: &mut AlignedBuf) -> Result<u64, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        if self.has(piece) {
            return Ok(0);
        }
        match piece {
            Piece::Chunks { first, entries } => {
                self.file.read_chunks(*first, entries, buffer).map_err(|e| text(&e))?;
                let mut placed = self.placed();
                let bytes = buffer.as_slice().chunks(CHUNK_SIZE as usize);
                for ((chunk, entry), bytes) in (*first..).zip(entries).zip(bytes) {
                    self.place_chunk(&mut placed, chunk, entry, bytes).map_err(|e| text(&e))?;
                }
                Ok(entries.iter().map(|entry| entry.page_count() * PAGE_SIZE).sum())
            }
            Piece::Segment(at) => {
                let (segment, data) = self.file.read_segment(at).map_err(|e| text(&e))?;
                self.place_segment(&mut self.placed(), segment, &data).map_err(|e| text(&e))?;
                Ok(data.as_slice().len() as u64)
            }
        }
    }

    /// Puts the pages of a chunk in their places, but for those that a later round has.
    fn place_chunk(
        &self,
        placed: &mut Placed,
        chunk: u64,
        entry: &ChunkEntry,
        bytes: &[u8],
    ) -> Result<(), RamError> {
        let layout = self.file.layout();
        let (Some(place), Some(pages)) = (layout.place(chunk), layout.pages(chunk)) else {
            return Ok(());
        };
        if placed.chunks[chunk as usize].is_some() {
            return Ok(());
        }
        let rounds = &placed.rounds[pages.start as usize..pages.end as usize];
        let newer = rounds.iter().enumerate().filter(|(_, round)| **round != 0);
        let newer = newer.fold(0u64, |all, (page, _)| all | 1 << page);
        for (first, count) in chunk::runs(entry.present & place.full_bitmap() & !newer) {
            let (from, to) = (first * PAGE, (first + count) * PAGE);
            self.ram.copy_in(place.region, place.offset + from as u64, &bytes[from..to])?;
        }
        placed.chunks[chunk as usize] = Some(*entry);
        Ok(())
    }

    /// Puts the pages of a segment in their places, but for those that a later round has.
    fn place_segment(
        &self,
        placed: &mut Placed,
        segment: Segment,
        data: &AlignedBuf,
    ) -> Result<(), RamError> {
        let mut data = data.as_slice().chunks(PAGE);
        // Until all its pages are there.
        let was_torn = !placed.torn.insert(segment.at.round);
        for version in &segment.pages {
            let round = &mut placed.rounds[version.page as usize];
            let bytes = if version.offset.is_some() { data.next() } else { Some(&ZEROS[..]) };
            let place = self.file.layout().page_place(version.page);
            let (Some(bytes), Some((region, offset))) = (bytes, place) else { continue };
            if *round < segment.at.round {
                *round = segment.at.round;
                self.ram.copy_in(region, offset, bytes)?;
            }
        }
        if !was_torn {
            placed.torn.remove(&segment.at.round);
        }
        placed.segments.insert(segment.at.offset, segment);
        Ok(())
    }

    fn placed(&self) -> std::sync::MutexGuard<'_, Placed> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives away the segments that were read, for [`StateFile::open_knowing`]. Who opens a second
    /// file reads their heads anew.
    pub fn take_segments(&mut self) -> HashMap<u64, Segment> {
        let placed = self.placed.get_mut().unwrap_or_else(PoisonError::into_inner);
        let segments = std::mem::take(&mut placed.segments);
        placed.given.extend(segments.values().map(|segment| segment.at));
        segments
    }

    pub(crate) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What of the memory is right by the sealed file.
    pub(crate) fn compare(self, file: &StateFile) -> Compared {
        let placed = self.placed.into_inner().unwrap_or_else(PoisonError::into_inner);
        let sealed: HashMap<u64, SegmentRef> =
            file.segments().iter().map(|segment| (segment.offset, *segment)).collect();
        let read = placed.segments.values().map(|segment| &segment.at).chain(&placed.given);
        let foreign = read.filter(|at| sealed.get(&at.offset) != Some(*at));
        let mut spoiled: HashSet<u32> = foreign.map(|at| at.round).collect();
        spoiled.extend(&placed.torn);
        let chunks = (0..).zip(&placed.chunks).map(|(chunk, loaded)| {
            let (Some(entry), Some(pages)) = (file.chunk(chunk), file.layout().pages(chunk)) else {
                return ChunkState::default();
            };
            let rounds = &placed.rounds[pages.start as usize..pages.end as usize];
            let mut state = ChunkState { want: entry.present, ..ChunkState::default() };
            if let Some(loaded) = loaded {
                state.filled = loaded.present;
                state.good = if *loaded == entry { entry.present } else { 0 };
            }
            // Most chunks are in no later round, and memory is large.
            if !file.is_in_rounds(chunk) && rounds.iter().all(|round| *round == 0) {
                return state;
            }
            for (bit, (page, round)) in pages.zip(rounds).enumerate() {
                state.judge(bit, file.newest(page), *round, &spoiled);
            }
            state
        });
        Compared { chunks: chunks.collect() }
    }

    /// Makes the memory fresh again.
    pub fn discard(self) -> Result<(), AheadError> {
        for (region, place) in self.ram.mapped().iter().enumerate() {
            self.ram.punch(region, 0, place.guest.length)?;
        }
        self.ram.set_content(Content::Whole);
        Ok(())
    }
}

/// The pages of a chunk, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct ChunkState {
    /// Not zero in the sealed file.
    pub(crate) want: u64,
    /// In memory, right or wrong.
    pub(crate) filled: u64,
    /// In memory as in the sealed file.
    pub(crate) good: u64,
}

impl ChunkState {
    /// Looks at one page: its newest version in the sealed file, and the round in memory.
    fn judge(
        &mut self,
        bit: usize,
        newest: Option<&PageVersion>,
        round: u32,
        spoiled: &HashSet<u32>,
    ) {
        if newest.is_none() && round == 0 {
            return;
        }
        let bit = 1u64 << bit;
        let is_good =
            newest.is_some_and(|newest| newest.round == round && !spoiled.contains(&round));
        if round != 0 {
            self.filled |= bit;
        }
        self.good = if is_good { self.good | bit } else { self.good & !bit };
        if let Some(newest) = newest {
            let wanted = if newest.offset.is_some() { bit } else { 0 };
            self.want = self.want & !bit | wanted;
        }
    }

    /// What has to be taken out of memory before anybody sees it.
    pub(crate) fn stale(&self) -> u64 {
        self.filled & !self.good
    }

    pub(crate) fn missing(&self) -> u64 {
        self.want & !self.good
    }
}

/// What loading ahead has achieved, chunk by chunk.
pub(crate) struct Compared {
    pub(crate) chunks: Vec<ChunkState>,
}

impl Compared {
    /// Whether the pages of a chunk are all in memory.
    pub(crate) fn is_there(&self, chunk: u64) -> bool {
        self.chunks.get(chunk as usize).is_some_and(|state| state.missing() == 0)
    }

    pub(crate) fn missing_bytes(&self) -> u64 {
        let pages = self.chunks.iter().map(|state| u64::from(state.missing().count_ones()));
        pages.sum::<u64>() * PAGE_SIZE
    }

    /// Takes pages out of memory that are not those of the file: they are zero or missing then.
    pub(crate) fn take_out_stale(&self, ram: &GuestRam, file: &StateFile) -> Result<(), RamError> {
        self.take_out(ram, file, ChunkState::stale)
    }

    /// The same for those that are zero in the file. The others are overwritten, if what is missing
    /// is loaded at once: a page costs less than taking it out and back.
    pub(crate) fn take_out_zero(&self, ram: &GuestRam, file: &StateFile) -> Result<(), RamError> {
        self.take_out(ram, file, |state| state.stale() & !state.want)
    }

    fn take_out(
        &self,
        ram: &GuestRam,
        file: &StateFile,
        which: impl Fn(&ChunkState) -> u64,
    ) -> Result<(), RamError> {
        let chunks = (0..).zip(&self.chunks).map(|(chunk, state)| (chunk, which(state)));
        for (chunk, pages) in chunks.filter(|(_, pages)| *pages != 0) {
            let Some(place) = file.layout().place(chunk) else { continue };
            for (first, count) in chunk::runs(pages & place.full_bitmap()) {
                let from = place.offset + (first * PAGE) as u64;
                ram.punch(place.region, from, (count * PAGE) as u64)?;
            }
        }
        Ok(())
    }

    /// Loads what is missing, on several threads, into memory that nobody uses yet.
    pub(crate) fn load_missing(
        &self,
        ram: &GuestRam,
        file: &StateFile,
    ) -> Result<(), RestoreError> {
        let parts = self.missing_parts(file);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut buffer = AlignedBuf::new(STRETCH_MAX);
            while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                part.load(ram, file, &mut buffer)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let spawn = |_| {
                let builder = thread::Builder::new().name("ram-rest".to_owned());
                builder.spawn_scoped(scope, work).ok()
            };
            let helpers: Vec<_> = (1..THREADS.min(parts.len())).map_while(spawn).collect();
            let mut outcome = work();
            for helper in helpers {
                let other = helper.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
                outcome = outcome.and(other);
            }
            outcome
        })
    }

    /// What is missing, cut as the file has it: pages of later rounds lie side by side in it that
    /// are far from each other in memory.
    fn missing_parts<'a>(&self, file: &'a StateFile) -> Vec<Part<'a>> {
        let (mut rewritten, mut parts) = (Vec::new(), Vec::new());
        for (chunk, state) in (0..).zip(&self.chunks).filter(|(_, s)| s.missing() != 0) {
            let Some(pages) = file.layout().pages(chunk) else { continue };
            let mut fixed = state.missing();
            for (bit, page) in pages.enumerate() {
                if fixed >> bit & 1 == 1 && file.newest(page).is_some() {
                    rewritten.push(page);
                    fixed &= !(1 << bit);
                }
            }
            if fixed != 0 {
                parts.push(Part::Chunk { chunk, pages: fixed });
            }
        }
        parts.extend(file.stretches(rewritten.into_iter()).into_iter().map(Part::Stretch));
        parts
    }
}

/// What one request reads.
enum Part<'a> {
    /// Pages of the chunk that no later round has.
    Chunk {
        chunk: u64,
        pages: u64,
    },
    Stretch(Stretch<'a>),
}

impl Part<'_> {
    fn load(
        &self,
        ram: &GuestRam,
        file: &StateFile,
        buffer: &mut AlignedBuf,
    ) -> Result<(), RestoreError> {
        let unread = |failure| RestoreError::Load(Arc::new(LoadError::Chunk(failure)));
        let unplaced = |error| RestoreError::Ram(Arc::new(error));
        match self {
            Self::Stretch(stretch) => {
                let mut outcome = Ok(());
                let place = |page, bytes: &[u8]| {
                    let Some((region, offset)) = file.layout().page_place(page) else { return };
                    if let Err(error) = ram.copy_in(region, offset, bytes) {
                        outcome = Err(unplaced(error));
                    }
                };
                file.read_stretch(stretch, buffer, place).map_err(unread)?;
                outcome
            }
            Self::Chunk { chunk, pages } => {
                let Some(place) = file.layout().place(*chunk) else { return Ok(()) };
                file.read_group(*chunk, 1, buffer).map_err(unread)?;
                for (first, count) in chunk::runs(pages & place.full_bitmap()) {
                    let (from, to) = (first * PAGE, (first + count) * PAGE);
                    let bytes = &buffer.as_slice()[from..to];
                    ram.copy_in(place.region, place.offset + from as u64, bytes)
                        .map_err(unplaced)?;
                }
                Ok(())
            }
        }
    }
}

const ZEROS: [u8; PAGE] = [0; PAGE];
