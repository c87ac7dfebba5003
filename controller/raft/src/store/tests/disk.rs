//! A disk in memory that can stall, fail, and lose power.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use redb::{Database, StorageBackend};

/// A crash image is taken at every so many-th write.
const CRASH_EVERY: u64 = 3;
pub const SECTOR: usize = 512;

#[derive(Clone, Debug)]
pub enum Change {
    Length(u64),
    Write(u64, Vec<u8>),
}

#[derive(Debug, Default)]
struct Contents {
    flushed: Vec<u8>,
    current: Vec<u8>,
    unflushed: Vec<Change>,
    crashes: Vec<Crash>,
    random: u64,
}

/// What a power failure left, and what had been acknowledged before it.
#[derive(Debug)]
pub struct Crash {
    pub disk: Disk,
    pub entries: u64,
    pub term: u64,
}

#[derive(Debug, Default)]
struct Inner {
    contents: Mutex<Contents>,
    stalled: Mutex<bool>,
    resumed: Condvar,
    failing: AtomicBool,
    syncs: AtomicU64,
    writes: AtomicU64,
    entries: AtomicU64,
    term: AtomicU64,
}

#[derive(Clone, Debug, Default)]
pub struct Disk(Arc<Inner>);

impl Disk {
    pub fn open(&self) -> Database {
        Database::builder().create_with_backend(self.clone()).unwrap()
    }

    /// No flush begins until the disk resumes.
    pub fn stall(&self) {
        *self.0.stalled.lock().unwrap() = true;
    }

    pub fn resume(&self) {
        *self.0.stalled.lock().unwrap() = false;
        self.0.resumed.notify_all();
    }

    pub fn fail(&self, failing: bool) {
        self.0.failing.store(failing, Ordering::SeqCst);
    }

    pub fn syncs(&self) -> u64 {
        self.0.syncs.load(Ordering::SeqCst)
    }

    /// So many entries were acknowledged.
    pub fn acknowledge_entry(&self, count: u64) {
        self.0.entries.store(count, Ordering::SeqCst);
    }

    pub fn acknowledge_term(&self, term: u64) {
        self.0.term.store(term, Ordering::SeqCst);
    }

    pub fn crashes(&self) -> Vec<Crash> {
        std::mem::take(&mut self.0.contents.lock().unwrap().crashes)
    }

    fn crash(&self, contents: &mut Contents) {
        let mut image = contents.flushed.clone();
        for change in contents.unflushed.clone() {
            match change {
                Change::Length(length) => apply(&mut image, &Change::Length(length)),
                Change::Write(offset, bytes) => {
                    // Each sector arrived or did not.
                    for (number, sector) in bytes.chunks(SECTOR).enumerate() {
                        if random(&mut contents.random) & 1 == 0 {
                            let at = offset + (number * SECTOR) as u64;
                            apply(&mut image, &Change::Write(at, sector.to_vec()));
                        }
                    }
                }
            }
        }
        let disk = Self::default();
        *disk.0.contents.lock().unwrap() =
            Contents { flushed: image.clone(), current: image, ..Contents::default() };
        let (entries, term) =
            (self.0.entries.load(Ordering::SeqCst), self.0.term.load(Ordering::SeqCst));
        contents.crashes.push(Crash { disk, entries, term });
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let mut contents = self.0.contents.lock().unwrap();
        apply(&mut contents.current, &change);
        contents.unflushed.push(change);
        let writes = self.0.writes.fetch_add(1, Ordering::SeqCst);
        // Only a disk with a workload on it acknowledges anything.
        if self.0.entries.load(Ordering::SeqCst) > 0 && writes.is_multiple_of(CRASH_EVERY) {
            self.crash(&mut contents);
        }
        Ok(())
    }
}

/// SplitMix64.
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(length) => bytes.resize(*length as usize, 0),
        Change::Write(offset, data) => {
            let start = *offset as usize;
            bytes[start..start + data.len()].copy_from_slice(data);
        }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.contents.lock().unwrap().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let contents = self.0.contents.lock().unwrap();
        let start = offset as usize;
        let end = start + out.len();
        let bytes = contents.current.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(Change::Length(length))
    }

    fn sync_data(&self) -> io::Result<()> {
        let stalled = self.0.stalled.lock().unwrap();
        drop(self.0.resumed.wait_while(stalled, |stalled| *stalled).unwrap());
        if self.0.failing.load(Ordering::SeqCst) {
            return Err(io::Error::other("the disk is gone"));
        }
        self.0.syncs.fetch_add(1, Ordering::SeqCst);
        let mut contents = self.0.contents.lock().unwrap();
        for change in std::mem::take(&mut contents.unflushed) {
            apply(&mut contents.flushed, &change);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write(offset, data.to_vec()))
    }
}
