//! The PCI transport of a modern virtio device (virtio 1.2, 4.1).
//!
//! ```text
//! BAR 0, 32 KiB
//! 0x0000 common configuration   0x3000 notify, 4 bytes a queue (ioeventfd)
//! 0x1000 ISR status             0x4000 MSI-X table
//! 0x2000 device configuration   0x5000 MSI-X pending bits
//! ```

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::common::Effect;
use super::{COMMON_BYTES, Common, Link, VirtioDevice, VirtioPciV1};
use crate::GuestMemory;
use crate::devices::pci::{ConfigSpace, PciDevice};
use crate::devices::to_number;
use crate::kvm::{KvmError, Vm};
use crate::layout;

const VENDOR_VIRTIO: u16 = 0x1af4;
const DEVICE_MODERN: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

const BAR_BYTES: u32 = 0x8000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const REGION_MASK: u64 = 0xf000;
const NOTIFY_MULTIPLIER: u32 = 4;
const DEVICE_CONFIG_BYTES: u32 = 0x100;

/// One virtio device on the PCI bus.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    link: Arc<Link>,
    vm: Arc<Vm>,
    memory: GuestMemory,
    config: Mutex<Config>,
    common: Mutex<Common>,
}

struct Config {
    space: ConfigSpace,
    msix_at: u8,
    window_at: u8,
    /// Where the ioeventfds are registered now.
    notify_at: Option<u64>,
}

impl VirtioPci {
    /// Puts `device` into `slot`, with its BAR assigned and its doorbells connected.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        link: Arc<Link>,
        vm: Arc<Vm>,
        memory: GuestMemory,
        slot: usize,
    ) -> Result<Self, KvmError> {
        let config = Config::new(device.as_ref(), slot);
        let vectors = device.queue_sizes().len() as u16 + 1;
        let common = Common::new(device.features(), device.queue_sizes(), vectors);
        let transport = Self {
            device,
            link,
            vm,
            memory,
            config: Mutex::new(config),
            common: Mutex::new(common),
        };
        transport.sync_doorbells(&mut transport.config())?;
        Ok(transport)
    }

    pub fn save(&self) -> VirtioPciV1 {
        let common = self.common();
        let (msix_control, msix, msix_pending) = self.link.msix.save();
        VirtioPciV1 {
            config: self.config().space.save(),
            msix_control,
            msix,
            msix_pending,
            isr: self.link.isr.load(Ordering::SeqCst),
            status: common.status,
            needs_reset: self.link.needs_reset(),
            device_feature_select: common.device_feature_select,
            driver_feature_select: common.driver_feature_select,
            driver_features: common.driver_features,
            queue_select: common.queue_select,
            config_vector: common.config_vector,
            queues: common.queues.clone(),
        }
    }

    /// Takes the state over; interrupt routes are staged, not yet in force.
    pub fn restore(&self, state: &VirtioPciV1) -> Result<(), String> {
        let mut common = self.common();
        if state.queues.len() != common.queues.len() {
            return Err(format!("{} queues, not {}", state.queues.len(), common.queues.len()));
        }
        let unknown = state.driver_features & !common.device_features;
        if unknown != 0 {
            return Err(format!("the driver uses features {unknown:#x} that this device lacks"));
        }
        let mut config = self.config();
        config.space.restore(&state.config)?;
        self.sync_doorbells(&mut config).map_err(|error| error.to_string())?;
        self.link.msix.restore(state.msix_control, &state.msix, state.msix_pending)?;
        self.link.isr.store(state.isr, Ordering::SeqCst);
        self.link.needs_reset.store(state.needs_reset, Ordering::SeqCst);
        self.link.config_vector.store(state.config_vector, Ordering::SeqCst);
        for (vector, queue) in self.link.queue_vectors.iter().zip(&state.queues) {
            vector.store(queue.vector, Ordering::SeqCst);
        }
        common.device_feature_select = state.device_feature_select;
        common.driver_feature_select = state.driver_feature_select;
        common.driver_features = state.driver_features;
        common.status = state.status;
        common.queue_select = state.queue_select;
        common.config_vector = state.config_vector;
        common.queues.clone_from(&state.queues);
        Ok(())
    }

    /// Wakes device and driver: a signal may have been lost between two VMMs, an extra one is harmless.
    pub fn kick(&self) {
        if !self.common().is_active() {
            return;
        }
        for (queue, event) in self.device.queue_events().iter().enumerate() {
            signal(event);
            self.link.notify_queue(queue);
        }
    }

    fn common(&self) -> MutexGuard<'_, Common> {
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the ioeventfds to where the BAR is now.
    fn sync_doorbells(&self, config: &mut Config) -> Result<(), KvmError> {
        let wanted = config.space.bar0().map(|bar| bar + NOTIFY);
        if wanted == config.notify_at {
            return Ok(());
        }
        let address = |base: u64, queue: usize| base + queue as u64 * u64::from(NOTIFY_MULTIPLIER);
        for (queue, event) in self.device.queue_events().iter().enumerate() {
            if let Some(base) = config.notify_at {
                self.vm.remove_ioevent(event, address(base, queue))?;
            }
            if let Some(base) = wanted {
                self.vm.add_ioevent(event, address(base, queue))?;
            }
        }
        config.notify_at = wanted;
        Ok(())
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        // A quadword is two dwords; the fields are naturally aligned.
        let (first, second) = data.split_at(data.len().min(4));
        self.write_common_word(offset, first);
        if second.len() == 4 {
            self.write_common_word(offset + 4, second);
        }
    }

    fn write_common_word(&self, offset: u64, data: &[u8]) {
        let mut common = self.common();
        match common.write(offset, to_number(data) as u32, data.len()) {
            Effect::None => {}
            Effect::Reset => {
                self.device.reset();
                self.link.reset();
                common.reset();
            }
            Effect::Activate => self.activate(&common),
            Effect::ConfigVector(vector) => self.link.config_vector.store(vector, Ordering::SeqCst),
            Effect::QueueVector { queue, vector } => {
                self.link.queue_vectors[queue].store(vector, Ordering::SeqCst);
            }
        }
    }

    fn activate(&self, common: &Common) {
        match common.build_queues(&self.memory) {
            Some(queues) => self.device.activate(common.driver_features, queues),
            None => self.link.set_needs_reset(),
        }
    }

    fn notify(&self, offset: u64) {
        let queue = (offset / u64::from(NOTIFY_MULTIPLIER)) as usize;
        if let Some(event) = self.device.queue_events().get(queue) {
            signal(event);
        }
    }
}

