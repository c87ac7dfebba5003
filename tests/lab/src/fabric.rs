//! The networks of the lab: a switch for each, with a port for each host, over the sockets that
//! QEMU's stream network device speaks (length, then frame). No privileges, no devices of this
//! machine, and each cable can be cut in each direction.
//!
//! ```text
//! host --socket--> reader --(cut out?)--> by address --(cut in?)--> queue --> writer --socket--> host
//! ```
//!
//! A port outlives its machine: when a machine goes away the port waits for the next one. A host
//! that takes nothing (it is frozen) fills its own queue, and what comes then is lost, as in any switch.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use serde::Serialize;

/// Frames that wait for a slow host.
const QUEUE_FRAMES: usize = 1024;
/// QEMU's own limit.
const FRAME_BYTES_MAX: usize = 68 << 10;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    Management,
    Storage,
    Guests,
}

impl Network {
    pub const ALL: [Self; 3] = [Self::Management, Self::Storage, Self::Guests];

    pub fn name(self) -> &'static str {
        match self {
            Self::Management => "management",
            Self::Storage => "storage",
            Self::Guests => "guests",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|network| network.name() == text)
    }
}

/// As the host sees it: `Out` is what it sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    In,
    Out,
    Both,
}

type Frame = Arc<[u8]>;

/// One host's end of one network.
struct Port {
    mac: [u8; 6],
    queue: SyncSender<Frame>,
    cut_in: AtomicBool,
    cut_out: AtomicBool,
    /// Frames that a cut swallowed, in either direction.
    lost: AtomicU64,
}

/// The ports of each network, with the names of their hosts.
type Switches = BTreeMap<Network, Vec<(String, Arc<Port>)>>;

/// All networks.
#[derive(Clone, Default)]
pub struct Fabric {
    switches: Arc<Mutex<Switches>>,
}

/// The address of a host's card: the network and the host's number are in it.
pub fn mac(network: Network, host_index: u8) -> [u8; 6] {
    [0x52, 0x54, 0x00, 0x1a, network as u8, host_index]
}

