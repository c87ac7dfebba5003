//! virtio-blk: one request at a time, completed by interrupt and noticed by looking at the used ring.

use super::queue::{self, Buffer, Queue};
use super::transport::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, QueueNotifier, Reason, Transport,
};
use crate::interrupts::{VECTOR_CONFIG, VECTOR_DISK};
use crate::journal::{Request, SCAN_SECTORS};
use crate::journal_format::SECTOR_BYTES;
use crate::pci::{self, Function};
use core::cell::UnsafeCell;

const VENDOR_DEVICE: u32 = 0x1042_1af4;
const FEATURE_RO: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_VERSION_1: u64 = 1 << 32;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
/// What the status byte holds before the device writes it: no status of the specification.
const STATUS_UNWRITTEN: u8 = 0xff;
const DATA_BYTES: usize = SCAN_SECTORS as usize * SECTOR_BYTES;

#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// What the device reads and writes.
#[repr(C, align(4096))]
struct Dma {
    data: UnsafeCell<[u8; DATA_BYTES]>,
    header: UnsafeCell<Header>,
    status: UnsafeCell<u8>,
}

// SAFETY: only `Blk`, of which there is one, touches the buffers, and only while no request is in flight.
unsafe impl Sync for Dma {}

static DMA: Dma = Dma {
    data: UnsafeCell::new([0; DATA_BYTES]),
    header: UnsafeCell::new(Header { kind: 0, reserved: 0, sector: 0 }),
    status: UnsafeCell::new(0),
};

/// The first virtio disk of bus 0.
pub struct Blk {
    queue: Queue,
    notifier: QueueNotifier,
    pub sectors: u64,
    pub read_only: bool,
    pub flush: bool,
    pub interrupts: bool,
    read_bytes: usize,
}

impl Blk {
    /// `None` without a disk; an error if it cannot be used. Called once.
    pub fn find() -> Option<Result<Self, Reason>> {
        let function = pci::functions().find(|f| f.vendor_device() == VENDOR_DEVICE)?;
        Some(Self::start(function))
    }

    fn start(function: Function) -> Result<Self, Reason> {
        let transport = Transport::find(function)?;
        transport.reset()?;
        transport.add_status(ACKNOWLEDGE);
        transport.add_status(DRIVER);
        let offered = transport.device_features();
        if offered & FEATURE_VERSION_1 == 0 {
            return Err("no VIRTIO_F_VERSION_1");
        }
        let features = offered & (FEATURE_VERSION_1 | FEATURE_FLUSH | FEATURE_RO);
        transport.set_driver_features(features);
        transport.add_status(FEATURES_OK);
        if transport.status() & FEATURES_OK == 0 {
            return Err("features refused");
        }
        let interrupts = transport.route_interrupts(VECTOR_CONFIG, VECTOR_DISK)?;
        let notifier = transport.enable_queue(queue::SIZE, Queue::areas())?;
        transport.add_status(DRIVER_OK);
        Ok(Self {
            queue: Queue::new(),
            notifier,
            sectors: transport.device_u64(0),
            read_only: features & FEATURE_RO != 0,
            flush: features & FEATURE_FLUSH != 0,
            interrupts,
            read_bytes: 0,
        })
    }

    pub fn is_in_flight(&self) -> bool {
        self.queue.is_in_flight()
    }

    /// Starts a request. No other one may be in flight.
    pub fn submit(&mut self, request: &Request) {
        let data = address(DMA.data.get());
        let buffer =
            |bytes, device_writes| Some(Buffer { address: data, len: bytes as u32, device_writes });
        self.read_bytes = 0;
        let (kind, sector, buffer) = match *request {
            Request::Read { sector, sectors } => {
                self.read_bytes = (sectors as usize * SECTOR_BYTES).min(DATA_BYTES);
                (TYPE_IN, sector, buffer(self.read_bytes, true))
            }
            Request::Write { sector, data } => {
                // SAFETY: nothing is in flight, so the buffer is ours.
                unsafe { DMA.data.get().cast::<[u8; SECTOR_BYTES]>().write_volatile(data) };
                (TYPE_OUT, sector, buffer(SECTOR_BYTES, false))
            }
            Request::Flush => (TYPE_FLUSH, 0, None),
        };
        // SAFETY: as above.
        unsafe {
            DMA.header.get().write_volatile(Header { kind, reserved: 0, sector });
            DMA.status.get().write_volatile(STATUS_UNWRITTEN);
        }
        self.start_chain(buffer);
    }

    fn start_chain(&mut self, data: Option<Buffer>) {
        let header = Buffer { address: address(DMA.header.get()), len: 16, device_writes: false };
        let status = Buffer { address: address(DMA.status.get()), len: 1, device_writes: true };
        match data {
            Some(data) => self.queue.submit(&[header, data, status]),
            None => self.queue.submit(&[header, status]),
        }
        self.notifier.ring();
    }

    /// The status of the request in flight and what it read, once the device has completed it.
    pub fn take_completion(&mut self) -> Option<(u8, &[u8])> {
        if !self.queue.take_completion() {
            return None;
        }
        // SAFETY: the device has given the buffers back, and `self` stays borrowed while they are looked at.
        let (status, data) = unsafe { (DMA.status.get().read_volatile(), &*DMA.data.get()) };
        if status == STATUS_UNWRITTEN {
            crate::fatal!("virtio completion without a status");
        }
        Some((status, &data[..self.read_bytes]))
    }
}

fn address<T>(buffer: *mut T) -> u64 {
    buffer.expose_provenance() as u64
}
