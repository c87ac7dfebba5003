//! Memory that changes while it is written: what comes back is what it was when it stopped.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

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
            log: &NoGuest,
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

    /// Seals, restores into other memory, and gives what is there.
    fn restored(self, lazy: LazyOptions) -> Vec<u8> {
        let Identity { vm_id, epoch, generation } = identity();
        let sealed = self.writer.seal().unwrap();
        let expect = Expect { vm_id, epoch, generation: Some(generation), hash: sealed.hash };
        let file = StateFile::open(&sealed.path, &expect).unwrap();
        let target = Arc::new(GuestRam::with_regions(&self.ram.regions()).unwrap());
        let restore = LazyRestore::start(Arc::clone(&target), file, lazy).unwrap();
        let early = content(&target);
        restore.wait_done().unwrap();
        let Progress { loaded_bytes, total_bytes, .. } = restore.progress();
        assert_eq!(loaded_bytes, total_bytes);
        assert!(early == content(&target), "memory changed while it was loaded");
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
