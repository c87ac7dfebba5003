//! PCI bus 0 through the ports 0xcf8 and 0xcfc: finding functions, capabilities and memory BARs.

use crate::paging;
use crate::ports::{inl, outl};
use crate::sync::Lock;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const SLOTS: u8 = 32;
const COMMAND: u8 = 0x04;
const BAR_0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
/// A list of capabilities that is longer than the configuration space has a loop in it.
const CAPABILITIES_MAX: usize = 48;
const MEMORY_AND_BUS_MASTER: u32 = 0x406; // and no INTx
const MEMORY_DECODE: u32 = 0x2;

/// Where unassigned BARs go: a part of the 32-bit hole that no VMM uses for anything fixed.
const HOLE: core::ops::Range<u64> = 0xe800_0000..0xf000_0000;
static HOLE_NEXT: Lock<u64> = Lock::new(HOLE.start);

/// A function 0 of bus 0.
#[derive(Clone, Copy)]
pub struct Function {
    pub slot: u8,
}

/// A capability: its id and where it is in the configuration space.
pub struct Capability {
    pub id: u8,
    pub offset: u8,
}

pub fn functions() -> impl Iterator<Item = Function> {
    (0..SLOTS).map(|slot| Function { slot }).filter(|f| f.vendor_device() as u16 != 0xffff)
}

impl Function {
    /// The vendor in the low half, the device in the high half.
    pub fn vendor_device(self) -> u32 {
        self.read(0)
    }

    /// The aligned 32-bit word around `offset`.
    pub fn read(self, offset: u8) -> u32 {
        // SAFETY: reading the configuration space of a device has no effect on the guest.
        unsafe {
            outl(ADDRESS, self.selector(offset));
            inl(DATA)
        }
    }

    pub fn write(self, offset: u8, value: u32) {
        // SAFETY: only this module's callers, the device's driver, write.
        unsafe {
            outl(ADDRESS, self.selector(offset));
            outl(DATA, value);
        }
    }

    pub fn read_u8(self, offset: u8) -> u8 {
        (self.read(offset) >> (8 * (offset & 3))) as u8
    }

    pub fn enable(self) {
        let command = self.read(COMMAND) & 0xffff;
        self.write(COMMAND, command | MEMORY_AND_BUS_MASTER);
    }

    pub fn capabilities(self) -> impl Iterator<Item = Capability> {
        let first = self.read_u8(CAPABILITIES) & 0xfc;
        let next = move |c: &Capability| self.capability(self.read_u8(c.offset + 1) & 0xfc);
        core::iter::successors(self.capability(first), next).take(CAPABILITIES_MAX)
    }

    fn capability(self, offset: u8) -> Option<Capability> {
        (offset >= 0x40).then(|| Capability { id: self.read_u8(offset), offset })
    }

    /// The address of a memory BAR, assigned if nobody has done it, and mapped.
    pub fn memory_bar(self, index: u8) -> Option<u64> {
        let offset = BAR_0 + 4 * index;
        let low = self.read(offset);
        if index > 5 || low & 1 != 0 {
            return None;
        }
        let wide = low & 6 == 4;
        let high = if wide { self.read(offset + 4) } else { 0 };
        let assigned = u64::from(high) << 32 | u64::from(low & !0xf);
        let size = self.bar_size(offset, wide);
        let address = if assigned == 0 { self.assign(offset, wide, size)? } else { assigned };
        paging::map_mmio(address, size);
        Some(address)
    }

    /// Sizes the BAR, with decoding off so that the probe is never a live address.
    fn bar_size(self, offset: u8, wide: bool) -> u64 {
        let command = self.read(COMMAND) & 0xffff;
        self.write(COMMAND, command & !MEMORY_DECODE);
        let low = u64::from(self.probe(offset) & !0xf);
        let high = if wide { u64::from(self.probe(offset + 4)) } else { u64::from(u32::MAX) };
        self.write(COMMAND, command);
        (!(high << 32 | low)).wrapping_add(1)
    }

    fn probe(self, offset: u8) -> u32 {
        let before = self.read(offset);
        self.write(offset, u32::MAX);
        let mask = self.read(offset);
        self.write(offset, before);
        mask
    }

    fn assign(self, offset: u8, wide: bool, size: u64) -> Option<u64> {
        if !size.is_power_of_two() {
            return None;
        }
        let address = HOLE_NEXT.with(|next| {
            let address = next.next_multiple_of(size.max(4096));
            *next = address + size;
            address
        });
        if address + size > HOLE.end {
            return None;
        }
        self.write(offset, address as u32);
        if wide {
            self.write(offset + 4, 0);
        }
        Some(address)
    }

    fn selector(self, offset: u8) -> u32 {
        0x8000_0000 | u32::from(self.slot) << 11 | u32::from(offset & 0xfc)
    }
}
