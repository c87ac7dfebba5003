//! The virtio network card (virtio 1.2, 5.1) on a tap.
//!
//! One thread moves packets both ways. The header of virtio and of the tap are the same, so what the
//! driver leaves undone in a packet (checksum, segmentation) is for whoever gets it: another guest, or
//! the host's own card. A card whose guest gives no buffers makes the host's queue wait, and then drop.

mod saved;
mod tap;

pub use saved::NetV1;
pub use tap::{Tap, TapError};

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use bellwether_types::Mac;
use virtio_queue::Queue;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::virtio::engine::{Backend, Broken, Engine, Queues};
use super::virtio::{Chain, FEATURE_INDIRECT, FEATURE_VERSION_1, Link, VirtioDevice};
use crate::GuestMemory;
use crate::gate::Gate;
use tap::{HEADER_BYTES, OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
const DEVICE_TYPE: u16 = 1;
const PCI_CLASS: u32 = 0x02_0000;

const FEATURE_CSUM: u64 = 1 << 0;
const FEATURE_GUEST_CSUM: u64 = 1 << 1;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_GUEST_TSO4: u64 = 1 << 7;
const FEATURE_GUEST_TSO6: u64 = 1 << 8;
const FEATURE_HOST_TSO4: u64 = 1 << 11;
const FEATURE_HOST_TSO6: u64 = 1 << 12;
const FEATURE_STATUS: u64 = 1 << 16;
const STATUS_LINK_UP: u16 = 1;

/// The largest packet that segmentation leaves whole, with its header.
const PACKET_BYTES_MAX: usize = HEADER_BYTES + 65_550;
/// Packets that are moved in one go in one direction, so that neither starves the other.
const BURST: usize = 64;

/// One network card.
pub struct Net {
    engine: Arc<Engine>,
    tap: Arc<Tap>,
    mac: Mac,
}

impl Net {
    pub fn new(
        tap: Tap,
        mac: Mac,
        memory: GuestMemory,
        gate: Arc<Gate>,
        link: Arc<Link>,
    ) -> io::Result<Self> {
        let tap = Arc::new(tap);
        let cable = Cable {
            tap: Arc::clone(&tap),
            packet: vec![0; PACKET_BYTES_MAX].into_boxed_slice(),
            is_starved: false,
        };
        let engine = Engine::start("net", QUEUE_SIZES.len(), memory, gate, link, cable)?;
        Ok(Self { engine, tap, mac })
    }

    pub fn save(&self) -> NetV1 {
        NetV1 { mac: self.mac, engine: self.engine.save() }
    }

    pub fn restore(&self, state: &NetV1) -> Result<(), String> {
        if state.mac != self.mac {
            return Err(format!(
                "the VM was saved with the address {}, not {}",
                state.mac, self.mac
            ));
        }
        self.engine.restore(&state.engine)?;
        self.set_offloads(state.engine.features);
        Ok(())
    }

    /// The guest runs from now on: connects the cable, and tells the network where the address is.
    pub fn connect(&self) {
        let connected = self.tap.set_up(true);
        if let Err(error) = connected {
            tracing::error!(%error, "a network card has no link");
            return;
        }
        if let Err(error) = self.tap.send(&announcement(self.mac)) {
            tracing::warn!(%error, tap = self.tap.name(), "the network is not told of a guest's place");
        }
    }

    fn set_offloads(&self, features: u64) {
        if let Err(error) = self.tap.set_offloads(offloads(features)) {
            tracing::warn!(%error, "packets for a guest are completed by the host");
        }
    }
}

/// What the tap may leave undone for a guest that accepted these features.
fn offloads(features: u64) -> u32 {
    let pairs = [
        (FEATURE_GUEST_CSUM, OFFLOAD_CHECKSUM),
        (FEATURE_GUEST_CSUM | FEATURE_GUEST_TSO4, OFFLOAD_TSO4),
        (FEATURE_GUEST_CSUM | FEATURE_GUEST_TSO6, OFFLOAD_TSO6),
    ];
    pairs.into_iter().filter(|(needs, _)| features & needs == *needs).map(|(_, bit)| bit).sum()
}

/// A broadcast from the guest's address, so that bridges and switches learn where it is now: a
/// request of RARP (RFC 903) for its own address, which nobody needs to answer.
fn announcement(mac: Mac) -> Vec<u8> {
    const RARP: [u8; 2] = [0x80, 0x35];
    /// Ethernet, IPv4, their lengths, a reverse request.
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
    const FRAME_BYTES_MIN: usize = 60;
    let mut packet = [&[0; HEADER_BYTES][..], &[0xff; 6], &mac.0, &RARP, &REQUEST].concat();
    for _sender_then_target in 0..2 {
        packet.extend(mac.0);
        packet.extend([0; 4]);
    }
    packet.resize(HEADER_BYTES + FRAME_BYTES_MIN, 0);
    packet
}

/// The thread's part.
struct Cable {
    tap: Arc<Tap>,
    packet: Box<[u8]>,
    /// The driver has given no buffer for what the host has.
    is_starved: bool,
}

impl Backend for Cable {
    fn host(&self) -> Option<BorrowedFd<'_>> {
        (!self.is_starved).then(|| self.tap.as_fd())
    }

    fn serve(&mut self, queues: &mut Queues<'_>) -> Result<bool, Broken> {
        let sent = self.transmit(queues)?;
        let received = self.receive(queues)?;
        Ok(sent == BURST || received == BURST)
    }
}

