//! The common configuration (virtio 1.2, 4.1.4.3): negotiation and the queues' addresses.
//!
//! A driver cannot take back what it has said: features are fixed by FEATURES_OK, a queue's
//! registers by enabling it, and everything by DRIVER_OK. Later writes are ignored; only a reset
//! begins anew. (Registers that changed under an active device were a class of CVEs.)

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::{FEATURE_VERSION_1, NO_VECTOR, QueueConfigV1};
use crate::GuestMemory;

pub const COMMON_BYTES: u64 = 0x38;

pub const STATUS_DRIVER_OK: u8 = 4;
pub const STATUS_FEATURES_OK: u8 = 8;
pub const STATUS_NEEDS_RESET: u8 = 64;
const STATUS_WRITABLE: u8 = 0x8f;

/// What a write asks the transport to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    Reset,
    Activate,
    ConfigVector(u16),
    QueueVector { queue: usize, vector: u16 },
}

/// The registers of the common configuration.
#[derive(Clone, Debug)]
pub struct Common {
    pub device_features: u64,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub status: u8,
    pub queue_select: u16,
    pub config_vector: u16,
    pub queues: Vec<QueueConfigV1>,
    sizes_max: Vec<u16>,
    vectors: u16,
}

impl Common {
    pub fn new(device_features: u64, sizes_max: &[u16], vectors: u16) -> Self {
        let mut common = Self {
            device_features,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            config_vector: NO_VECTOR,
            queues: vec![],
            sizes_max: sizes_max.to_vec(),
            vectors,
        };
        common.reset();
        common
    }

    /// The state after power-on.
    pub fn reset(&mut self) {
        let queue = |&size: &u16| QueueConfigV1 { size, vector: NO_VECTOR, ..Default::default() };
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.status = 0;
        self.queue_select = 0;
        self.config_vector = NO_VECTOR;
        self.queues = self.sizes_max.iter().map(queue).collect();
    }

    pub fn is_active(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0
    }

    /// The registers as bytes; `needs_reset` is the device's own part of the status.
    pub fn image(&self, needs_reset: bool) -> [u8; COMMON_BYTES as usize] {
        let mut image = [0; COMMON_BYTES as usize];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let queue = self.queues.get(usize::from(self.queue_select)).copied().unwrap_or_default();
        let status = self.status | if needs_reset { STATUS_NEEDS_RESET } else { 0 };
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(self.device_features, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[status, 0]);
        put(0x16, &self.queue_select.to_le_bytes());
        put(0x18, &queue.size.to_le_bytes());
        put(0x1a, &queue.vector.to_le_bytes());
        put(0x1c, &u16::from(queue.enabled).to_le_bytes());
        put(0x1e, &self.queue_select.to_le_bytes());
        put(0x20, &queue.descriptors.to_le_bytes());
        put(0x28, &queue.driver.to_le_bytes());
        put(0x30, &queue.device.to_le_bytes());
        image
    }

