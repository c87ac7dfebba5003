//! Open file description locks, which rustix does not have.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What kind of lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// Excludes everybody. The file must be open for writing.
    Write,
    /// Excludes writers. The file must be open for reading.
    Read,
}

/// Tries to lock the whole file; false if somebody else has a lock in the way.
pub(crate) fn try_lock(file: &File, mode: Mode) -> io::Result<bool> {
    match fcntl(file, libc::F_OFD_SETLK, lock_type(mode)) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Lets go of the lock of this open file.
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, libc::F_UNLCK).map(drop)
}

/// Whether a write lock of another open file could be had now. Advisory: it may change at once.
pub(crate) fn is_locked(file: &File) -> io::Result<bool> {
    let kind = fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK)?;
    Ok(i32::from(kind) != libc::F_UNLCK)
}

fn lock_type(mode: Mode) -> libc::c_int {
    match mode {
        Mode::Write => libc::F_WRLCK,
        Mode::Read => libc::F_RDLCK,
    }
}

/// One lock operation on the whole file; gives the type that the kernel answers with.
fn fcntl(file: &File, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_short> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        // From 0, length 0: to the end, however far the file grows.
        l_start: 0,
        l_len: 0,
        // Must be 0 for these locks: they belong to the open file, not to a process.
        l_pid: 0,
    };
    loop {
        // SAFETY: the descriptor is open as long as `file` is borrowed, and the kernel reads and
        // writes one flock, which `lock` is.
        let outcome = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
        if outcome >= 0 {
            return Ok(lock.l_type);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
