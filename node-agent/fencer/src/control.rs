//! The one request to a running fencer, through a FIFO: to disarm and end.
//!
//! A signal would be simpler, and would also be what a shutdown, a tired administrator or the kernel
//! sends. Those must leave the watchdog armed.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::facts::Facts;

/// The FIFO's name in the fencer's directory.
pub const CONTROL_FILE: &str = "control";
/// What is written into it.
const DISARM: &[u8] = b"V";
/// A fencer looks at its FIFO at once; this is for a machine under load.
const ANSWER_S: i64 = 10;

/// The fencer's end.
#[derive(Debug)]
pub struct Control {
    fifo: OwnedFd,
}

impl Control {
    /// Makes the FIFO. Open for both directions, it never comes to an end.
    pub fn create(directory: &Path) -> io::Result<Self> {
        let path = directory.join(CONTROL_FILE);
        match mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(Self { fifo: open(&path, flags, Mode::empty())? })
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.fifo
    }

    /// Whether somebody asked since the last look.
    pub fn wants_disarm(&self) -> bool {
        let mut bytes = [0; 64];
        matches!(rustix::io::read(&self.fifo, &mut bytes), Ok(count) if bytes[..count].contains(&b'V'))
    }
}

/// How a request to disarm ended.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    #[error("no fencer runs on `{0}`")]
    NotRunning(String),
    #[error(
        "the fencer goes on: VMs of this node depend on the lease, or its watchdog is nowayout; its \
         log says which. Drain the node (`bell node drain`), or let it be"
    )]
    Refused,
    #[error("ask the fencer: {0}")]
    Io(#[from] io::Error),
}

/// Asks the fencer of a directory to disarm and end, and waits until it has.
pub fn stop(directory: &Path) -> Result<(), StopError> {
    let absent = || StopError::NotRunning(directory.display().to_string());
    let facts = Facts::read(directory)?.ok_or_else(absent)?;
    let pid = i32::try_from(facts.pid).ok().and_then(Pid::from_raw).ok_or_else(absent)?;
    let fencer = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Err(absent()),
        other => other.map_err(io::Error::from)?,
    };
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fifo = match open(directory.join(CONTROL_FILE), flags, Mode::empty()) {
        Err(Errno::NXIO | Errno::NOENT) => return Err(absent()),
        other => other.map_err(io::Error::from)?,
    };
    rustix::io::write(&fifo, DISARM).map_err(io::Error::from)?;
    let mut fds = [PollFd::new(&fencer, PollFlags::IN)];
    let at_most = Timespec { tv_sec: ANSWER_S, tv_nsec: 0 };
    match poll(&mut fds, Some(&at_most)).map_err(io::Error::from)? {
        0 => Err(StopError::Refused),
        _ => Ok(()),
    }
}