impl Fabric {
    /// Adds a port, to which a machine connects at `socket`.
    pub fn attach(&self, network: Network, host: &str, mac: [u8; 6], socket: &Path) -> Result<()> {
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("listen on {}", socket.display()))?;
        let (queue, frames) = sync_channel(QUEUE_FRAMES);
        let port = Arc::new(Port {
            mac,
            queue,
            cut_in: AtomicBool::new(false),
            cut_out: AtomicBool::new(false),
            lost: AtomicU64::new(0),
        });
        self.lock().entry(network).or_default().push((host.to_owned(), port.clone()));
        let stream: Socket = Arc::default();
        let fabric = self.clone();
        let connected = stream.clone();
        thread::spawn(move || fabric.accept(&listener, network, &port, &connected));
        thread::spawn(move || write_frames(&frames, &stream));
        Ok(())
    }

    /// Cuts a cable, or plugs it in again.
    pub fn set_cut(
        &self,
        network: Network,
        host: &str,
        direction: Direction,
        cut: bool,
    ) -> Result<()> {
        let port = self.port(network, host)?;
        if direction != Direction::Out {
            port.cut_in.store(cut, Ordering::Relaxed);
        }
        if direction != Direction::In {
            port.cut_out.store(cut, Ordering::Relaxed);
        }
        Ok(())
    }

    /// How many frames cuts of this cable have swallowed so far.
    pub fn lost(&self, network: Network, host: &str) -> Result<u64> {
        Ok(self.port(network, host)?.lost.load(Ordering::Relaxed))
    }

    fn port(&self, network: Network, host: &str) -> Result<Arc<Port>> {
        let switches = self.lock();
        let found = switches.get(&network).into_iter().flatten().find(|(name, _)| name == host);
        let (_, port) = found
            .with_context(|| format!("{host} has no cable to the {} network", network.name()))?;
        Ok(port.clone())
    }

    pub fn heal_all(&self) {
        for (_, port) in self.lock().values().flatten() {
            port.cut_in.store(false, Ordering::Relaxed);
            port.cut_out.store(false, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Switches> {
        self.switches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, listener: &UnixListener, network: Network, port: &Arc<Port>, stream: &Socket) {
        for connection in listener.incoming().flatten() {
            *stream.lock().unwrap_or_else(PoisonError::into_inner) = connection.try_clone().ok();
            // The end of a machine: the port waits for the next one.
            let _ = self.forward(connection, network, port);
            *stream.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    fn forward(&self, stream: UnixStream, network: Network, port: &Arc<Port>) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(256 << 10, stream);
        loop {
            let frame = read_frame(&mut reader)?;
            if port.cut_out.load(Ordering::Relaxed) {
                port.lost.fetch_add(1, Ordering::Relaxed);
            } else if frame.len() >= 18 {
                self.deliver(&frame, network, port);
            }
        }
    }

    fn deliver(&self, frame: &Frame, network: Network, from: &Arc<Port>) {
        // The length of four bytes comes first, then the destination's address.
        let to = &frame[4..10];
        let switches = self.lock();
        let ports = switches.get(&network).map_or(&[][..], Vec::as_slice);
        let known = ports.iter().find(|(_, port)| port.mac == to);
        let others = ports.iter().filter(|(_, port)| !Arc::ptr_eq(port, from));
        let targets =
            others.filter(|(_, port)| known.is_none_or(|(_, known)| Arc::ptr_eq(port, known)));
        for (_, port) in targets {
            if port.cut_in.load(Ordering::Relaxed) {
                port.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            match port.queue.try_send(frame.clone()) {
                // Full: lost.
                Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
            }
        }
    }
}

type Socket = Arc<Mutex<Option<UnixStream>>>;

/// A frame with its length before it, as it came and as it goes on.
fn read_frame(reader: &mut impl Read) -> io::Result<Frame> {
    let mut length = [0; 4];
    reader.read_exact(&mut length)?;
    let bytes = u32::from_be_bytes(length) as usize;
    if bytes > FRAME_BYTES_MAX {
        return Err(io::Error::other(format!("a frame of {bytes} bytes")));
    }
    let mut frame = vec![0; 4 + bytes];
    frame[..4].copy_from_slice(&length);
    reader.read_exact(&mut frame[4..])?;
    Ok(frame.into())
}

fn write_frames(frames: &Receiver<Frame>, stream: &Socket) {
    for frame in frames {
        let connected = stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(UnixStream::try_clone);
        // Nobody is there, or it goes away meanwhile: the frame is lost.
        if let Some(Ok(mut connected)) = connected {
            let _ = connected.write_all(&frame);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Card(UnixStream);

    impl Card {
        fn plug(fabric: &Fabric, directory: &Path, host: &str, index: u8) -> Self {
            let socket = directory.join(host);
            fabric.attach(Network::Storage, host, mac(Network::Storage, index), &socket).unwrap();
            let stream = UnixStream::connect(&socket).unwrap();
            stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
            Self(stream)
        }

        fn send(&mut self, to: [u8; 6], text: &[u8]) {
            let mut frame = ((6 + 8 + text.len()) as u32).to_be_bytes().to_vec();
            frame.extend(to);
            frame.extend([0; 8]);
            frame.extend(text);
            self.0.write_all(&frame).unwrap();
        }

        fn receive(&mut self) -> Vec<u8> {
            read_frame(&mut self.0).unwrap()[18..].to_vec()
        }
    }

    const EVERYBODY: [u8; 6] = [0xff; 6];

    #[test]
    fn a_cable_is_cut_in_each_direction() {
        let directory = std::env::temp_dir().join(format!("bw-fabric-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&directory).unwrap();
        let fabric = Fabric::default();
        let mut a = Card::plug(&fabric, &directory, "a", 1);
        let mut b = Card::plug(&fabric, &directory, "b", 2);
        let mut c = Card::plug(&fabric, &directory, "c", 3);
        // A broadcast reaches both; what is for one reaches that one only. Whether a writer has
        // seen its connection yet is known only from what arrives.
        until_heard(&mut a, &mut b);
        until_heard(&mut b, &mut a);
        until_heard(&mut a, &mut c);
        a.send(mac(Network::Storage, 2), b"for b");
        a.send(EVERYBODY, b"for all");
        assert_eq!((drain(&mut b, b"for all"), drain(&mut c, b"for all")), (true, false));

        fabric.set_cut(Network::Storage, "b", Direction::In, true).unwrap();
        a.send(EVERYBODY, b"lost");
        until_lost(&fabric, 1);
        b.send(EVERYBODY, b"from b");
        assert!(!drain(&mut a, b"from b"));
        fabric.set_cut(Network::Storage, "b", Direction::In, false).unwrap();
        fabric.set_cut(Network::Storage, "b", Direction::Out, true).unwrap();
        b.send(EVERYBODY, b"lost");
        until_lost(&fabric, 2);
        a.send(EVERYBODY, b"end");
        assert!(!drain(&mut b, b"end"), "what came while the cable was cut came later");
        fabric.heal_all();
        b.send(EVERYBODY, b"end");
        assert!(!drain(&mut a, b"end"), "what was sent while the cable was cut came later");
        std::fs::remove_dir_all(directory).unwrap();
    }

    fn until_lost(fabric: &Fabric, frames: u64) {
        while fabric.lost(Network::Storage, "b").unwrap() < frames {
            thread::yield_now();
        }
    }

    fn until_heard(from: &mut Card, to: &mut Card) {
        to.0.set_read_timeout(Some(std::time::Duration::from_millis(50))).unwrap();
        loop {
            from.send(EVERYBODY, b"hello");
            if read_frame(&mut to.0).is_ok() {
                break;
            }
        }
        to.0.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    }

    /// Reads up to the text; true if something that is neither it nor a greeting came before it.
    fn drain(card: &mut Card, last: &[u8]) -> bool {
        let mut other = false;
        loop {
            match card.receive() {
                text if text == last => return other,
                text => other |= text != b"hello",
            }
        }
    }
}
