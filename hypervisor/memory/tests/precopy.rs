//! Memory that changes while it is written: what comes back is what it was when it stopped.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use bellwether_memory::*;
use bellwether_statefile::*;
use bellwether_types::{Epoch, VmId};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use tempfile::TempDir;
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const PAGE: u64 = PAGE_SIZE;

/// Nobody but the VMM writes: what changed is in the bit map of guest memory.
struct NoGuest;

impl DirtyLog for NoGuest {
    fn collect(&self, _: usize, _: &mut [u64]) -> io::Result<()> {
        Ok(())
    }

    fn clear(&self, _: usize, _: usize, _: &[u64]) -> io::Result<()> {
        Ok(())
    }
}

fn identity() -> Identity {
    Identity { vm_id: VmId::from_uuid(Uuid::from_u128(1)), epoch: Epoch(3), generation: 1 }
}

/// Three regions, the last chunk of two of them short.
fn ram() -> Arc<GuestRam> {
    let region = |start, length| MemoryRegion { start, length };
    let regions =
        [region(0, 6 * MIB), region(16 * MIB, 3 * PAGE), region(4096 * MIB, 4 * MIB + 5 * PAGE)];
    Arc::new(GuestRam::with_regions(&regions).unwrap())
}

fn addresses(ram: &GuestRam) -> Vec<u64> {
    let pages =
        |region: MemoryRegion| (region.start..region.start + region.length).step_by(PAGE as usize);
    ram.regions().into_iter().flat_map(pages).collect()
}

/// Writes random pages, parts of pages, and zeros.
fn scribble(ram: &GuestRam, random: &mut SmallRng, count: usize) {
    let addresses = addresses(ram);
    for _ in 0..count {
        let mut bytes = vec![0; PAGE as usize];
        let address = addresses[random.random_range(0..addresses.len())];
        match random.random_range(0..4u32) {
            0 => {}
            1 => bytes.truncate(random.random_range(1..64)),
            _ => random.fill_bytes(&mut bytes),
        }
        ram.memory().write_slice(&bytes, GuestAddress(address)).unwrap();
    }
}

fn content(ram: &GuestRam) -> Vec<u8> {
    let mut all = Vec::new();
    for address in addresses(ram) {
        let mut bytes = vec![0xaa; PAGE as usize];
        ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        all.extend(bytes);
    }
    all
}

/// A pre-copy by hand.
struct Copying {
    _directory: TempDir,
    ram: Arc<GuestRam>,
    writer: StateFileWriter,
    set: PageSet,
    round: u32,
    stop: StopSignal,
    pieces: Mutex<Vec<Piece>>,
}

impl Copying {
    fn new(ram: Arc<GuestRam>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let writer =
            StateFileWriter::create_with_rounds(directory.path(), identity(), &ram.regions());
        Self {
            writer: writer.unwrap(),
            _directory: directory,
            set: PageSet::empty(&ram),
            ram,
            round: 0,
            stop: StopSignal::default(),
            pieces: Mutex::default(),
        }
    }

