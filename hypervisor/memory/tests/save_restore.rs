//! Memory goes into a state file and comes back: whole, on demand, or not at all.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use bellwether_memory::*;
use bellwether_statefile::*;
use bellwether_types::{Epoch, VmId};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const PAGE: u64 = PAGE_SIZE;
const LONG: Duration = Duration::from_secs(60);

fn identity() -> Identity {
    Identity { vm_id: VmId::from_uuid(Uuid::from_u128(1)), epoch: Epoch(3), generation: 1 }
}

fn region(start: u64, length: u64) -> MemoryRegion {
    MemoryRegion { start, length }
}

/// The pages of guest memory that are not zero, by address.
type Pages = BTreeMap<u64, Vec<u8>>;

/// Fills a part of the memory: a dense stretch, sparse pages, and pages that are zero again.
fn populate(ram: &GuestRam, seed: u64) -> Pages {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut pages = Pages::new();
    for region in ram.regions() {
        let count = region.length / PAGE;
        for page in 0..count {
            let dense = page < count / 4;
            if !dense && random.random_range(0..10u32) != 0 {
                continue;
            }
            let mut bytes = vec![0; PAGE as usize];
            // Some pages are touched, and zero all the same.
            if random.random_range(0..8u32) != 0 {
                random.fill_bytes(&mut bytes);
            }
            let address = region.start + page * PAGE;
            ram.memory().write_slice(&bytes, GuestAddress(address)).unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                pages.insert(address, bytes);
            }
        }
    }
    pages
}

fn save(directory: &Path, ram: &GuestRam, options: &SaveOptions) -> (SealedFile, SaveStats) {
    let mut writer = StateFileWriter::create(directory, identity(), &ram.regions()).unwrap();
    let stats = save_memory(ram, &mut writer, options).unwrap();
    (writer.seal().unwrap(), stats)
}

fn open(sealed: &SealedFile) -> StateFile {
    let Identity { vm_id, epoch, generation } = identity();
    let expect = Expect { vm_id, epoch, generation: Some(generation), hash: sealed.hash };
    StateFile::open(&sealed.path, &expect).unwrap()
}

fn page_at(ram: &GuestRam, address: u64) -> Vec<u8> {
    let mut bytes = vec![0xaa; PAGE as usize];
    ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn assert_same(ram: &GuestRam, pages: &Pages) {
    for region in ram.regions() {
        for address in (region.start..region.start + region.length).step_by(PAGE as usize) {
            let bytes = page_at(ram, address);
            match pages.get(&address) {
                Some(expected) => assert!(&bytes == expected, "wrong page at {address:#x}"),
                None => assert!(bytes.iter().all(|b| *b == 0), "not zero at {address:#x}"),
            }
        }
    }
}

fn several_regions() -> Vec<MemoryRegion> {
    vec![region(0, 6 * MIB), region(16 * MIB, 3 * PAGE), region(4096 * MIB, 10 * MIB + 5 * PAGE)]
}

fn round_trip(regions: &[MemoryRegion], seed: u64, options: &SaveOptions, lazy: LazyOptions) {
    let directory = tempfile::tempdir().unwrap();
    let ram = GuestRam::with_regions(regions).unwrap();
    let pages = populate(&ram, seed);
    let (sealed, stats) = save(directory.path(), &ram, options);
    assert_eq!(stats.present_pages, pages.len() as u64);
    let target = Arc::new(GuestRam::with_regions(regions).unwrap());
    let restore = LazyRestore::start(Arc::clone(&target), open(&sealed), lazy).unwrap();
    assert_same(&target, &pages);
    restore.wait_done().unwrap();
    let progress = restore.progress();
    assert_eq!(progress.phase, LoadPhase::Complete);
    assert_eq!(progress.loaded_bytes, progress.total_bytes);
    assert_eq!(progress.total_bytes, pages.len() as u64 * PAGE);
    assert_same(&target, &pages);
}

#[test]
fn memory_of_one_region_comes_back_on_demand() {
    round_trip(&[region(0, 32 * MIB)], 1, &SaveOptions::default(), LazyOptions::default());
}

#[test]
fn memory_of_several_regions_comes_back_on_demand() {
    round_trip(&several_regions(), 2, &SaveOptions::default(), LazyOptions::default());
}

#[test]
fn one_thread_and_the_page_cache_do_as_well() {
    let options = SaveOptions { threads: 1, direct: false };
    let lazy = LazyOptions { fault_threads: 1, fill_threads: 1, ..LazyOptions::default() };
    round_trip(&several_regions(), 3, &options, lazy);
}

#[test]
fn without_userfaultfd_all_is_loaded_before_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let ram = GuestRam::with_regions(&several_regions()).unwrap();
    let pages = populate(&ram, 4);
    let (sealed, _) = save(directory.path(), &ram, &SaveOptions::default());
    let target = Arc::new(GuestRam::with_regions(&several_regions()).unwrap());
    let (tell, told) = mpsc::channel();
    let options = LazyOptions {
        userfaultfd: UserfaultSource::Never,
        on_event: Some(Box::new(move |event| tell.send(event).unwrap())),
        ..LazyOptions::default()
    };
    let restore = LazyRestore::start(Arc::clone(&target), open(&sealed), options).unwrap();
    assert!(matches!(restore.mode(), RestoreMode::Eager { reason } if reason == "asked for"));
    assert_eq!(told.recv_timeout(LONG).unwrap(), LazyEvent::Complete);
    assert_eq!(restore.wait_done_for(Duration::ZERO).unwrap().ok(), Some(()));
    assert_same(&target, &pages);
}

