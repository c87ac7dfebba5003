//! A split virtqueue that carries one request at a time, always in the same descriptors.
//!
//! One at a time is all that a journal with ordered records needs, and it makes every unexpected completion
//! visible: a device that completes twice, or something else, is wrong.

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

pub const SIZE: u16 = 16;
const ENTRIES: usize = SIZE as usize;
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;

/// A descriptor: address, length, and flags with the next index above them.
#[repr(C)]
struct Descriptor {
    address: AtomicU64,
    len: AtomicU32,
    flags: AtomicU16,
    next: AtomicU16,
}

#[repr(C, align(4096))]
struct Memory {
    descriptors: [Descriptor; ENTRIES],
    available_flags: AtomicU16,
    available_index: AtomicU16,
    available: [AtomicU16; ENTRIES],
    _event: [AtomicU32; 2],
    used_flags: AtomicU16,
    used_index: AtomicU16,
    used: [[AtomicU32; 2]; ENTRIES],
}

static MEMORY: Memory = Memory {
    descriptors: [const {
        Descriptor {
            address: AtomicU64::new(0),
            len: AtomicU32::new(0),
            flags: AtomicU16::new(0),
            next: AtomicU16::new(0),
        }
    }; ENTRIES],
    available_flags: AtomicU16::new(0),
    available_index: AtomicU16::new(0),
    available: [const { AtomicU16::new(0) }; ENTRIES],
    _event: [const { AtomicU32::new(0) }; 2],
    used_flags: AtomicU16::new(0),
    used_index: AtomicU16::new(0),
    used: [const { [const { AtomicU32::new(0) }; 2] }; ENTRIES],
};

/// A buffer of a request.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub device_writes: bool,
}

pub struct Queue {
    index: u16,
    in_flight: bool,
}

impl Queue {
    /// The addresses of the descriptor, driver and device areas.
    pub fn areas() -> [u64; 3] {
        let areas: [*const (); 3] = [
            (&raw const MEMORY.descriptors).cast(),
            (&raw const MEMORY.available_flags).cast(),
            (&raw const MEMORY.used_flags).cast(),
        ];
        areas.map(|area| area.expose_provenance() as u64)
    }

    pub const fn new() -> Self {
        Self { index: 0, in_flight: false }
    }

    pub fn is_in_flight(&self) -> bool {
        self.in_flight
    }

    /// Puts a chain of buffers into the queue. The caller rings the doorbell.
    pub fn submit(&mut self, buffers: &[Buffer]) {
        assert!(!self.in_flight && !buffers.is_empty() && buffers.len() <= ENTRIES);
        for (i, (descriptor, buffer)) in MEMORY.descriptors.iter().zip(buffers).enumerate() {
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            let writes = if buffer.device_writes { DEVICE_WRITES } else { 0 };
            descriptor.address.store(buffer.address, Ordering::Relaxed);
            descriptor.len.store(buffer.len, Ordering::Relaxed);
            descriptor.flags.store(more | writes, Ordering::Relaxed);
            descriptor.next.store(i as u16 + 1, Ordering::Relaxed);
        }
        MEMORY.available[usize::from(self.index % SIZE)].store(0, Ordering::Relaxed);
        self.index = self.index.wrapping_add(1);
        MEMORY.available_index.store(self.index, Ordering::Release);
        self.in_flight = true;
        fence(Ordering::SeqCst);
    }

    /// True once for the completion of the request in flight.
    pub fn take_completion(&mut self) -> bool {
        let used = MEMORY.used_index.load(Ordering::Acquire);
        let before = if self.in_flight { self.index.wrapping_sub(1) } else { self.index };
        if used == before {
            return false;
        }
        let entry = &MEMORY.used[usize::from(before % SIZE)];
        let head = entry[0].load(Ordering::Relaxed);
        if !self.in_flight || used != self.index || head != 0 {
            crate::fatal!(
                "virtio unexpected completion used={used} submitted={} head={head}",
                self.index
            );
        }
        self.in_flight = false;
        true
    }
}