    fn copy<T>(
        &mut self,
        work: impl FnOnce(&Copier<'_>, &StateFileWriter, &mut PageSet) -> T,
    ) -> T {
        let on_piece = |piece| self.pieces.lock().unwrap().push(piece);
        let copier = Copier {
            ram: &self.ram,
            log: Some(&NoGuest),
            threads: 3,
            rate: None,
            stop: &self.stop,
            on_piece: Some(&on_piece),
        };
        work(&copier, &self.writer, &mut self.set)
    }

    fn round_zero(&mut self) -> RoundStats {
        let stats = self.copy(|copier, writer, _| copier.round_zero(writer)).unwrap();
        self.writer.freeze_fixed().unwrap();
        stats
    }

    fn next_round(&mut self) -> RoundStats {
        self.round += 1;
        let round = self.round;
        collect_dirty(&self.ram, &NoGuest, &mut self.set).unwrap();
        self.copy(|copier, writer, set| copier.round(writer, round, set)).unwrap()
    }

    /// Memory of a destination that tails the file.
    fn ahead(&self) -> (Arc<GuestRam>, Ahead) {
        let target = Arc::new(GuestRam::with_regions(&self.ram.regions()).unwrap());
        let ahead = Ahead::open(Arc::clone(&target), self.writer.path(), &identity()).unwrap();
        (target, ahead)
    }

    /// The pieces that came since this was asked last.
    fn take_pieces(&self) -> Vec<Piece> {
        std::mem::take(&mut self.pieces.lock().unwrap())
    }

    /// Seals, restores into other memory, and gives what is there.
    fn restored(self, lazy: LazyOptions) -> Vec<u8> {
        let target = Arc::new(GuestRam::with_regions(&self.ram.regions()).unwrap());
        self.restored_into(&Arc::clone(&target), HashMap::new(), |file| {
            LazyRestore::start(target, file, lazy)
        })
    }

    /// The same into memory that was loaded ahead; also how it came.
    fn restored_after(self, target: &GuestRam, ahead: Ahead) -> Vec<u8> {
        self.restored_by(target, ahead, LazyOptions::default())
    }

    fn restored_by(self, target: &GuestRam, mut ahead: Ahead, lazy: LazyOptions) -> Vec<u8> {
        let known = ahead.take_segments();
        self.restored_into(target, known, |file| LazyRestore::start_after(ahead, file, lazy))
    }

    fn restored_into(
        self,
        target: &GuestRam,
        known: HashMap<u64, Segment>,
        start: impl FnOnce(StateFile) -> Result<LazyRestore, RestoreError>,
    ) -> Vec<u8> {
        let Identity { vm_id, epoch, generation } = identity();
        let sealed = self.writer.seal().unwrap();
        let expect = Expect { vm_id, epoch, generation: Some(generation), hash: sealed.hash };
        let file = StateFile::open_knowing(&sealed.path, &expect, known).unwrap();
        let restore = start(file).unwrap();
        let early = content(target);
        restore.wait_done().unwrap();
        let Progress { loaded_bytes, total_bytes, .. } = restore.progress();
        assert_eq!(loaded_bytes, total_bytes);
        assert!(early == content(target), "memory changed while it was loaded");
        early
    }
}

#[test]
fn the_restored_memory_is_the_stopped_memory_byte_for_byte() {
    for seed in 0..12 {
        let mut random = SmallRng::seed_from_u64(seed);
        let ram = ram();
        scribble(&ram, &mut random, 900);
        let mut copying = Copying::new(Arc::clone(&ram));
        assert!(copying.round_zero().is_whole);
        for _ in 0..random.random_range(0..5u32) {
            let count = random.random_range(0..600);
            scribble(&ram, &mut random, count);
            assert!(copying.next_round().is_whole);
        }
        let userfaultfd = match seed % 3 {
            0 => UserfaultSource::Never,
            _ => UserfaultSource::Open,
        };
        let lazy = LazyOptions { userfaultfd, ..LazyOptions::default() };
        assert!(copying.restored(lazy) == content(&ram), "seed {seed}");
    }
}

#[test]
fn what_is_written_during_the_rounds_is_found() {
    for seed in 100..104 {
        let ram = ram();
        scribble(&ram, &mut SmallRng::seed_from_u64(seed), 1500);
        let mut copying = Copying::new(Arc::clone(&ram));
        let (done, written) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            for writer in 0..2 {
                let (ram, done, written) = (&ram, &done, &written);
                scope.spawn(move || {
                    let mut random = SmallRng::seed_from_u64(seed * 10 + writer);
                    while !done.load(Ordering::SeqCst) {
                        scribble(ram, &mut random, 20);
                        written.fetch_add(20, Ordering::SeqCst);
                    }
                });
            }
            copying.round_zero();
            for _ in 0..6 {
                // Each round has something to find.
                let before = written.load(Ordering::SeqCst);
                while written.load(Ordering::SeqCst) < before + 100 {
                    thread::yield_now();
                }
                assert!(copying.next_round().pages > 0);
            }
            done.store(true, Ordering::SeqCst);
        });
        copying.next_round();
        assert!(copying.restored(LazyOptions::default()) == content(&ram), "seed {seed}");
    }
}

