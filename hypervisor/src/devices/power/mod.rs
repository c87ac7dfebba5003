//! The ways in which a guest switches itself off or resets itself, and the power button.

mod acpi_pm;
mod saved;

pub use acpi_pm::AcpiPm;
pub use saved::AcpiPmV1;

use super::{PortDevice, to_number};
use crate::kvm::GuestEnd;

/// The keyboard controller, of which only the reset line is there.
pub struct I8042;

/// Port 0x64, command 0xfe: pulse the reset line.
const COMMAND_RESET: u8 = 0xfe;

impl PortDevice for I8042 {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        // No data and an empty input buffer, so that a driver neither waits nor finds a keyboard.
        data.fill(0);
    }

    fn write(&self, offset: u16, data: &[u8]) -> Option<GuestEnd> {
        (offset == 4 && data == [COMMAND_RESET]).then_some(GuestEnd::Reset)
    }
}

/// Whether this byte written to the reset control port 0xcf9 resets the machine.
pub fn is_reset_control(data: &[u8]) -> bool {
    const RESET_CPU: u64 = 1 << 2;
    data.len() == 1 && to_number(data) & RESET_CPU != 0
}