/// A full counter is as good: the signal is there already.
fn signal(event: &vmm_sys_util::eventfd::EventFd) {
    let _signalled = event.write(1);
}

impl PciDevice for VirtioPci {
    fn config_read(&self, register: u8, data: &mut [u8]) {
        let mut config = self.config();
        if config.is_window_data(register)
            && let Some((offset, length)) = config.window()
        {
            let mut window = [0; 4];
            self.bar_read(offset, &mut window[..length]);
            let at = config.window_at + WINDOW_DATA;
            config.space.set(at, &window);
        }
        config.space.read(register, data);
    }

    fn config_write(&self, register: u8, data: &[u8]) {
        let mut config = self.config();
        config.space.write(register, data);
        if let Err(error) = self.sync_doorbells(&mut config) {
            tracing::error!(%error, "the doorbells of a virtio device cannot be moved");
        }
        let control = config.msix_control();
        let window = config.is_window_data(register).then(|| config.window()).flatten();
        let word = config.space.dword(config.window_at + WINDOW_DATA).to_le_bytes();
        drop(config);
        self.link.msix.set_control(control);
        if let Some((offset, length)) = window {
            self.bar_write(offset, &word[..length]);
        }
    }

    fn bar_offset(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.config().space.bar0()?)?;
        (offset < u64::from(BAR_BYTES)).then_some(offset)
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = offset & !REGION_MASK;
        match offset & REGION_MASK {
            COMMON => {
                let image = self.common().image(self.link.needs_reset());
                for (at, byte) in (at as usize..).zip(data) {
                    *byte = image.get(at).copied().unwrap_or(0);
                }
            }
            ISR if at == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.link.isr.swap(0, Ordering::SeqCst);
                }
            }
            DEVICE => self.device.read_config(at, data),
            MSIX_TABLE => self.link.msix.read_table(at, data),
            MSIX_PENDING => self.link.msix.read_pending(at, data),
            _ => {}
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        let at = offset & !REGION_MASK;
        match offset & REGION_MASK {
            COMMON if at < COMMON_BYTES => self.write_common(at, data),
            NOTIFY => self.notify(at),
            MSIX_TABLE => self.link.msix.write_table(at, data),
            _ => {}
        }
    }
}