#[test]
fn a_round_that_was_stopped_gives_back_what_it_did_not_write() {
    let ram = ram();
    scribble(&ram, &mut SmallRng::seed_from_u64(7), 900);
    let mut copying = Copying::new(Arc::clone(&ram));
    copying.round_zero();
    scribble(&ram, &mut SmallRng::seed_from_u64(8), 900);
    copying.stop.set();
    let stopped = copying.next_round();
    assert!(!stopped.is_whole && stopped.pages == 0);
    let left = copying.set.count();
    assert!(left > 300, "{left}");
    copying.stop = StopSignal::default();
    let whole = copying.next_round();
    assert_eq!((whole.pages, whole.is_whole, copying.set.count()), (left, true, 0));
    assert!(copying.restored(LazyOptions::default()) == content(&ram));
}

#[test]
fn untouched_memory_stays_untouched() {
    let ram = Arc::new(GuestRam::new(256 * MIB).unwrap());
    ram.memory().write_obj(1u8, GuestAddress(200 * MIB)).unwrap();
    let mut copying = Copying::new(Arc::clone(&ram));
    let stats = copying.round_zero();
    assert_eq!((stats.pages, stats.bytes), (1, PAGE));
    assert_eq!(ram.resident_bytes().unwrap(), PAGE, "a copy must not allocate holes");
    assert_eq!(copying.pieces.lock().unwrap().len(), 1);
    assert_eq!(copying.next_round().pages, 0);
}

#[test]
fn a_file_for_other_memory_is_refused() {
    let ram = ram();
    scribble(&ram, &mut SmallRng::seed_from_u64(9), 900);
    let other = GuestRam::new(4 * MIB).unwrap();
    let mut copying = Copying::new(Arc::new(other));
    copying.ram = ram;
    let refused = copying.copy(|copier, writer, _| copier.round_zero(writer)).unwrap_err();
    assert!(matches!(refused, PreCopyError::OtherMemory { .. }), "{refused}");
}

fn never() -> bool {
    false
}

#[test]
fn a_destination_that_tails_has_the_stopped_memory_byte_for_byte() {
    for seed in 200..212 {
        let mut random = SmallRng::seed_from_u64(seed);
        let ram = ram();
        scribble(&ram, &mut random, 900);
        let mut copying = Copying::new(Arc::clone(&ram));
        copying.round_zero();
        let (target, ahead) = copying.ahead();
        let mut told = Vec::new();
        for _ in 0..random.random_range(1..5u32) {
            let count = random.random_range(0..600);
            scribble(&ram, &mut random, count);
            copying.next_round();
            told.extend(copying.take_pieces());
            // Some of the pieces, some of them twice, now and then an old one after a new one.
            let heard: Vec<_> =
                told.iter().filter(|_| random.random_range(0..3u32) != 0).cloned().collect();
            let stats = ahead.load(&heard, &never);
            assert_eq!(stats.left_out, 0);
            told.retain(|_| random.random_range(0..4u32) == 0);
        }
        scribble(&ram, &mut random, 50);
        copying.next_round();
        assert!(copying.restored_after(&target, ahead) == content(&ram), "seed {seed}");
    }
}

