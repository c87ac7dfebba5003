//! MSI-X: each table entry names a local APIC and a vector.

use crate::lapic;
use crate::pci::Function;
use core::ptr::with_exposed_provenance_mut;

const ENABLE: u32 = 1 << 31;
const MASK_ALL: u32 = 1 << 30;
const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

pub struct Msix {
    function: Function,
    capability: u8,
    table: u64,
}

impl Msix {
    /// `None` if the table has fewer entries than a disk needs.
    pub fn find(function: Function, capability: u8) -> Option<Self> {
        let entries = (function.read(capability) >> 16 & 0x7ff) + 1;
        let table = function.read(capability + 4);
        let bar = function.memory_bar((table & 7) as u8)?;
        (entries >= 2).then_some(Self { function, capability, table: bar + u64::from(table & !7) })
    }

    pub fn enable(&self, vectors: [u8; 2]) {
        let control = self.function.read(self.capability) & !MASK_ALL;
        self.function.write(self.capability, control | ENABLE);
        for (entry, vector) in (0u64..).zip(vectors) {
            let address = MESSAGE_ADDRESS | u32::from(lapic::id()) << 12;
            for (offset, word) in [(0, address), (4, 0), (8, u32::from(vector)), (12, 0)] {
                let at =
                    with_exposed_provenance_mut::<u32>((self.table + entry * 16 + offset) as usize);
                // SAFETY: the table lies in the mapped BAR and belongs to the device's driver.
                unsafe { at.write_volatile(word) };
            }
        }
    }
}
