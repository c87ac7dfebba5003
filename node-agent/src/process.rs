//! Processes that this agent may not have started itself: identity, exit, reaping.
//!
//! A process is held by a pidfd, which is opened *before* its identity is checked: from then on the
//! number cannot come to mean another process. The pidfd tells the exit of a child and of a
//! stranger alike; children are reaped here, those that an earlier agent left are reaped by init.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The most processes that one scan looks at.
const SCAN_MAX: usize = 4_194_304;

/// A process that is held by a pidfd.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    fd: AsyncFd<OwnedFd>,
    start_ticks: u64,
}

impl Process {
    /// Takes hold of a process. Fails with ESRCH when there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let fd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        let start_ticks = start_ticks(pid)?;
        Ok(Self { pid, fd: watched(fd)?, start_ticks })
    }

    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// When it started, in clock ticks since boot: with the number it names one process.
    pub fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    /// SIGKILL. That it is gone already is success.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.fd.get_ref().as_fd(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process has ended, and reaps it if it is ours. By then the kernel has closed
    /// its files: its locks are gone and its writes are with the kernel or nowhere.
    pub async fn exited(&self) -> io::Result<()> {
        let _ready = self.fd.readable().await?;
        self.reap()
    }

    fn reap(&self) -> io::Result<()> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(self.fd.get_ref().as_fd()), options) {
            // Not a child of ours, or reaped already.
            Ok(_) | Err(rustix::io::Errno::CHILD) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[allow(
    deprecated,
    reason = "its successor is unsafe because of types that give other descriptors each time; an \
              OwnedFd owns one for its whole life, and unsafe code is forbidden here"
)]
fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// Field 22 of `/proc/<pid>/stat`; the fields are counted behind the name, which may hold anything.
fn start_ticks(pid: Pid) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    let ticks = behind.split_ascii_whitespace().nth(19).and_then(|field| field.parse().ok());
    ticks.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "stat without a start time"))
}

/// Whether the process was started to serve on this socket.
pub fn serves_socket(pid: u32, socket: &Path) -> bool {
    let Ok(cmdline) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    cmdline.split(|byte| *byte == 0).any(|argument| argument == socket.as_os_str().as_bytes())
}

/// All processes that were started to serve on this socket. An agent that died between the start
/// of a VMM and the record of its number leaves one that only this finds.
pub fn find_by_socket(socket: &Path) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.take(SCAN_MAX) {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|name| name.parse::<u32>().ok());
        if let Some(pid) = pid.filter(|pid| serves_socket(*pid, socket)) {
            found.push(pid);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    use super::*;

    #[tokio::test]
    async fn a_killed_child_is_seen_and_reaped() {
        let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let process = Process::open(pid).unwrap();
        assert!(process.start_ticks() > 0);
        process.kill().unwrap();
        process.exited().await.unwrap();
        assert_eq!(Process::open(pid).unwrap_err().raw_os_error(), Some(3));
        process.kill().unwrap();
        drop(child);
    }

    #[test]
    fn a_process_is_found_by_its_argument() {
        let marker = format!("/nowhere/{}.sock", std::process::id());
        let mut child = Command::new("cat")
            .args(["-", &marker])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // A new process shows its arguments only some time after spawn returned: once it has
        // echoed, they are there.
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let found = find_by_socket(Path::new(&marker)).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, [child.id()]);
    }
}