#[test]
fn what_was_told_wrongly_is_left_out() {
    let ram = ram();
    scribble(&ram, &mut SmallRng::seed_from_u64(20), 900);
    let mut copying = Copying::new(Arc::clone(&ram));
    copying.round_zero();
    scribble(&ram, &mut SmallRng::seed_from_u64(21), 300);
    copying.next_round();
    let (target, ahead) = copying.ahead();
    let mut pieces = copying.take_pieces();
    for piece in &mut pieces {
        match piece {
            Piece::Chunks { entries, .. } => entries[0].checksum ^= 1,
            Piece::Segment(segment) => segment.checksum ^= 1,
        }
    }
    pieces.push(Piece::Chunks { first: u64::MAX, entries: vec![ChunkEntry::default(); 9] });
    pieces.push(Piece::Segment(SegmentRef { offset: 1 << 40, round: 7, pages: 9, checksum: 1 }));
    let stats = ahead.load(&pieces, &never);
    assert_eq!((stats.bytes, stats.left_out), (0, pieces.len() as u64));
    assert_eq!(target.resident_bytes().unwrap(), 0);
    assert!(copying.restored_after(&target, ahead) == content(&ram));
}

/// The worst that can be told: all of it is well-formed, and belongs to a file that is not the one
/// that was sealed.
#[test]
fn nothing_of_a_file_that_was_not_sealed_comes_through() {
    for seed in 300..306 {
        let mut random = SmallRng::seed_from_u64(seed);
        let (other, ram) = (ram(), ram());
        let mut wrong = Copying::new(Arc::clone(&other));
        let mut copying = Copying::new(Arc::clone(&ram));
        for (ram, copying) in [(&other, &mut wrong), (&ram, &mut copying)] {
            scribble(ram, &mut random, 900);
            copying.round_zero();
            for _ in 0..3 {
                scribble(ram, &mut random, 200);
                copying.next_round();
            }
        }
        let (target, ahead) = wrong.ahead();
        assert_eq!(ahead.load(&wrong.take_pieces(), &never).left_out, 0);
        assert!(copying.restored_after(&target, ahead) == content(&ram), "seed {seed}");
    }
}

/// Loaded before the start, and, where it is too much for that, on demand.
#[test]
fn what_is_missing_comes_and_stale_pages_do_not_stay() {
    for at_once_bytes_max in [u64::MAX, 32 << 20, 0] {
        stale_pages_do_not_stay(at_once_bytes_max);
    }
}

fn stale_pages_do_not_stay(at_once_bytes_max: u64) {
    let ram = Arc::new(GuestRam::new(96 * MIB).unwrap());
    let mut random = SmallRng::seed_from_u64(30);
    let mut block = vec![0; MIB as usize];
    let mut fill = |from: u64, to: u64| {
        for at in from..to {
            random.fill_bytes(&mut block);
            ram.memory().write_slice(&block, GuestAddress(at * MIB)).unwrap();
        }
    };
    fill(0, 96);
    let mut copying = Copying::new(Arc::clone(&ram));
    copying.round_zero();
    let (target, ahead) = copying.ahead();
    ahead.load(&copying.take_pieces(), &never);
    // Half of what was loaded becomes stale, and some of it zero.
    fill(20, 68);
    for at in 60..64 {
        ram.memory().write_slice(&vec![0; MIB as usize], GuestAddress(at * MIB)).unwrap();
    }
    copying.next_round();
    let lazy = LazyOptions { at_once_bytes_max, ..LazyOptions::default() };
    assert!(copying.restored_by(&target, ahead, lazy) == content(&ram));
}

#[test]
fn memory_that_was_loaded_ahead_can_be_made_fresh() {
    let ram = ram();
    scribble(&ram, &mut SmallRng::seed_from_u64(40), 900);
    let mut copying = Copying::new(Arc::clone(&ram));
    copying.round_zero();
    let (target, ahead) = copying.ahead();
    assert!(ahead.load(&copying.take_pieces(), &never).bytes > MIB);
    let twice = Ahead::open(Arc::clone(&target), copying.writer.path(), &identity());
    assert!(matches!(twice.err(), Some(AheadError::NotFresh)));
    ahead.discard().unwrap();
    assert_eq!(target.resident_bytes().unwrap(), 0);
    let ahead = Ahead::open(Arc::clone(&target), copying.writer.path(), &identity()).unwrap();
    assert!(copying.restored_after(&target, ahead) == content(&ram));
}
