//! The saved forms of the transport and of a queue.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use crate::devices::saved::SavedForm;

/// One entry of the MSI-X table as a guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntryV1 {
    pub address: u64,
    pub data: u32,
    pub masked: bool,
}

/// What the driver has said of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueConfigV1 {
    pub size: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    pub vector: u16,
}

/// One virtio device's PCI transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciV1 {
    /// The 256 bytes of the configuration space.
    pub config: Vec<u8>,
    pub msix_control: u16,
    pub msix: Vec<MsixEntryV1>,
    pub msix_pending: u64,
    pub isr: u8,
    pub status: u8,
    pub needs_reset: bool,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub queue_select: u16,
    pub config_vector: u16,
    pub queues: Vec<QueueConfigV1>,
}

impl SavedForm for VirtioPciV1 {
    const KIND: &'static str = "virtio-pci";
    const VERSION: u32 = 1;
}

/// A queue in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueV1 {
    pub max_size: u16,
    pub size: u16,
    pub next_avail: u16,
    pub next_used: u16,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
}

impl QueueV1 {
    pub fn of(queue: &Queue) -> Self {
        Self {
            max_size: queue.max_size(),
            size: queue.size(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            descriptors: queue.desc_table(),
            driver: queue.avail_ring(),
            device: queue.used_ring(),
        }
    }

    /// The queue again; an error if the numbers make none.
    pub fn to_queue(self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: false,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.driver,
            used_ring: self.device,
        })
    }
}
