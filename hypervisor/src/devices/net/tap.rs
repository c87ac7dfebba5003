//! A tap: the host's end of a network card, plugged into a Linux bridge.
//!
//! The kernel chooses a free name, so that two VMMs of one VM (the old one and the one that takes
//! over) can be there at once. The interface goes with the process. It is down until the guest runs:
//! a bridge floods into every port that is up, and what came before the guest is not for it.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_int, c_uint, ifreq};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

/// Packets of a guest begin with a `virtio_net_hdr_v1`.
pub const HEADER_BYTES: usize = 12;

const TUNTAP: c_uint = b'T' as c_uint;
ioctl_iow_nr!(TUNSETIFF, TUNTAP, 202, c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, TUNTAP, 208, c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUNTAP, 216, c_int);

/// Makes an interface a port of a bridge (linux/sockios.h).
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// What the host may leave undone in packets for the guest.
pub const OFFLOAD_CHECKSUM: u32 = 1;
pub const OFFLOAD_TSO4: u32 = 2;
pub const OFFLOAD_TSO6: u32 = 4;

/// Why a network card has no end on the host.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("open /dev/net/tun: {0}; is the module tun loaded?")]
    Open(#[source] io::Error),
    #[error("make a tap: {0}; this needs CAP_NET_ADMIN")]
    Make(#[source] io::Error),
    #[error(
        "this host has no bridge `{0}`; make it (`ip link add {0} type bridge`), by the same name on every node that may run the VM"
    )]
    NoBridge(String),
    #[error("plug tap {tap} into `{bridge}`: {source}; is it a Linux bridge?")]
    Plug { tap: String, bridge: String, source: io::Error },
    #[error("tap {tap}: {what}: {source}")]
    Call { tap: String, what: &'static str, source: io::Error },
}

pub struct Tap {
    file: File,
    /// Network interfaces are asked and changed through any socket.
    control: OwnedFd,
    name: String,
}

impl Tap {
    /// Makes a tap and plugs it into `bridge`; it stays down.
    pub fn plug(bridge: &str) -> Result<Self, TapError> {
        let flags = SocketFlags::CLOEXEC;
        let control = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)
            .map_err(|error| TapError::Make(error.into()))?;
        let bridge_index = index_of(&control, bridge);
        if bridge_index.is_err() {
            return Err(TapError::NoBridge(bridge.to_owned()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(TapError::Open)?;
        let mut request = named("bw%d");
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the kernel reads and writes exactly one ifreq.
        check(unsafe { ioctl_with_mut_ref(&file, TUNSETIFF(), &mut request) })
            .map_err(TapError::Make)?;
        let tap = Self { file, control, name: name_of(&request) };
        let size = HEADER_BYTES as c_int;
        // SAFETY: the kernel reads exactly one int.
        check(unsafe { ioctl_with_ref(&tap.file, TUNSETVNETHDRSZ(), &size) })
            .map_err(tap.failed("set the size of its header"))?;
        tap.join(bridge)?;
        Ok(tap)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> TapError {
        move |source| TapError::Call { tap: self.name.clone(), what, source }
    }

    fn join(&self, bridge: &str) -> Result<(), TapError> {
        let own = index_of(&self.control, &self.name).map_err(self.failed("find its index"))?;
        let mut request = named(bridge);
        request.ifr_ifru.ifru_ifindex = own;
        // SAFETY: the kernel reads exactly one ifreq.
        check(unsafe { ioctl_with_ref(&self.control, SIOCBRADDIF, &request) }).map_err(|source| {
            TapError::Plug { tap: self.name.clone(), bridge: bridge.to_owned(), source }
        })
    }

    /// Connects the cable, or pulls it.
    pub fn set_up(&self, up: bool) -> Result<(), TapError> {
        let failed = self.failed("switch it on or off");
        let mut request = named(&self.name);
        // SAFETY: the kernel writes exactly one ifreq.
        check(unsafe { ioctl_with_mut_ref(&self.control, libc::SIOCGIFFLAGS as _, &mut request) })
            .map_err(&failed)?;
        let bit = libc::IFF_UP as libc::c_short;
        // SAFETY: the call before has set this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
        // SAFETY: the kernel reads exactly one ifreq.
        check(unsafe { ioctl_with_ref(&self.control, libc::SIOCSIFFLAGS as _, &request) })
            .map_err(&failed)
    }

    /// Says what the guest completes by itself.
    pub fn set_offloads(&self, offloads: u32) -> Result<(), TapError> {
        // SAFETY: the argument is a number.
        check(unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), offloads.into()) })
            .map_err(self.failed("set its offloads"))
    }

    /// One packet with its header; `None` if there is none.
    pub fn receive(&self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.file).read(packet) {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends one packet with its header. What the host does not take is lost, as on a cable.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request about the interface with this name, which is at most 15 bytes long.
fn named(name: &str) -> ifreq {
    // SAFETY: all zeros are a valid ifreq.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.bytes().take(libc::IFNAMSIZ - 1);
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from as libc::c_char;
    }
    request
}

fn name_of(request: &ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|byte| **byte != 0);
    bytes.map(|&byte| char::from(byte as u8)).collect()
}

fn index_of(control: &impl AsRawFd, name: &str) -> io::Result<c_int> {
    let mut request = named(name);
    // SAFETY: the kernel writes exactly one ifreq.
    check(unsafe { ioctl_with_mut_ref(control, libc::SIOCGIFINDEX as _, &mut request) })?;
    // SAFETY: the call has set this member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}