#[test]
fn threads_touch_pages_while_they_are_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let regions = [region(0, 24 * MIB), region(4096 * MIB, 24 * MIB)];
    let ram = GuestRam::with_regions(&regions).unwrap();
    let pages = Arc::new(populate(&ram, 5));
    let (sealed, _) = save(directory.path(), &ram, &SaveOptions::default());
    for attempt in 0..3 {
        let target = Arc::new(GuestRam::with_regions(&regions).unwrap());
        let options = LazyOptions { fill_threads: 1 + attempt, ..LazyOptions::default() };
        let restore = LazyRestore::start(Arc::clone(&target), open(&sealed), options).unwrap();
        assert_eq!(restore.mode(), &RestoreMode::OnDemand);
        let toucher = |seed| {
            let (target, pages) = (Arc::clone(&target), Arc::clone(&pages));
            thread::spawn(move || touch(&target, &pages, &regions, seed))
        };
        let touchers: Vec<_> = (0..4).map(toucher).collect();
        touchers.into_iter().for_each(|thread| thread.join().unwrap());
        restore.wait_done().unwrap();
        assert!(restore.progress().faults_loaded > 0 || restore.progress().faults_zero > 0);
        assert_same(&target, &pages);
    }
}

/// Looks at pages in random order and finds each of them right.
fn touch(ram: &GuestRam, pages: &Pages, regions: &[MemoryRegion], seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    for _ in 0..3000 {
        let region = regions[random.random_range(0..regions.len())];
        let address = region.start + random.random_range(0..region.length / PAGE) * PAGE;
        let bytes = page_at(ram, address);
        match pages.get(&address) {
            Some(expected) => assert!(&bytes == expected, "wrong page at {address:#x}"),
            None => assert!(bytes.iter().all(|b| *b == 0), "not zero at {address:#x}"),
        }
    }
}

