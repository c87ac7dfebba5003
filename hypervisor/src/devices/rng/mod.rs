//! The virtio entropy device (virtio 1.2, 5.4): fills what the driver gives it from the host's
//! random source.

mod saved;

pub use saved::RngV1;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::Queue;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::virtio::engine::{Backend, Broken, Engine, Queues};
use super::virtio::{Chain, FEATURE_INDIRECT, FEATURE_VERSION_1, Link, VirtioDevice};
use crate::GuestMemory;
use crate::gate::Gate;

const QUEUE_SIZES: [u16; 1] = [64];
const DEVICE_TYPE: u16 = 4;
/// A device that fits no other class.
const PCI_CLASS: u32 = 0xff_0000;
/// More is not given for one request; a driver asks again.
const BYTES_MAX: usize = 4096;

/// One entropy device.
pub struct Rng {
    engine: Arc<Engine>,
}

impl Rng {
    pub fn new(memory: GuestMemory, gate: Arc<Gate>, link: Arc<Link>) -> io::Result<Self> {
        let engine = Engine::start("rng", QUEUE_SIZES.len(), memory, gate, link, Source)?;
        Ok(Self { engine })
    }

    pub fn save(&self) -> RngV1 {
        RngV1 { engine: self.engine.save() }
    }

    pub fn restore(&self, state: &RngV1) -> Result<(), String> {
        self.engine.restore(&state.engine)
    }
}

struct Source;

impl Backend for Source {
    fn host(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn serve(&mut self, queues: &mut Queues<'_>) -> Result<bool, Broken> {
        while let Some(chain) = queues.pop(0)? {
            let written = fill(&chain, queues.memory)?;
            queues.push(0, chain.head, written)?;
        }
        Ok(false)
    }
}

/// Fills the writable descriptors in their order; returns how many bytes they got.
fn fill(chain: &Chain, memory: &GuestMemory) -> Result<u32, Broken> {
    let mut written = 0;
    for &piece in &chain.writable {
        let len = (piece.len as usize).min(BYTES_MAX - written);
        let mut bytes = [0; BYTES_MAX];
        let bytes = random(&mut bytes[..len])?;
        memory.write_slice(bytes, piece.address).map_err(|_| Broken::Outside(piece))?;
        written += bytes.len();
    }
    Ok(written as u32)
}

/// The part that was filled: a large request can be interrupted.
fn random(bytes: &mut [u8]) -> Result<&[u8], Broken> {
    loop {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(count) => return Ok(&bytes[..count]),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return Err(Broken::Host("the host gives no random bytes")),
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_INDIRECT
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// It has no configuration.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn queue_events(&self) -> &[EventFd] {
        self.engine.doorbells()
    }

    fn activate(&self, features: u64, queues: Vec<Option<Queue>>) {
        self.engine.activate(features, queues);
    }

    fn reset(&self) {
        self.engine.reset();
    }
}