/// Where offset, length and data are in the configuration access capability.
const WINDOW_OFFSET: u8 = 8;
const WINDOW_LENGTH: u8 = 12;
const WINDOW_DATA: u8 = 16;

impl Config {
    fn new(device: &dyn VirtioDevice, slot: usize) -> Self {
        let kind = device.device_type();
        let queues = device.queue_sizes().len() as u32;
        let mut space = ConfigSpace::new(VENDOR_VIRTIO, DEVICE_MODERN + kind, device.pci_class());
        space.set_subsystem(VENDOR_VIRTIO, DEVICE_MODERN + kind);
        let bar = layout::PCI_WINDOW_START + slot as u64 * layout::PCI_SLOT_BYTES;
        space.set_bar0(bar as u32, BAR_BYTES);
        space.add_capability(CAPABILITY_VENDOR, &region(1, COMMON, COMMON_BYTES as u32));
        space.add_capability(CAPABILITY_VENDOR, &region(3, ISR, 1));
        space.add_capability(CAPABILITY_VENDOR, &region(4, DEVICE, DEVICE_CONFIG_BYTES));
        let mut notify = region(2, NOTIFY, queues * NOTIFY_MULTIPLIER);
        notify[0] = 20;
        notify.extend(NOTIFY_MULTIPLIER.to_le_bytes());
        space.add_capability(CAPABILITY_VENDOR, &notify);
        let window_at = add_window(&mut space);
        let msix_at = add_msix(&mut space, queues as u16 + 1);
        Self { space, msix_at, window_at, notify_at: None }
    }

    fn msix_control(&self) -> u16 {
        (self.space.dword(self.msix_at) >> 16) as u16
    }

    fn is_window_data(&self, register: u8) -> bool {
        register & 0xfc == self.window_at + WINDOW_DATA
    }

    /// The BAR access that the window stands for: offset and length.
    fn window(&self) -> Option<(u64, usize)> {
        let offset = u64::from(self.space.dword(self.window_at + WINDOW_OFFSET));
        let length = self.space.dword(self.window_at + WINDOW_LENGTH) as usize;
        let valid = matches!(length, 1 | 2 | 4) && offset < u64::from(BAR_BYTES);
        (valid && offset.is_multiple_of(length as u64)).then_some((offset, length))
    }
}

/// A vendor capability without id and link: length, type, BAR 0, offset, length.
fn region(kind: u8, offset: u64, length: u32) -> Vec<u8> {
    let mut body = vec![16, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body
}

/// Access to the BAR through the configuration space, for firmware (virtio 1.2, 4.1.4.9).
fn add_window(space: &mut ConfigSpace) -> u8 {
    let mut window = region(5, 0, 0);
    window[0] = 20;
    window.extend([0; 4]);
    let at = space.add_capability(CAPABILITY_VENDOR, &window);
    space.allow(at + WINDOW_OFFSET, &[0xff; 12]);
    at
}

fn add_msix(space: &mut ConfigSpace, vectors: u16) -> u8 {
    let mut body = (vectors - 1).to_le_bytes().to_vec();
    body.extend((MSIX_TABLE as u32).to_le_bytes());
    body.extend((MSIX_PENDING as u32).to_le_bytes());
    let at = space.add_capability(CAPABILITY_MSIX, &body);
    space.allow(at + 2, &[0, 0xc0]);
    at
}
