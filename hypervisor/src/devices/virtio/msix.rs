//! MSI-X (PCI 3.0, 6.8.2): the vector table, masking, pending bits, and the routes behind it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::MsixEntryV1;
use crate::devices::to_number;
use crate::kvm::{IrqRouter, KvmError, MsiMessage};

pub const ENTRY_BYTES: u64 = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;

struct Vector {
    entry: MsixEntryV1,
    event: EventFd,
    gsi: u32,
}

struct Table {
    control: u16,
    vectors: Vec<Vector>,
    pending: u64,
}

/// The MSI-X side of one function, at most 64 vectors.
pub struct Msix {
    table: Mutex<Table>,
    router: Arc<IrqRouter>,
}

impl Msix {
    /// A table of masked vectors, each with its irqfd.
    pub fn new(router: Arc<IrqRouter>, vectors: usize) -> Result<Self, KvmError> {
        debug_assert!(vectors <= 64);
        let vector = |_| {
            let event = EventFd::new(EFD_NONBLOCK).map_err(|source| KvmError::Call {
                operation: "create an eventfd for an interrupt",
                source,
            })?;
            let gsi = router.add_msi(&event)?;
            Ok(Vector { entry: MsixEntryV1 { masked: true, ..Default::default() }, event, gsi })
        };
        let vectors = (0..vectors).map(vector).collect::<Result<_, KvmError>>()?;
        Ok(Self { table: Mutex::new(Table { control: 0, vectors, pending: 0 }), router })
    }

    /// Interrupts the guest, or notes it for when the vector is unmasked.
    pub fn trigger(&self, vector: u16) {
        let mut table = self.lock();
        let index = usize::from(vector);
        if table.control & CONTROL_ENABLE == 0 || index >= table.vectors.len() {
            return;
        }
        if table.is_live(index) { table.inject(index) } else { table.pending |= 1 << index }
    }

    /// The message control register.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock();
        if table.control != control {
            table.control = control;
            self.apply(&mut table);
        }
    }

    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        data.fill(0);
        let Some(vector) = table.vectors.get((offset / ENTRY_BYTES) as usize) else { return };
        let image = image_of(&vector.entry);
        for (at, byte) in ((offset % ENTRY_BYTES) as usize..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// Dwords and quadwords, as the specification allows; anything else is ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut table = self.lock();
        let index = (offset / ENTRY_BYTES) as usize;
        let Some(vector) = table.vectors.get_mut(index) else { return };
        for (at, dword) in ((offset % ENTRY_BYTES)..).step_by(4).zip(data.chunks(4)) {
            write_dword(&mut vector.entry, at, to_number(dword) as u32);
        }
        self.apply(&mut table);
    }

    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let image = self.lock().pending.to_le_bytes();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    pub fn save(&self) -> (u16, Vec<MsixEntryV1>, u64) {
        let table = self.lock();
        (table.control, table.vectors.iter().map(|vector| vector.entry).collect(), table.pending)
    }

    /// Takes the table over and stages its routes; the machine commits those of all devices at once.
    pub fn restore(
        &self,
        control: u16,
        entries: &[MsixEntryV1],
        pending: u64,
    ) -> Result<(), String> {
        let mut table = self.lock();
        if entries.len() != table.vectors.len() {
            return Err(format!("{} MSI-X vectors, not {}", entries.len(), table.vectors.len()));
        }
        for (vector, entry) in table.vectors.iter_mut().zip(entries) {
            vector.entry = *entry;
        }
        table.control = control;
        table.pending = pending;
        table.stage(&self.router);
        Ok(())
    }

    /// Puts the routes of live vectors in force and delivers what waited for them.
    fn apply(&self, table: &mut Table) {
        table.stage(&self.router);
        if let Err(error) = self.router.commit() {
            tracing::error!(%error, "an interrupt route cannot be set");
        }
        for index in 0..table.vectors.len() {
            if table.pending & (1 << index) != 0 && table.is_live(index) {
                table.pending &= !(1 << index);
                table.inject(index);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn is_live(&self, index: usize) -> bool {
        let enabled = self.control & (CONTROL_ENABLE | CONTROL_MASK_ALL) == CONTROL_ENABLE;
        enabled && !self.vectors[index].entry.masked
    }

    fn inject(&self, index: usize) {
        // A full counter means that the interrupt is already on its way.
        let _raised = self.vectors[index].event.write(1);
    }

    fn stage(&self, router: &IrqRouter) {
        for (index, vector) in self.vectors.iter().enumerate() {
            if self.is_live(index) {
                let MsixEntryV1 { address, data, .. } = vector.entry;
                router.stage(vector.gsi, Some(MsiMessage { address, data }));
            }
        }
    }
}

fn image_of(entry: &MsixEntryV1) -> [u8; ENTRY_BYTES as usize] {
    let mut image = [0; ENTRY_BYTES as usize];
    image[..8].copy_from_slice(&entry.address.to_le_bytes());
    image[8..12].copy_from_slice(&entry.data.to_le_bytes());
    image[12] = u8::from(entry.masked);
    image
}

fn write_dword(entry: &mut MsixEntryV1, at: u64, value: u32) {
    match at {
        0 => entry.address = entry.address & !0xffff_ffff | u64::from(value),
        4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
        8 => entry.data = value,
        _ => entry.masked = value & 1 != 0,
    }
}
