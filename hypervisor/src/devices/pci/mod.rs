//! The PCI bus: a host bridge, configuration mechanism #1, and the devices' BARs.
//!
//! ```text
//! 0xcf8  address  enable(31) bus(23..16) device(15..11) function(10..8) register(7..2)
//! 0xcf9  reset control, a byte of its own in the same range
//! 0xcfc  data     of the register that the address selects
//! ```

mod config;
mod saved;

pub use config::ConfigSpace;
pub use saved::PciHostV1;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::{PortDevice, power, to_number};
use crate::kvm::GuestEnd;

/// Slot 0 is the host bridge.
pub const SLOTS: usize = 32;

/// A function 0 of bus 0.
pub trait PciDevice: Send + Sync {
    fn config_read(&self, register: u8, data: &mut [u8]);
    fn config_write(&self, register: u8, data: &[u8]);
    /// The offset of `address` in the device's BAR, if it is mapped there now.
    fn bar_offset(&self, address: u64) -> Option<u64>;
    fn bar_read(&self, offset: u64, data: &mut [u8]);
    fn bar_write(&self, offset: u64, data: &[u8]);
}

/// The devices of bus 0, each in its slot.
pub struct PciBus {
    slots: Vec<Option<Arc<dyn PciDevice>>>,
}

impl PciBus {
    /// A bus with a host bridge in slot 0 and these devices in others.
    pub fn new(devices: Vec<(usize, Arc<dyn PciDevice>)>) -> Self {
        let mut slots: Vec<Option<Arc<dyn PciDevice>>> = vec![None; SLOTS];
        slots[0] = Some(Arc::new(HostBridge::new()));
        for (slot, device) in devices {
            debug_assert!(slots[slot].is_none());
            slots[slot] = Some(device);
        }
        Self { slots }
    }

    /// Reads from the device that is mapped at `address`; false if there is none.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) -> bool {
        self.at(address).map(|(offset, device)| device.bar_read(offset, data)).is_some()
    }

    /// Writes to the device that is mapped at `address`.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.at(address) {
            device.bar_write(offset, data);
        }
    }

    fn at(&self, address: u64) -> Option<(u64, &dyn PciDevice)> {
        self.slots
            .iter()
            .flatten()
            .find_map(|device| device.bar_offset(address).map(|offset| (offset, device.as_ref())))
    }
}

/// The ports of configuration mechanism #1.
pub struct ConfigPorts {
    address: AtomicU32,
    bus: Arc<PciBus>,
}

impl ConfigPorts {
    pub const PORTS: std::ops::Range<u16> = 0xcf8..0xd00;
    const RESET_CONTROL: u16 = 1;

    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { address: AtomicU32::new(0), bus }
    }

    pub fn save(&self) -> PciHostV1 {
        PciHostV1 { address: self.address.load(Ordering::SeqCst) }
    }

    pub fn restore(&self, state: PciHostV1) {
        self.address.store(state.address, Ordering::SeqCst);
    }

    /// The device and register that the data port stands for at `offset`.
    fn select(&self, offset: u16) -> Option<(&dyn PciDevice, u8)> {
        const ENABLE: u32 = 1 << 31;
        let address = self.address.load(Ordering::SeqCst);
        let bus_or_function = address & 0x00ff_0700;
        if address & ENABLE == 0 || bus_or_function != 0 {
            return None;
        }
        let slot = (address >> 11 & 0x1f) as usize;
        let register = (address & 0xfc) as u8 | (offset & 3) as u8;
        let device = self.bus.slots.get(slot)?.as_ref()?;
        Some((device.as_ref(), register))
    }
}

impl PortDevice for ConfigPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if offset >= 4 {
            if let Some((device, register)) = self.select(offset) {
                device.config_read(register, data);
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::SeqCst).to_le_bytes());
        }
    }

    fn write(&self, offset: u16, data: &[u8]) -> Option<GuestEnd> {
        match offset {
            0 if data.len() == 4 => self.address.store(to_number(data) as u32, Ordering::SeqCst),
            Self::RESET_CONTROL if power::is_reset_control(data) => return Some(GuestEnd::Reset),
            4.. => {
                if let Some((device, register)) = self.select(offset) {
                    device.config_write(register, data);
                }
            }
            _ => {}
        }
        None
    }
}

/// The host bridge has nothing but its identity.
struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    const VENDOR_RED_HAT: u16 = 0x1b36;
    const DEVICE_HOST_BRIDGE: u16 = 0x0008;
    const CLASS_HOST_BRIDGE: u32 = 0x06_0000;

    fn new() -> Self {
        let config = ConfigSpace::new(
            Self::VENDOR_RED_HAT,
            Self::DEVICE_HOST_BRIDGE,
            Self::CLASS_HOST_BRIDGE,
        );
        Self(Mutex::new(config))
    }
}

impl PciDevice for HostBridge {
    fn config_read(&self, register: u8, data: &mut [u8]) {
        config::lock(&self.0).read(register, data);
    }

    fn config_write(&self, register: u8, data: &[u8]) {
        config::lock(&self.0).write(register, data);
    }

    fn bar_offset(&self, _address: u64) -> Option<u64> {
        None
    }

    fn bar_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _offset: u64, _data: &[u8]) {}
}