#[test]
fn what_the_guest_writes_meanwhile_stays() {
    let directory = tempfile::tempdir().unwrap();
    let regions = [region(0, 32 * MIB)];
    let ram = GuestRam::with_regions(&regions).unwrap();
    let mut pages = populate(&ram, 6);
    let (sealed, _) = save(directory.path(), &ram, &SaveOptions::default());
    let target = Arc::new(GuestRam::with_regions(&regions).unwrap());
    let restore =
        LazyRestore::start(Arc::clone(&target), open(&sealed), LazyOptions::default()).unwrap();
    for address in (0..32 * MIB).step_by(37 * PAGE as usize) {
        target.memory().write_obj(0x1122_3344u32, GuestAddress(address + 8)).unwrap();
        let page = pages.entry(address).or_insert_with(|| vec![0; PAGE as usize]);
        page[8..12].copy_from_slice(&0x1122_3344u32.to_le_bytes());
    }
    restore.wait_done().unwrap();
    assert_same(&target, &pages);
}

#[test]
fn a_restored_memory_stays_sparse_and_saves_again() {
    let directory = tempfile::tempdir().unwrap();
    let regions = [region(0, 256 * MIB)];
    let ram = GuestRam::with_regions(&regions).unwrap();
    ram.memory().write_obj(1u8, GuestAddress(200 * MIB)).unwrap();
    let (sealed, stats) = save(directory.path(), &ram, &SaveOptions::default());
    assert_eq!((stats.present_pages, stats.requests), (1, 1));
    let target = Arc::new(GuestRam::with_regions(&regions).unwrap());
    let restore =
        LazyRestore::start(Arc::clone(&target), open(&sealed), LazyOptions::default()).unwrap();
    restore.wait_done().unwrap();
    assert_eq!(target.resident_bytes().unwrap(), PAGE);
    std::fs::remove_file(&sealed.path).unwrap();
    let (_, again) = save(directory.path(), &target, &SaveOptions::default());
    assert_eq!(again.present_pages, 1);
}

/// Damages one byte of the memory in a file, at this guest address of the first region.
fn damage(sealed: &SealedFile, address: u64) {
    let at = StateFile::inspect(&sealed.path).unwrap().header.data_offset + address;
    let file = OpenOptions::new().read(true).write(true).open(&sealed.path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

/// A file of dense memory with damage at 9 MiB and a bit.
fn damaged(directory: &Path) -> (SealedFile, Pages, Vec<MemoryRegion>) {
    let regions = vec![region(0, 64 * MIB)];
    let ram = GuestRam::with_regions(&regions).unwrap();
    let pages = populate(&ram, 7);
    let (sealed, _) = save(directory, &ram, &SaveOptions::default());
    let address = *pages.range(9 * MIB..).next().unwrap().0;
    damage(&sealed, address + 99);
    (sealed, pages, regions)
}

#[test]
fn damage_is_reported_and_its_reader_waits_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, pages, regions) = damaged(directory.path());
    let bad = *pages.range(9 * MIB..).next().unwrap().0;
    let target = Arc::new(GuestRam::with_regions(&regions).unwrap());
    let (tell, told) = mpsc::channel();
    let options = LazyOptions {
        on_event: Some(Box::new(move |event| tell.send(event).unwrap())),
        ..LazyOptions::default()
    };
    let restore = LazyRestore::start(Arc::clone(&target), open(&sealed), options).unwrap();
    let passed = Arc::new(AtomicBool::new(false));
    let reader = {
        let (target, passed) = (Arc::clone(&target), Arc::clone(&passed));
        thread::spawn(move || {
            let _page = page_at(&target, bad);
            passed.store(true, Ordering::SeqCst);
        })
    };
    let event = told.recv_timeout(LONG).unwrap();
    assert!(matches!(&event, LazyEvent::Failed { chunk: Some(36), .. }), "{event:?}");
    let error = restore.wait_done().unwrap_err().to_string();
    assert!(error.contains("chunk 36") && error.contains("bad checksum"), "{error}");
    assert_eq!(restore.progress().phase, LoadPhase::Failed);
    // All other pages are served on and on, long after the reader has asked for the bad one.
    for (address, expected) in pages.iter().filter(|(a, _)| **a / CHUNK_SIZE != 36) {
        assert!(&page_at(&target, *address) == expected);
    }
    drop(restore);
    let end = told.recv_timeout(Duration::from_millis(200));
    assert!(end.is_err(), "one event only");
    assert!(!passed.load(Ordering::SeqCst) && !reader.is_finished());
    let again = StateFileWriter::create(
        directory.path(),
        Identity { generation: 2, ..identity() },
        &target.regions(),
    );
    let refused = save_memory(&target, &mut again.unwrap(), &SaveOptions::default());
    assert!(matches!(refused, Err(SaveError::LoadFailed)));
}

