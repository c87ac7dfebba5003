//! The process of one VMM. It is held by a pidfd, which is opened *before* its identity is checked:
//! from then on the number cannot come to mean another process.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::record::start_ticks;
use crate::text::Text;

/// Longer than any `stat`: a name of 64 bytes and 51 numbers.
const STAT_MAX: usize = 2048;

/// A process that lives, or whose last threads are still ending.
#[derive(Debug)]
pub struct Victim {
    fd: OwnedFd,
}

impl Victim {
    /// Takes hold of the process with this number and start time; `None` if it is gone.
    pub fn find(pid: u32, started: u64) -> Result<Option<Self>, Errno> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::INVAL)?;
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        let victim = Self { fd };
        match process_start(pid) {
            // Another process has the number now.
            Ok(ticks) if ticks != started => Ok(None),
            Ok(_) if victim.has_ended()? => Ok(None),
            Ok(_) => Ok(Some(victim)),
            Err(Errno::NOENT | Errno::SRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// SIGKILL. It may take its time: a thread that waits for dead storage ends when that answers.
    pub fn kill(&self) -> Result<(), Errno> {
        match pidfd_send_signal(self.fd.as_fd(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether its last thread has ended: a pidfd is readable then, and not before.
    pub fn has_ended(&self) -> Result<bool, Errno> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        Ok(poll(&mut fds, Some(&now))? > 0)
    }
}

fn process_start(pid: Pid) -> Result<u64, Errno> {
    let path = Text::<32>::new(format_args!("/proc/{}/stat", pid.as_raw_nonzero()));
    let path = path.as_c_str().ok_or(Errno::NAMETOOLONG)?;
    let file = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut stat = [0; STAT_MAX];
    let length = rustix::io::read(&file, &mut stat)?;
    start_ticks(&stat[..length]).ok_or(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};

    fn child() -> (Child, u64) {
        let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let stat = std::fs::read(format!("/proc/{}/stat", child.id())).unwrap();
        (child, start_ticks(&stat).unwrap())
    }

    #[test]
    fn a_process_is_killed_and_then_gone() {
        let (mut child, started) = child();
        let victim = Victim::find(child.id(), started).unwrap().unwrap();
        assert!(!victim.has_ended().unwrap());
        victim.kill().unwrap();
        // `wait` would close its input, and so end it in any case.
        let input = child.stdin.take();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        drop(input);
        assert!(victim.has_ended().unwrap());
        assert!(Victim::find(child.id(), started).unwrap().is_none());
        victim.kill().unwrap();
    }

    #[test]
    fn another_process_with_the_number_is_left_alone() {
        let (mut child, started) = child();
        assert!(Victim::find(child.id(), started + 1).unwrap().is_none());
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