impl Cable {
    fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<usize, Broken> {
        for count in 0..BURST {
            let Some(chain) = queues.pop(TRANSMIT)? else { return Ok(count) };
            let len = gather(&chain, queues.memory, &mut self.packet)?;
            // The host refuses what is no packet, or when its queue is full.
            if let Err(error) = self.tap.send(&self.packet[..len]) {
                tracing::debug!(%error, len, tap = self.tap.name(), "a packet is lost");
            }
            queues.push(TRANSMIT, chain.head, 0)?;
        }
        Ok(BURST)
    }

    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<usize, Broken> {
        for count in 0..BURST {
            let next = queues.pop(RECEIVE)?;
            self.is_starved = next.is_none();
            let Some(chain) = next else { return Ok(count) };
            let len = match self.tap.receive(&mut self.packet) {
                Ok(Some(len)) => len,
                Ok(None) => {
                    queues.unpop(RECEIVE);
                    return Ok(count);
                }
                Err(_) => {
                    queues.unpop(RECEIVE);
                    return Err(Broken::Host("its tap is gone"));
                }
            };
            // The number of buffers: without mergeable buffers it is one.
            self.packet[10..HEADER_BYTES].copy_from_slice(&1u16.to_le_bytes());
            let written = scatter(&chain, queues.memory, &self.packet[..len])?;
            queues.push(RECEIVE, chain.head, written)?;
        }
        Ok(BURST)
    }
}

/// Copies what the driver sends; a packet that is too large is cut, and the host refuses it.
fn gather(chain: &Chain, memory: &GuestMemory, packet: &mut [u8]) -> Result<usize, Broken> {
    let mut done = 0;
    for &piece in &chain.readable {
        let len = (piece.len as usize).min(packet.len() - done);
        let part = &mut packet[done..done + len];
        memory.read_slice(part, piece.address).map_err(|_| Broken::Outside(piece))?;
        done += len;
    }
    Ok(done)
}

/// Copies a packet to the driver; returns how much of it had room.
fn scatter(chain: &Chain, memory: &GuestMemory, packet: &[u8]) -> Result<u32, Broken> {
    let mut done = 0;
    for &piece in &chain.writable {
        let len = (piece.len as usize).min(packet.len() - done);
        let part = &packet[done..done + len];
        memory.write_slice(part, piece.address).map_err(|_| Broken::Outside(piece))?;
        done += len;
    }
    Ok(done as u32)
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1
            | FEATURE_INDIRECT
            | FEATURE_MAC
            | FEATURE_STATUS
            | FEATURE_CSUM
            | FEATURE_GUEST_CSUM
            | FEATURE_GUEST_TSO4
            | FEATURE_GUEST_TSO6
            | FEATURE_HOST_TSO4
            | FEATURE_HOST_TSO6
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// mac (6), status (2); the rest is not offered.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let image = [&self.mac.0[..], &STATUS_LINK_UP.to_le_bytes()].concat();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn queue_events(&self) -> &[EventFd] {
        self.engine.doorbells()
    }

    fn activate(&self, features: u64, queues: Vec<Option<Queue>>) {
        self.set_offloads(features);
        self.engine.activate(features, queues);
    }

    fn reset(&self) {
        self.engine.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_announcement_comes_from_the_guests_address() {
        let mac: Mac = "02:00:5e:10:00:01".parse().unwrap();
        let packet = announcement(mac);
        assert_eq!(packet.len(), 12 + 60);
        assert_eq!(packet[..12], [0; 12]);
        assert_eq!(packet[12..18], [0xff; 6]);
        assert_eq!(packet[18..24], mac.0);
        assert_eq!(packet[24..34], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&packet[34..40], &packet[44..50]), (&mac.0[..], &mac.0[..]));
    }

    #[test]
    fn segmentation_is_left_to_the_guest_only_with_checksums() {
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(FEATURE_GUEST_TSO4), 0);
        assert_eq!(offloads(FEATURE_GUEST_CSUM), OFFLOAD_CHECKSUM);
        let all = FEATURE_GUEST_CSUM | FEATURE_GUEST_TSO4 | FEATURE_GUEST_TSO6;
        assert_eq!(offloads(all), 7);
    }
}
