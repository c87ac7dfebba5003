//! What all virtio devices share (virtio 1.2): the PCI transport, MSI-X, and the device's side.

mod chain;
mod common;
pub mod engine;
mod msix;
mod pci;
mod saved;

pub use chain::{Chain, ChainError, PIECES_MAX, Piece};
pub use common::{COMMON_BYTES, Common};
pub use msix::Msix;
pub use pci::VirtioPci;
pub use saved::{MsixEntryV1, QueueConfigV1, QueueV1, VirtioPciV1};

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

/// `VIRTIO_F_VERSION_1`
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC`
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// `VIRTIO_MSI_NO_VECTOR`
pub const NO_VECTOR: u16 = 0xffff;

/// The part of a virtio device that its transport needs.
pub trait VirtioDevice: Send + Sync {
    /// The virtio device type.
    fn device_type(&self) -> u16;
    /// The PCI class, subclass and interface.
    fn pci_class(&self) -> u32;
    fn features(&self) -> u64;
    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// What a guest writes to signal each queue.
    fn queue_events(&self) -> &[EventFd];
    /// The driver is ready: these are its queues, checked to lie in guest memory.
    fn activate(&self, features: u64, queues: Vec<Option<Queue>>);
    /// Back to the state before `activate`; returns when nothing touches guest memory any more.
    fn reset(&self);
}

/// The way from a device to its driver. It takes no lock that the transport holds while it waits
/// for the device.
pub struct Link {
    pub(super) msix: Msix,
    pub(super) isr: AtomicU8,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    pub(super) needs_reset: AtomicBool,
}

impl Link {
    const ISR_QUEUE: u8 = 1;
    const ISR_CONFIG: u8 = 2;

    pub fn new(msix: Msix, queues: usize) -> Arc<Self> {
        Arc::new(Self {
            msix,
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            needs_reset: AtomicBool::new(false),
        })
    }

    /// Tells the driver that a queue has used buffers.
    pub fn notify_queue(&self, queue: usize) {
        self.isr.fetch_or(Self::ISR_QUEUE, Ordering::SeqCst);
        if let Some(vector) = self.queue_vectors.get(queue) {
            self.msix.trigger(vector.load(Ordering::SeqCst));
        }
    }

    /// Tells the driver that the device cannot go on before a reset.
    pub fn set_needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            self.isr.fetch_or(Self::ISR_CONFIG, Ordering::SeqCst);
            self.msix.trigger(self.config_vector.load(Ordering::SeqCst));
        }
    }

    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// What a reset of the device undoes.
    pub fn clear_needs_reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    pub(super) fn reset(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.clear_needs_reset();
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
    }
}