/// A file of dense memory that ends in the middle, as storage does that fails reads: the rest of
/// it, to be put back.
fn cut(directory: &Path) -> (SealedFile, Pages, Vec<MemoryRegion>, StateFile, Vec<u8>) {
    let regions = vec![region(0, 32 * MIB)];
    let ram = GuestRam::with_regions(&regions).unwrap();
    let pages = populate(&ram, 11);
    let (sealed, _) = save(directory, &ram, &SaveOptions::default());
    let file = open(&sealed);
    let whole = std::fs::read(&sealed.path).unwrap();
    let short = OpenOptions::new().write(true).open(&sealed.path).unwrap();
    short.set_len(sealed.len / 8).unwrap();
    (sealed, pages, regions, file, whole)
}

fn mend(sealed: &SealedFile, whole: &[u8]) {
    let file = OpenOptions::new().write(true).open(&sealed.path).unwrap();
    file.write_all_at(whole, 0).unwrap();
}

#[test]
fn a_read_that_fails_for_a_while_is_repeated() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, pages, regions, file, whole) = cut(directory.path());
    let target = Arc::new(GuestRam::with_regions(&regions).unwrap());
    let options = LazyOptions { read_patience: LONG, ..LazyOptions::default() };
    let restore = LazyRestore::start(Arc::clone(&target), file, options).unwrap();
    // It reads on what is there, and asks for the rest again and again.
    assert!(restore.wait_done_for(Duration::from_millis(100)).is_none());
    mend(&sealed, &whole);
    restore.wait_done().unwrap();
    assert_same(&target, &pages);
}

#[test]
fn a_load_that_was_given_up_begins_again_when_it_is_asked_to() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, pages, regions, file, whole) = cut(directory.path());
    let target = Arc::new(GuestRam::with_regions(&regions).unwrap());
    let (tell, told) = mpsc::channel();
    let options = LazyOptions {
        read_patience: Duration::from_millis(20),
        on_event: Some(Box::new(move |event| tell.send(event).unwrap())),
        ..LazyOptions::default()
    };
    let restore = LazyRestore::start(Arc::clone(&target), file, options).unwrap();
    assert!(matches!(told.recv_timeout(LONG).unwrap(), LazyEvent::Failed { .. }));
    // Somebody waits for a page that is not there: a retry serves him too.
    let last = *pages.keys().last().unwrap();
    let reader = {
        let target = Arc::clone(&target);
        thread::spawn(move || page_at(&target, last))
    };
    assert!(restore.retry(|| {}).unwrap(), "it may be tried, and fails again");
    assert!(matches!(told.recv_timeout(LONG).unwrap(), LazyEvent::Failed { .. }));
    mend(&sealed, &whole);
    let mut accepted = false;
    assert!(restore.retry(|| accepted = true).unwrap() && accepted);
    assert_eq!(told.recv_timeout(LONG).unwrap(), LazyEvent::Complete);
    restore.wait_done().unwrap();
    assert_eq!(&reader.join().unwrap(), &pages[&last]);
    assert_same(&target, &pages);
    assert!(!restore.retry(|| panic!("there is nothing to retry")).unwrap());
}

