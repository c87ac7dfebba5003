//! ACPI's fixed hardware (ACPI 6.5, 4.8.3): the PM1 event block with the power button, and the PM1
//! control register with the sleep type.
//!
//! ```text
//! +0  status   write 1 to clear
//! +2  enable
//! +4  control  SCI_EN is always 1; SLP_EN with sleep type 0 switches off
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::AcpiPmV1;
use crate::devices::PortDevice;
use crate::kvm::{GuestEnd, IrqRouter};
use crate::layout::SCI_IRQ;

const POWER_BUTTON: u16 = 1 << 8;
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE_MASK: u16 = 7;
const SLEEP_TYPE_OFF: u16 = 0;

pub struct AcpiPm {
    registers: Mutex<AcpiPmV1>,
    irq: Arc<IrqRouter>,
}

impl AcpiPm {
    pub fn new(irq: Arc<IrqRouter>) -> Self {
        Self { registers: Mutex::default(), irq }
    }

    /// Presses the power button; a guest that listens shuts down.
    pub fn press_power_button(&self) {
        let mut registers = self.lock();
        registers.status |= POWER_BUTTON;
        self.update_line(&registers);
    }

    pub fn save(&self) -> AcpiPmV1 {
        *self.lock()
    }

    /// Sets the registers; the interrupt line is part of the IOAPIC's state.
    pub fn restore(&self, state: AcpiPmV1) {
        *self.lock() = state;
    }

    fn lock(&self) -> MutexGuard<'_, AcpiPmV1> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The interrupt is level-triggered: active while an enabled event is pending.
    fn update_line(&self, registers: &AcpiPmV1) {
        let active = registers.status & registers.enable != 0;
        if let Err(error) = self.irq.set_line(SCI_IRQ, active) {
            tracing::error!(%error, "the ACPI interrupt cannot be set");
        }
    }

    fn write_byte(&self, registers: &mut AcpiPmV1, offset: u16, byte: u8) {
        let shift = (offset % 2) * 8;
        let value = u16::from(byte) << shift;
        let keep = !(0xff << shift);
        match offset {
            0 | 1 => registers.status &= !value,
            2 | 3 => registers.enable = registers.enable & keep | value,
            _ => registers.control = registers.control & keep | value,
        }
    }
}

impl PortDevice for AcpiPm {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let registers = self.lock();
        let image = [
            registers.status.to_le_bytes(),
            registers.enable.to_le_bytes(),
            (registers.control & !SLEEP_ENABLE | SCI_ENABLED).to_le_bytes(),
        ]
        .concat();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0xff);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) -> Option<GuestEnd> {
        let mut registers = self.lock();
        for (at, byte) in (offset..6).zip(data) {
            self.write_byte(&mut registers, at, *byte);
        }
        if offset < 4 {
            self.update_line(&registers);
        }
        let control = registers.control;
        let off = control >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_OFF;
        (control & SLEEP_ENABLE != 0 && off).then_some(GuestEnd::Shutdown)
    }
}
