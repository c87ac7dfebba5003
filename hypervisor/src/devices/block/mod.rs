//! The virtio block device (virtio 1.2, 5.2) on a raw disk.
//!
//! One worker thread a disk serves one request at a time: it waits for the doorbell, takes a
//! request, does it, and puts it into the used ring. So a worker that is not inside a request has
//! nothing outstanding, and *drained* means that it has parked.
//!
//! | who | owns | when it stops |
//! |---|---|---|
//! | transport | negotiation | never |
//! | worker | the queue while it serves one request | between requests, when the gate closes |
//! | [`Block::save`] | the queue of a parked worker | |

mod disk;
mod request;
mod saved;
mod worker;

pub use disk::{Caching, Disk, DiskError, SECTOR_BYTES};
pub use request::{Parsed, Request, RequestError, RequestKind, parse};
pub use saved::BlockV1;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::virtio::{FEATURE_INDIRECT, FEATURE_VERSION_1, Link, PIECES_MAX, QueueV1, VirtioDevice};
use crate::GuestMemory;
use crate::gate::Gate;

const QUEUE_SIZES: [u16; 1] = [256];
const DEVICE_TYPE: u16 = 2;
/// Mass storage, SCSI: what drivers expect of virtio-blk.
const PCI_CLASS: u32 = 0x01_0000;

const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;

/// A driver's queue and what it negotiated.
struct Active {
    queue: Queue,
    /// Without it each write is made durable before it is acknowledged.
    has_flush: bool,
    /// The driver broke the queue; it must reset the device.
    is_broken: bool,
}

/// What the worker and the device share.
struct Shared {
    disk: Disk,
    memory: GuestMemory,
    gate: Arc<Gate>,
    link: Arc<Link>,
    doorbell: EventFd,
    active: Mutex<Option<Active>>,
}

/// One virtio block device.
pub struct Block {
    shared: Arc<Shared>,
    doorbells: [EventFd; 1],
}

impl Block {
    /// A device on `disk`, with its worker waiting for the driver.
    pub fn new(
        disk: Disk,
        memory: GuestMemory,
        gate: Arc<Gate>,
        link: Arc<Link>,
    ) -> io::Result<Self> {
        // Blocking: its reader is the worker, which has nothing else to do.
        let doorbell = EventFd::new(0)?;
        let doorbells = [doorbell.try_clone()?];
        let active = Mutex::new(None);
        let shared = Arc::new(Shared { disk, memory, gate, link, doorbell, active });
        let worker = Arc::clone(&shared);
        let name = format!("disk{}", shared.disk.index());
        thread::Builder::new().name(name).spawn(move || worker::run(&worker))?;
        Ok(Self { shared, doorbells })
    }

    pub fn disk(&self) -> &Disk {
        &self.shared.disk
    }

    /// The state; the worker is parked, so that no request is half done.
    pub fn save(&self) -> BlockV1 {
        let active = self.shared.active();
        BlockV1 {
            sectors: self.shared.disk.sectors(),
            read_only: self.shared.disk.is_read_only(),
            has_flush: active.as_ref().is_some_and(|active| active.has_flush),
            is_broken: active.as_ref().is_some_and(|active| active.is_broken),
            queue: active.as_ref().map(|active| QueueV1::of(&active.queue)),
        }
    }

    /// Takes the state over; the disk must be the one that it was saved with.
    pub fn restore(&self, state: &BlockV1) -> Result<(), String> {
        let disk = &self.shared.disk;
        if (state.sectors, state.read_only) != (disk.sectors(), disk.is_read_only()) {
            return Err(format!(
                "the VM was saved with {} sectors (read-only: {}), {} has {} (read-only: {})",
                state.sectors,
                state.read_only,
                disk.path().display(),
                disk.sectors(),
                disk.is_read_only()
            ));
        }
        let queue =
            state.queue.map(QueueV1::to_queue).transpose().map_err(|error| error.to_string())?;
        if queue.as_ref().is_some_and(|queue| !queue.is_valid(&self.shared.memory)) {
            return Err("its queue is not in guest memory".into());
        }
        let (has_flush, is_broken) = (state.has_flush, state.is_broken);
        *self.shared.active() = queue.map(|queue| Active { queue, has_flush, is_broken });
        Ok(())
    }
}

impl Shared {
    fn active(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        let read_only = if self.shared.disk.is_read_only() { FEATURE_READ_ONLY } else { 0 };
        FEATURE_VERSION_1
            | FEATURE_INDIRECT
            | FEATURE_SEG_MAX
            | FEATURE_BLK_SIZE
            | FEATURE_FLUSH
            | read_only
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// capacity (8), size_max (4), seg_max (4), geometry (4), blk_size (4); the rest is not offered.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; 24];
        image[..8].copy_from_slice(&self.shared.disk.sectors().to_le_bytes());
        image[12..16].copy_from_slice(&(u32::from(PIECES_MAX) - 2).to_le_bytes());
        image[20..24].copy_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.doorbells
    }

    fn activate(&self, features: u64, queues: Vec<Option<Queue>>) {
        let has_flush = features & FEATURE_FLUSH != 0;
        let queue = queues.into_iter().next().flatten();
        *self.shared.active() = queue.map(|queue| Active { queue, has_flush, is_broken: false });
    }

    fn reset(&self) {
        // The lock is free only between requests, so nothing is outstanding after it.
        *self.shared.active() = None;
    }
}
