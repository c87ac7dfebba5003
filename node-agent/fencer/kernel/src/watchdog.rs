//! The parameters of a watchdog that is open. Petting and disarming are plain writes.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::AsFd;

use linux_raw_sys::general::{__u8, __u32};
use linux_raw_sys::ioctl::{WDIOC_GETSUPPORT, WDIOC_GETTIMEOUT, WDIOC_SETTIMEOUT};
use rustix::ioctl::{Getter, Opcode, Updater, ioctl};

/// `WDIOF_SETTIMEOUT`: the period can be set.
const CAN_SET_TIMEOUT: u32 = 0x0080;
/// `WDIOF_MAGICCLOSE`: only a close after the letter V stops it.
const HAS_MAGIC_CLOSE: u32 = 0x0100;

/// `struct watchdog_info`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    options: __u32,
    firmware_version: __u32,
    identity: [__u8; 32],
}

/// What a watchdog says about itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Support {
    pub identity: String,
    pub firmware_version: u32,
    pub can_set_timeout: bool,
    pub has_magic_close: bool,
}

/// Asks a watchdog what it is. Fails with ENOTTY on anything else.
pub fn support(watchdog: impl AsFd) -> io::Result<Support> {
    const OPCODE: Opcode = WDIOC_GETSUPPORT;
    // SAFETY: the request fills one `watchdog_info`, which `Info` lays out as the kernel does; any
    // bytes are a valid one.
    let info: Info = unsafe { ioctl(watchdog, Getter::<OPCODE, Info>::new()) }?;
    let identity = CStr::from_bytes_until_nul(&info.identity)
        .map_or_else(|_| &info.identity[..], CStr::to_bytes);
    Ok(Support {
        identity: String::from_utf8_lossy(identity).into_owned(),
        firmware_version: info.firmware_version,
        can_set_timeout: info.options & CAN_SET_TIMEOUT != 0,
        has_magic_close: info.options & HAS_MAGIC_CLOSE != 0,
    })
}

/// Asks for a period, seconds. The watchdog may choose another: read it back.
pub fn set_timeout_s(watchdog: impl AsFd, seconds: c_int) -> io::Result<()> {
    const OPCODE: Opcode = WDIOC_SETTIMEOUT;
    let mut seconds = seconds;
    // SAFETY: the request reads and writes one int, which lives until it has returned.
    unsafe { ioctl(watchdog, Updater::<OPCODE, c_int>::new(&mut seconds)) }?;
    Ok(())
}

/// The period that holds, seconds.
pub fn get_timeout_s(watchdog: impl AsFd) -> io::Result<c_int> {
    const OPCODE: Opcode = WDIOC_GETTIMEOUT;
    // SAFETY: the request fills one int.
    Ok(unsafe { ioctl(watchdog, Getter::<OPCODE, c_int>::new()) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_watchdog_says_so() {
        let file = std::fs::File::open("/dev/null").unwrap();
        for error in [
            support(&file).unwrap_err(),
            get_timeout_s(&file).unwrap_err(),
            set_timeout_s(&file, 5).unwrap_err(),
        ] {
            assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        }
    }

    /// The numbers encode direction and size: a wrong size of `Info` would be another request.
    #[test]
    fn the_structure_has_the_size_that_its_request_encodes() {
        assert_eq!((WDIOC_GETSUPPORT as usize >> 16) & 0x3fff, size_of::<Info>());
        assert_eq!((WDIOC_GETTIMEOUT as usize >> 16) & 0x3fff, size_of::<c_int>());
    }
}
