//! A block device in memory that fails at one chosen operation.
//!
//! Operations are writes, changes of length and flushes, counted from 0. What was written and not
//! flushed may be there after a power failure or not, sector by sector. A flush that fails is the
//! last that anybody hears of what it was to flush: Linux takes the pages for clean then, so a
//! later flush succeeds without them.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::StorageBackend;

use super::disk::{Change, SECTOR, apply, random};

/// What goes wrong at the chosen operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It fails without an effect, and everything after it succeeds.
    Once,
    /// A write arrives in part and is reported as failed.
    Torn,
    /// The device is gone from there on: a power failure, as the process sees it.
    Forever,
    /// From there on every read fails, and nothing else.
    Reads,
}

#[derive(Debug, Default)]
struct Inner {
    /// What a flush has confirmed.
    durable: Vec<u8>,
    /// What a read sees.
    current: Vec<u8>,
    /// Written since the last flush that succeeded, or part of a flush that failed.
    unflushed: Vec<Change>,
    lost: Vec<Change>,
    operations: u64,
    fault: Option<(u64, Fault)>,
    failed: bool,
}

/// A handle to the device; clones are the same device.
#[derive(Clone, Debug, Default)]
pub struct Device(Arc<Mutex<Inner>>);

impl Device {
    /// A device with these contents.
    pub fn holding(image: &[u8]) -> Self {
        let inner = Inner { durable: image.to_vec(), current: image.to_vec(), ..Inner::default() };
        Self(Arc::new(Mutex::new(inner)))
    }

    /// The device fails at an operation from now.
    pub fn fail_at(&self, operation: u64, fault: Fault) {
        let mut inner = self.inner();
        inner.fault = Some((inner.operations + operation, fault));
    }

    pub fn operations(&self) -> u64 {
        self.inner().operations
    }

    /// Whether the chosen operation has come.
    pub fn has_failed(&self) -> bool {
        self.inner().failed
    }

    /// What the device may hold after a power failure now: what was flushed, with nothing, all, or
    /// some sectors of the rest.
    pub fn after_power_failure(&self, seed: u64) -> Vec<Vec<u8>> {
        let inner = self.inner();
        let rest: Vec<&Change> = inner.lost.iter().chain(&inner.unflushed).collect();
        let mut chance = seed;
        let mut images = vec![inner.durable.clone()];
        if rest.is_empty() {
            return images;
        }
        let some = u64::MAX / 8 * (2 + random(&mut chance) % 5);
        for odds in [u64::MAX, some] {
            let mut image = inner.durable.clone();
            for change in &rest {
                for part in sectors(change) {
                    let is_length = matches!(part, Change::Length(_));
                    if is_length || odds == u64::MAX || random(&mut chance) <= odds {
                        apply(&mut image, &part);
                    }
                }
            }
            images.push(image);
        }
        images.dedup();
        images
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }
}

fn sectors(change: &Change) -> Vec<Change> {
    match change {
        Change::Length(length) => vec![Change::Length(*length)],
        Change::Write(offset, bytes) => bytes
            .chunks(SECTOR)
            .enumerate()
            .map(|(number, sector)| {
                Change::Write(offset + (number * SECTOR) as u64, sector.to_vec())
            })
            .collect(),
    }
}

impl Inner {
    /// Counts an operation, and says how it fails.
    fn operate(&mut self) -> Option<Fault> {
        let number = self.operations;
        self.operations += 1;
        let (at, fault) = self.fault?;
        let fails = match fault {
            Fault::Forever => number >= at,
            Fault::Once | Fault::Torn => number == at,
            Fault::Reads => false,
        };
        self.failed |= fails;
        fails.then_some(fault)
    }

    fn change(&mut self, change: Change) -> io::Result<()> {
        let Some(fault) = self.operate() else {
            apply(&mut self.current, &change);
            self.unflushed.push(change);
            return Ok(());
        };
        if let (Fault::Torn, Change::Write(offset, mut bytes)) = (fault, change) {
            bytes.truncate((bytes.len() / 2).next_multiple_of(SECTOR).min(bytes.len()));
            let part = Change::Write(offset, bytes);
            apply(&mut self.current, &part);
            self.unflushed.push(part);
        }
        Err(broken())
    }
}

fn broken() -> io::Error {
    // EIO.
    io::Error::from_raw_os_error(5)
}

impl StorageBackend for Device {
    fn len(&self) -> io::Result<u64> {
        Ok(self.inner().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut inner = self.inner();
        if let Some((at, fault)) = inner.fault {
            let gone = matches!(fault, Fault::Forever | Fault::Reads) && inner.operations >= at;
            inner.failed |= gone;
            if gone {
                return Err(broken());
            }
        }
        let start = offset as usize;
        let end = start + out.len();
        let bytes = inner.current.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.inner().change(Change::Length(length))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut inner = self.inner();
        let changes = std::mem::take(&mut inner.unflushed);
        if inner.operate().is_some() {
            inner.lost.extend(changes);
            return Err(broken());
        }
        for change in changes {
            apply(&mut inner.durable, &change);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner().change(Change::Write(offset, data.to_vec()))
    }
}