#[test]
fn damage_is_not_retried() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, _, regions) = damaged(directory.path());
    let target = Arc::new(GuestRam::with_regions(&regions).unwrap());
    let restore = LazyRestore::start(target, open(&sealed), LazyOptions::default()).unwrap();
    restore.wait_done().unwrap_err();
    let refused = restore.retry(|| panic!("accepted")).unwrap_err().to_string();
    assert!(refused.contains("bad checksum"), "{refused}");
}

#[test]
fn damage_makes_an_eager_restore_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, _, regions) = damaged(directory.path());
    let target = Arc::new(GuestRam::with_regions(&regions).unwrap());
    let options = LazyOptions { userfaultfd: UserfaultSource::Never, ..LazyOptions::default() };
    let error = LazyRestore::start(target, open(&sealed), options).err().unwrap();
    assert!(matches!(error, RestoreError::Load(_)), "{error}");
}

#[test]
fn memory_under_load_is_not_saved_and_not_loaded_twice() {
    let directory = tempfile::tempdir().unwrap();
    let ram = GuestRam::new(16 * MIB).unwrap();
    let pages = populate(&ram, 8);
    let (sealed, _) = save(directory.path(), &ram, &SaveOptions::default());
    let target = Arc::new(GuestRam::new(16 * MIB).unwrap());
    // So slow that it cannot end: 1 MiB comes at once, the next in a quarter of an hour.
    let options =
        LazyOptions { fill_bytes_per_s_max: Some(1024), fill_threads: 1, ..LazyOptions::default() };
    let restore = LazyRestore::start(Arc::clone(&target), open(&sealed), options).unwrap();
    assert!(restore.wait_done_for(Duration::from_millis(50)).is_none());
    let other = Identity { generation: 2, ..identity() };
    let mut writer = StateFileWriter::create(directory.path(), other, &target.regions()).unwrap();
    let refused = save_memory(&target, &mut writer, &SaveOptions::default());
    assert!(matches!(refused, Err(SaveError::StillLoading)));
    let twice = LazyRestore::start(Arc::clone(&target), open(&sealed), LazyOptions::default());
    assert!(matches!(twice.err(), Some(RestoreError::NotFresh { .. })));
    // The cap holds back the fill, not the faults.
    assert_same(&target, &pages);
    restore.wait_done().unwrap();
}

#[test]
fn other_regions_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let ram = GuestRam::new(4 * MIB).unwrap();
    let (sealed, _) = save(directory.path(), &ram, &SaveOptions::default());
    let other = Arc::new(GuestRam::new(6 * MIB).unwrap());
    let error = LazyRestore::start(Arc::clone(&other), open(&sealed), LazyOptions::default());
    assert!(matches!(error.err(), Some(RestoreError::OtherMemory { .. })));
    let id = Identity { generation: 2, ..identity() };
    let mut writer = StateFileWriter::create(directory.path(), id, &ram.regions()).unwrap();
    let error = save_memory(&other, &mut writer, &SaveOptions::default()).unwrap_err();
    assert!(matches!(error, SaveError::OtherMemory { .. }));
}

#[test]
fn system_calls_on_guest_memory_are_served() {
    let directory = tempfile::tempdir().unwrap();
    let ram = GuestRam::new(16 * MIB).unwrap();
    let pages = populate(&ram, 9);
    let (sealed, _) = save(directory.path(), &ram, &SaveOptions::default());
    let target = Arc::new(GuestRam::new(16 * MIB).unwrap());
    let options = LazyOptions { fill_bytes_per_s_max: Some(1), ..LazyOptions::default() };
    let _restore = LazyRestore::start(Arc::clone(&target), open(&sealed), options).unwrap();
    // A device that writes guest memory to its disk: the kernel itself touches the missing pages.
    let mut disk = tempfile::tempfile().unwrap();
    target.memory().write_all_volatile_to(GuestAddress(0), &mut disk, 16 << 20).unwrap();
    for (address, expected) in &pages {
        let mut bytes = vec![0; PAGE as usize];
        disk.read_exact_at(&mut bytes, *address).unwrap();
        assert!(&bytes == expected);
    }
}
