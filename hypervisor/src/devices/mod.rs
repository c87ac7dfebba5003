//! The machine's devices, and the bus by which a guest reaches them.
//!
//! Devices are siblings: each folder has the device, its queue or register handling, and the saved
//! form `FooV1` with its `(kind, version)` in `saved.rs`.

pub mod block;
pub mod net;
pub mod pci;
pub mod power;
pub mod rng;
pub mod saved;
pub mod serial;
pub mod virtio;

use std::ops::Range;
use std::sync::Arc;

use crate::kvm::{GuestBus, GuestEnd};
use pci::PciBus;

/// A device behind I/O ports.
pub trait PortDevice: Send + Sync {
    /// Reads one access of 1, 2 or 4 bytes at `offset` from the first port.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// Writes one access; some of them end the VM.
    fn write(&self, offset: u16, data: &[u8]) -> Option<GuestEnd>;
}

/// Routes port and memory accesses. It is built once and then only read.
pub struct Bus {
    ports: Vec<(Range<u16>, Arc<dyn PortDevice>)>,
    pci: Arc<PciBus>,
}

impl Bus {
    pub fn new(pci: Arc<PciBus>) -> Self {
        Self { ports: Vec::new(), pci }
    }

    /// Attaches a device; ranges are the VMM's own and do not overlap.
    pub fn attach(&mut self, ports: Range<u16>, device: Arc<dyn PortDevice>) {
        debug_assert!(
            self.ports
                .iter()
                .all(|(other, _)| ports.end <= other.start || other.end <= ports.start)
        );
        self.ports.push((ports, device));
    }

    fn find(&self, port: u16) -> Option<(u16, &dyn PortDevice)> {
        let (range, device) = self.ports.iter().find(|(range, _)| range.contains(&port))?;
        Some((port - range.start, device.as_ref()))
    }
}

impl GuestBus for Bus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        match self.find(port) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<GuestEnd> {
        self.find(port).and_then(|(offset, device)| device.write(offset, data))
    }

    fn memory_read(&self, address: u64, data: &mut [u8]) {
        if !self.pci.memory_read(address, data) {
            data.fill(0xff);
        }
    }

    fn memory_write(&self, address: u64, data: &[u8]) {
        self.pci.memory_write(address, data);
    }
}

/// The little-endian number in an access of up to 8 bytes.
pub(crate) fn to_number(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
