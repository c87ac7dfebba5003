//! Runs a program that may hang, talk without end, or leave children behind.
//!
//! It gets a process group of its own, and the whole group is killed when the program has ended or its
//! time is over: what an agent started (ipmitool, ssh) must not go on switching power afterwards.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::outcome::Ended;

/// So much of each output is kept; the rest is read and dropped.
const OUTPUT_MAX: usize = 1 << 20;
/// It has to fit into a pipe, so that writing never waits.
const INPUT_MAX: usize = 32 << 10;

/// What a program did.
#[derive(Debug)]
pub struct Finished {
    pub ended: Ended,
    pub output: String,
    pub errors: String,
    pub took: Duration,
}

/// Runs a program with this input, for no longer than `at_most`. It inherits nothing of the
/// environment but a PATH: an agent's settings are its input.
pub fn run(program: &Path, input: &str, at_most: Duration) -> io::Result<Finished> {
    if input.len() > INPUT_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the parameters are too long"));
    }
    let started = Instant::now();
    let mut child = Command::new(program)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let followed = follow(&mut child, input, started, at_most);
    // Also after an error: nothing of it may go on. Only then is the number free for others.
    kill_group(&child);
    let status = child.wait()?;
    let (in_time, output, errors) = followed?;
    let ended = match (in_time, status.code(), status.signal()) {
        (false, ..) => Ended::Timeout,
        (true, Some(code), _) => Ended::Code(code),
        (true, None, signal) => Ended::Signal(signal.unwrap_or_default()),
    };
    Ok(Finished { ended, output, errors, took: started.elapsed() })
}

/// Feeds the program and reads what it says until it ends; false if its time was over first.
fn follow(
    child: &mut Child,
    input: &str,
    started: Instant,
    at_most: Duration,
) -> io::Result<(bool, String, String)> {
    let number = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::INVAL)?;
    let process = pidfd_open(number, PidfdFlags::empty())?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read its input says so by what it does.
        let _broken_pipe = stdin.write_all(input.as_bytes());
    }
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (Some(stdout), Some(stderr)) = (stdout, stderr) else { return Err(Errno::BADF.into()) };
    let (mut output, mut errors) = (Stream::new(stdout.into())?, Stream::new(stderr.into())?);
    let in_time = loop {
        let Some(left) = at_most.checked_sub(started.elapsed()) else { break false };
        let mut fds = vec![PollFd::new(&process, PollFlags::IN)];
        fds.extend([&output, &errors].into_iter().filter(|it| it.open).map(Stream::poll_fd));
        let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ended = !fds[0].revents().is_empty();
        output.drain()?;
        errors.drain()?;
        // A child that it left behind may hold the pipes open for ever: they end with the program.
        if ended {
            break true;
        }
    };
    Ok((in_time, output.text(), errors.text()))
}

/// SIGKILL to all of them. The program is not reaped yet, so that its number means nobody else.
fn kill_group(child: &Child) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(group) = group {
        let _gone = kill_process_group(group, Signal::KILL);
    }
}

/// One of the outputs.
struct Stream {
    pipe: File,
    bytes: Vec<u8>,
    open: bool,
}

impl Stream {
    fn new(pipe: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&pipe, OFlags::NONBLOCK)?;
        Ok(Self { pipe: pipe.into(), bytes: Vec::new(), open: true })
    }

    fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(&self.pipe, PollFlags::IN)
    }

    /// Reads what is there, but not without end: whoever writes faster than this reads is read on
    /// after the next look at the clock.
    fn drain(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        for _ in 0..16 {
            match self.pipe.read(&mut buffer) {
                Ok(0) => {
                    self.open = false;
                    break;
                }
                Ok(count) => {
                    let room = OUTPUT_MAX.saturating_sub(self.bytes.len());
                    self.bytes.extend_from_slice(&buffer[..count.min(room)]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}
