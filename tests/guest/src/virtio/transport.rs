//! The modern PCI transport: the structures found through vendor capabilities.

use super::msix::Msix;
use crate::pci::Function;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;

pub const ACKNOWLEDGE: u8 = 1;
pub const DRIVER: u8 = 2;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
const RESET_POLLS_MAX: u32 = 1_000_000;
pub const NO_VECTOR: u16 = 0xffff;

/// Why a device cannot be used.
pub type Reason = &'static str;

/// A region of a device's registers.
#[derive(Clone, Copy)]
struct Registers {
    address: u64,
}

impl Registers {
    fn read<T>(self, offset: u64) -> T {
        let at = with_exposed_provenance::<T>((self.address + offset) as usize);
        // SAFETY: the transport found and mapped the region, and registers are naturally aligned in it.
        unsafe { at.read_volatile() }
    }

    fn write<T>(self, offset: u64, value: T) {
        let at = with_exposed_provenance_mut::<T>((self.address + offset) as usize);
        // SAFETY: as in `read`; the device's driver owns its registers.
        unsafe { at.write_volatile(value) };
    }
}

pub struct Transport {
    common: Registers,
    notify: Registers,
    notify_multiplier: u32,
    device: Registers,
    msix: Option<Msix>,
}

impl Transport {
    pub fn find(function: Function) -> Result<Self, Reason> {
        let (mut common, mut notify, mut device, mut msix) = (None, None, None, None);
        function.enable();
        for capability in function.capabilities() {
            let at = capability.offset;
            match (capability.id, function.read_u8(at + 3)) {
                (CAPABILITY_MSIX, _) => msix = Msix::find(function, at),
                (CAPABILITY_VENDOR, COMMON) => common = common.or(registers(function, at)),
                (CAPABILITY_VENDOR, NOTIFY) => {
                    let multiplier = function.read(at + 16);
                    notify = notify.or(registers(function, at).map(|r| (r, multiplier)));
                }
                (CAPABILITY_VENDOR, DEVICE) => device = device.or(registers(function, at)),
                _ => {}
            }
        }
        let common = common.ok_or("no common configuration")?;
        let (notify, notify_multiplier) = notify.ok_or("no notification structure")?;
        let device = device.ok_or("no device configuration")?;
        Ok(Self { common, notify, notify_multiplier, device, msix })
    }

    pub fn reset(&self) -> Result<(), Reason> {
        self.common.write(0x14, 0u8);
        let done = (0..RESET_POLLS_MAX).any(|_| self.status() == 0);
        done.then_some(()).ok_or("reset does not end")
    }

    pub fn status(&self) -> u8 {
        self.common.read(0x14)
    }

    pub fn add_status(&self, bits: u8) {
        self.common.write(0x14, self.status() | bits);
    }

    pub fn device_features(&self) -> u64 {
        let half = |select: u32| {
            self.common.write(0x00, select);
            u64::from(self.common.read::<u32>(0x04))
        };
        half(0) | half(1) << 32
    }

    pub fn set_driver_features(&self, features: u64) {
        for select in 0..2u32 {
            self.common.write(0x08, select);
            self.common.write(0x0c, (features >> (32 * select)) as u32);
        }
    }

    /// Sends the device's interrupts to two vectors. False if it has no MSI-X: then it is polled.
    pub fn route_interrupts(&self, config_vector: u8, queue_vector: u8) -> Result<bool, Reason> {
        let Some(msix) = &self.msix else {
            self.common.write(0x10, NO_VECTOR);
            return Ok(false);
        };
        msix.enable([config_vector, queue_vector]);
        self.common.write(0x10, 0u16);
        self.select_queue();
        self.common.write(0x1a, 1u16);
        let taken = self.common.read::<u16>(0x10) == 0 && self.common.read::<u16>(0x1a) == 1;
        taken.then_some(true).ok_or("MSI-X vectors refused")
    }

    /// Sets queue 0 up. Returns the address to which its notifications are written.
    pub fn enable_queue(&self, size: u16, areas: [u64; 3]) -> Result<QueueNotifier, Reason> {
        self.select_queue();
        if self.common.read::<u16>(0x18) < size {
            return Err("queue too small");
        }
        self.common.write(0x18, size);
        for (offset, address) in [0x20, 0x28, 0x30].into_iter().zip(areas) {
            self.common.write(offset, address as u32);
            self.common.write(offset + 4, (address >> 32) as u32);
        }
        let offset = u64::from(self.common.read::<u16>(0x1e)) * u64::from(self.notify_multiplier);
        self.common.write(0x1c, 1u16);
        Ok(QueueNotifier(Registers { address: self.notify.address + offset }))
    }

    /// A 64-bit field of the device's own configuration.
    pub fn device_u64(&self, offset: u64) -> u64 {
        loop {
            let generation: u8 = self.common.read(0x15);
            let low: u32 = self.device.read(offset);
            let high: u32 = self.device.read(offset + 4);
            if self.common.read::<u8>(0x15) == generation {
                return u64::from(high) << 32 | u64::from(low);
            }
        }
    }

    fn select_queue(&self) {
        self.common.write(0x16, 0u16);
    }
}

/// The doorbell of queue 0.
pub struct QueueNotifier(Registers);

impl QueueNotifier {
    pub fn ring(&self) {
        self.0.write(0, 0u16);
    }
}

fn registers(function: Function, capability: u8) -> Option<Registers> {
    let bar = function.memory_bar(function.read_u8(capability + 4))?;
    Some(Registers { address: bar + u64::from(function.read(capability + 8)) })
}
