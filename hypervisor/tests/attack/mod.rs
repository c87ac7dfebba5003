//! What a hostile driver can write into a queue of 16 in 2 MiB of memory.
#![allow(dead_code)]

use bellwether_memory::GuestRam;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

pub const TABLE: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x3000;
pub const USED: u64 = 0x4000;
pub const DATA: u64 = 0x10000;
pub const QUEUE_SIZE: u16 = 16;
pub const RAM: u64 = 2 << 20;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

pub const fn at(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, len, flags, next }
}

impl Descriptor {
    pub fn bytes(&self) -> [u8; 16] {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&self.address.to_le_bytes());
        raw[8..12].copy_from_slice(&self.len.to_le_bytes());
        raw[12..14].copy_from_slice(&self.flags.to_le_bytes());
        raw[14..].copy_from_slice(&self.next.to_le_bytes());
        raw
    }

    pub fn read(ram: &GuestRam, address: u64) -> Option<Self> {
        let mut raw = [0; 16];
        ram.memory().read_slice(&mut raw, GuestAddress(address)).ok()?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
        Some(Self {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// Writes a table of descriptors anywhere.
pub fn write_table(ram: &GuestRam, address: u64, descriptors: &[Descriptor]) {
    for (index, descriptor) in (0u64..).zip(descriptors) {
        let place = GuestAddress(address + index * 16);
        ram.memory().write_slice(&descriptor.bytes(), place).unwrap();
    }
}

/// Writes empty rings, the table, and the heads that the driver makes available, and says that it has
/// made `available` available.
pub fn write_queue(ram: &GuestRam, descriptors: &[Descriptor], heads: &[u16], available: u16) {
    let memory = ram.memory();
    memory.write_slice(&[0; 0x6000], GuestAddress(TABLE)).unwrap();
    write_table(ram, TABLE, descriptors);
    for (index, head) in (0u64..).zip(heads) {
        memory.write_obj(*head, GuestAddress(AVAILABLE + 4 + index * 2)).unwrap();
    }
    memory.write_obj(available, GuestAddress(AVAILABLE + 2)).unwrap();
}

/// The queue as the transport would build it.
pub fn queue() -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    queue
}

/// How many chains the device has given back.
pub fn used(ram: &GuestRam) -> u16 {
    ram.memory().read_obj(GuestAddress(USED + 2)).unwrap()
}
