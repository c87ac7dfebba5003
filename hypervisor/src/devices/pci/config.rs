//! A function's configuration space: 256 bytes, and which of their bits a guest can write.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub const COMMAND: u8 = 0x04;
pub const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_WRITABLE: u16 = 0b0000_0101_0000_0110;
const STATUS: u8 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
pub const BAR0: u8 = 0x10;
const SUBSYSTEM: u8 = 0x2c;
const CAPABILITIES: u8 = 0x34;
const FIRST_CAPABILITY: u8 = 0x40;
const SIZE: usize = 256;

/// Registers and write masks of one function.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    last_capability: Option<u8>,
    next_capability: u8,
}

impl ConfigSpace {
    /// A function with one memory BAR at most; `class` is class, subclass and interface.
    pub fn new(vendor: u16, device: u16, class: u32) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            last_capability: None,
            next_capability: FIRST_CAPABILITY,
        };
        config.set(0, &vendor.to_le_bytes());
        config.set(2, &device.to_le_bytes());
        config.set(8, &(class << 8 | 1).to_le_bytes());
        config.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Interrupt line: for software's own notes.
        config.allow(0x3c, &[0xff]);
        config
    }

    /// Sets the subsystem's vendor and device.
    pub fn set_subsystem(&mut self, vendor: u16, device: u16) {
        self.set(SUBSYSTEM, &vendor.to_le_bytes());
        self.set(SUBSYSTEM + 2, &device.to_le_bytes());
    }

    /// Makes BAR 0 a 32-bit memory BAR of `bytes`, a power of two, placed at `address` and enabled,
    /// as firmware would have left it.
    pub fn set_bar0(&mut self, address: u32, bytes: u32) {
        self.set(BAR0, &address.to_le_bytes());
        self.allow(BAR0, &(!(bytes - 1)).to_le_bytes());
        self.set(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    }

    /// Appends a capability (its bytes without id and link); returns where it begins.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u8 {
        let at = self.next_capability;
        let link = self.last_capability.map_or(CAPABILITIES, |last| last + 1);
        self.set(link, &[at]);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.last_capability = Some(at);
        self.next_capability = (at + 2 + body.len() as u8).next_multiple_of(4);
        at
    }

    /// Lets a guest write the bits that are set in `mask`.
    pub fn allow(&mut self, at: u8, mask: &[u8]) {
        self.writable[usize::from(at)..][..mask.len()].copy_from_slice(mask);
    }

    /// Sets registers, writable or not.
    pub fn set(&mut self, at: u8, bytes: &[u8]) {
        self.bytes[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    }

    pub fn read(&self, at: u8, data: &mut [u8]) {
        for (index, byte) in (usize::from(at)..).zip(data) {
            *byte = self.bytes.get(index).copied().unwrap_or(0xff);
        }
    }

    /// A guest's write: only writable bits change.
    pub fn write(&mut self, at: u8, data: &[u8]) {
        for (index, byte) in (usize::from(at)..SIZE).zip(data) {
            let mask = self.writable[index];
            self.bytes[index] = self.bytes[index] & !mask | byte & mask;
        }
    }

    /// The 32 bits at `at`.
    pub fn dword(&self, at: u8) -> u32 {
        let mut raw = [0; 4];
        self.read(at, &mut raw);
        u32::from_le_bytes(raw)
    }

    /// Where BAR 0 is, if memory decoding is on.
    pub fn bar0(&self) -> Option<u64> {
        let decodes = self.dword(COMMAND) as u16 & COMMAND_MEMORY != 0;
        decodes.then(|| u64::from(self.dword(BAR0) & !0xf))
    }

    /// What a guest has written.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over what a guest had written; the rest must be what this VMM offers.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), String> {
        if saved.len() != SIZE {
            return Err(format!("a configuration space has {SIZE} bytes, not {}", saved.len()));
        }
        let differs =
            |&index: &usize| (saved[index] ^ self.bytes[index]) & !self.writable[index] != 0;
        if let Some(index) = (0..SIZE).find(differs) {
            return Err(format!("configuration byte {index:#x} is not the one of this device"));
        }
        self.bytes.copy_from_slice(saved);
        Ok(())
    }
}

pub(super) fn lock(config: &Mutex<ConfigSpace>) -> MutexGuard<'_, ConfigSpace> {
    config.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_sized_and_moved() {
        let mut config = ConfigSpace::new(0x1af4, 0x1042, 0x01_0000);
        config.set_bar0(0xc000_0000, 0x8000);
        config.write(BAR0, &[0xff; 4]);
        assert_eq!(config.dword(BAR0), 0xffff_8000);
        config.write(BAR0, &0xe800_0000u32.to_le_bytes());
        assert_eq!(config.bar0(), Some(0xe800_0000));
        config.write(COMMAND, &[0, 0]);
        assert_eq!(config.bar0(), None);
    }

    #[test]
    fn identity_cannot_be_written_and_capabilities_are_linked() {
        let mut config = ConfigSpace::new(0x1af4, 0x1042, 0x01_0000);
        config.write(0, &[0; 4]);
        assert_eq!(config.dword(0), 0x1042_1af4);
        let first = config.add_capability(0x09, &[16; 14]);
        let second = config.add_capability(0x11, &[0; 10]);
        assert_eq!((first, second), (0x40, 0x50));
        assert_eq!(config.dword(CAPABILITIES) as u8, 0x40);
        assert_eq!(config.dword(0x40) >> 8 & 0xff, 0x50);
    }

    #[test]
    fn a_saved_space_of_another_device_is_refused() {
        let config = ConfigSpace::new(0x1af4, 0x1042, 0x01_0000);
        let mut other = ConfigSpace::new(0x1af4, 0x1041, 0x02_0000);
        assert!(other.restore(&config.save()).unwrap_err().contains("0x2"));
        assert!(other.restore(&[0; 3]).is_err());
    }
}