    /// One write of 1, 2 or 4 bytes to one register, or to half of a 64-bit one.
    pub fn write(&mut self, offset: u64, value: u32, len: usize) -> Effect {
        match (offset, len) {
            (0x00, 4) => self.device_feature_select = value,
            (0x08, 4) => self.driver_feature_select = value,
            (0x0c, 4) => self.write_features(value),
            (0x10, 2) => return self.write_config_vector(value as u16),
            (0x14, 1) => return self.write_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1a, 2) => return self.write_queue_vector(value as u16),
            _ => self.write_queue(offset, value, len),
        }
        Effect::None
    }

    fn write_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Bits are only added; FEATURES_OK stays off if the features are not ours to give.
    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let mut added = value & STATUS_WRITABLE & !self.status;
        let unknown = self.driver_features & !self.device_features;
        if unknown != 0 || self.driver_features & FEATURE_VERSION_1 == 0 {
            added &= !STATUS_FEATURES_OK;
        }
        if (self.status | added) & STATUS_FEATURES_OK == 0 {
            added &= !STATUS_DRIVER_OK;
        }
        self.status |= added;
        if added & STATUS_DRIVER_OK != 0 { Effect::Activate } else { Effect::None }
    }

    fn write_config_vector(&mut self, vector: u16) -> Effect {
        self.config_vector = self.valid_vector(vector);
        Effect::ConfigVector(self.config_vector)
    }

    fn write_queue_vector(&mut self, vector: u16) -> Effect {
        let queue = usize::from(self.queue_select);
        let vector = self.valid_vector(vector);
        match self.queues.get_mut(queue) {
            Some(config) => config.vector = vector,
            None => return Effect::None,
        }
        Effect::QueueVector { queue, vector }
    }

    fn valid_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn write_queue(&mut self, offset: u64, value: u32, len: usize) {
        let active = self.is_active();
        let index = usize::from(self.queue_select);
        let Some(queue) = self.queues.get_mut(index) else { return };
        if active || queue.enabled {
            return;
        }
        let size_max = self.sizes_max[index];
        match (offset, len) {
            (0x18, 2) if (value as u16).is_power_of_two() && value as u16 <= size_max => {
                queue.size = value as u16;
            }
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20, 4) => set_low(&mut queue.descriptors, value),
            (0x24, 4) => set_high(&mut queue.descriptors, value),
            (0x28, 4) => set_low(&mut queue.driver, value),
            (0x2c, 4) => set_high(&mut queue.driver, value),
            (0x30, 4) => set_low(&mut queue.device, value),
            (0x34, 4) => set_high(&mut queue.device, value),
            _ => {}
        }
    }

    /// The queues that the driver enabled; `None` in whole if one of them is not in guest memory.
    pub fn build_queues(&self, memory: &GuestMemory) -> Option<Vec<Option<Queue>>> {
        let build = |(config, &size_max): (&QueueConfigV1, &u16)| {
            if !config.enabled {
                return Some(None);
            }
            build_queue(config, size_max).filter(|queue| queue.is_valid(memory)).map(Some)
        };
        self.queues.iter().zip(&self.sizes_max).map(build).collect()
    }
}

fn build_queue(config: &QueueConfigV1, size_max: u16) -> Option<Queue> {
    let mut queue = Queue::new(size_max).ok()?;
    queue.try_set_size(config.size).ok()?;
    queue.try_set_desc_table_address(GuestAddress(config.descriptors)).ok()?;
    queue.try_set_avail_ring_address(GuestAddress(config.driver)).ok()?;
    queue.try_set_used_ring_address(GuestAddress(config.device)).ok()?;
    queue.set_ready(true);
    Some(queue)
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word & !0xffff_ffff | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn negotiated() -> Common {
        let mut common = Common::new(FEATURE_VERSION_1 | 1 << 9, &[256], 2);
        common.write(0x14, 1 | 2, 1);
        common.write(0x08, 1, 4);
        common.write(0x0c, 1, 4);
        common.write(0x14, 1 | 2 | 8, 1);
        common
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let mut common = Common::new(FEATURE_VERSION_1, &[256], 2);
        common.write(0x0c, 1 << 5, 4);
        common.write(0x08, 1, 4);
        common.write(0x0c, 1, 4);
        common.write(0x14, 8, 1);
        assert_eq!(common.status & STATUS_FEATURES_OK, 0);
        assert_eq!(common.write(0x14, 4, 1), Effect::None);
        assert!(!common.is_active());
    }

    #[test]
    fn nothing_changes_after_activation() {
        let mut common = negotiated();
        common.write(0x18, 128, 2);
        common.write(0x20, 0x1000, 4);
        common.write(0x1c, 1, 2);
        assert_eq!(common.write(0x14, 15, 1), Effect::Activate);
        let before = common.clone();
        for (offset, len) in
            [(0x18, 2), (0x1c, 2), (0x20, 4), (0x24, 4), (0x28, 4), (0x30, 4), (0x0c, 4)]
        {
            common.write(offset, 0x40, len);
        }
        assert_eq!(common.queues, before.queues);
        assert_eq!(common.driver_features, before.driver_features);
        assert_eq!(common.write(0x14, 15, 1), Effect::None);
        assert_eq!(common.write(0x14, 0, 1), Effect::Reset);
    }

    #[test]
    fn sizes_and_vectors_out_of_bounds_are_ignored() {
        let mut common = negotiated();
        for size in [0, 3, 512] {
            common.write(0x18, size, 2);
            assert_eq!(common.queues[0].size, 256);
        }
        assert_eq!(common.write(0x1a, 2, 2), Effect::QueueVector { queue: 0, vector: NO_VECTOR });
        common.write(0x16, 1, 2);
        assert_eq!(common.write(0x1a, 0, 2), Effect::None);
        assert_eq!(common.image(false)[0x18..0x1a], [0, 0]);
    }
}
