//! Processes: those that the harness started, and those that they started.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Every process of a cluster carries the cluster's directory in this variable.
pub const ROOT_ENV: &str = "BELLWETHER_TEST_ROOT";
/// And the directory of its node in this one.
pub const NODE_ENV: &str = "BELLWETHER_TEST_NODE";

const PROGRAMS: [&str; 4] = ["bellwether-controller", "bellwether-agent", "bellwether-vmm", "bell"];
/// A killed process is gone after this, unless the kernel is in trouble.
const GONE_AFTER: Duration = Duration::from_secs(10);
/// An agent that is being killed may start one more VMM; so the search is repeated.
const ROUNDS: usize = 20;

/// A controller or an agent that the harness started. Killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts a program with its output appended to a log.
    pub fn spawn(command: &mut Command, log: &Path) -> Result<Self> {
        let mut out = append(log)?;
        writeln!(out, "--- {command:?}").with_context(|| format!("write {}", log.display()))?;
        let err = out.try_clone().with_context(|| format!("open {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Self { child })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL to this process alone.
    pub fn kill(mut self) {
        self.kill_and_reap();
    }

    /// SIGTERM, as a service manager ends it; SIGKILL when it does not listen.
    pub fn terminate(mut self, patience: Duration) -> Result<bool> {
        let held = Held::open(self.child.id())?;
        held.signal(Signal::TERM);
        let ended = held.wait_gone(patience);
        self.kill_and_reap();
        Ok(ended)
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn kill_and_reap(&mut self) {
        // Both fail only when it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill_and_reap();
    }
}

fn append(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.with_context(|| format!("open {}", path.display()))
}

/// A process that is held by a pidfd, so that its number cannot come to mean another.
struct Held {
    fd: rustix::fd::OwnedFd,
}

impl Held {
    fn open(pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a process id")?;
        Ok(Self { fd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    fn signal(&self, signal: Signal) {
        // It may have ended meanwhile.
        let _ = pidfd_send_signal(&self.fd, signal);
    }

    /// Whether the process has ended within the time.
    fn wait_gone(&self, patience: Duration) -> bool {
        let Ok(timeout) = Timespec::try_from(patience) else { return false };
        let ready = poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&timeout));
        matches!(ready, Ok(1..))
    }
}

/// A process of the cluster, found in `/proc`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub pid: u32,
    pub program: String,
    pub arguments: Vec<String>,
}

impl Found {
    /// Whether an argument names something in this directory.
    pub fn names(&self, dir: &Path) -> bool {
        self.arguments.iter().any(|argument| argument.contains(&*dir.to_string_lossy()))
    }
}

/// All living programs of Bellwether that belong to a directory: a whole cluster's, or a node's.
pub fn processes_of(dir: &Path) -> Vec<Found> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| look_at(pid, dir)).collect()
}

fn look_at(pid: u32, dir: &Path) -> Option<Found> {
    let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let arguments: Vec<String> = cmdline
        .split(|byte| *byte == 0)
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect();
    let program = Path::new(arguments.first()?).file_name()?.to_str()?.to_owned();
    if !PROGRAMS.contains(&program.as_str()) {
        return None;
    }
    let found = Found { pid, program, arguments };
    (found.names(&dir.join("")) || carries(pid, dir)).then_some(found)
}

fn carries(pid: u32, dir: &Path) -> bool {
    let Ok(environ) = std::fs::read(format!("/proc/{pid}/environ")) else { return false };
    environ.split(|byte| *byte == 0).any(|variable| {
        [ROOT_ENV, NODE_ENV].iter().any(|name| {
            let value = variable.strip_prefix(name.as_bytes()).and_then(|v| v.strip_prefix(b"="));
            value == Some(dir.as_os_str().as_bytes())
        })
    })
}

/// SIGKILL to one process, if it is still the one that was found.
pub fn kill(found: &Found) {
    if let Some(held) = hold(found) {
        held.signal(Signal::KILL);
        held.wait_gone(GONE_AFTER);
    }
}

/// SIGSTOP: the process is there and does nothing, like a host that hangs.
pub fn freeze(found: &Found) {
    if let Some(held) = hold(found) {
        held.signal(Signal::STOP);
    }
}

/// SIGCONT: it goes on as if no time had passed.
pub fn thaw(found: &Found) {
    if let Some(held) = hold(found) {
        held.signal(Signal::CONT);
    }
}

/// The number may have come to mean another process since, so it is looked at again once it is held.
fn hold(found: &Found) -> Option<Held> {
    let held = Held::open(found.pid).ok()?;
    let cmdline = std::fs::read(format!("/proc/{}/cmdline", found.pid)).ok()?;
    let first = cmdline.split(|byte| *byte == 0).next()?;
    (found.arguments.first()?.as_bytes() == first).then_some(held)
}

/// SIGKILL to everything that belongs to a directory, as near to one instant as it goes.
pub fn kill_all_of(dir: &Path) {
    for _ in 0..ROUNDS {
        let found = processes_of(dir);
        if found.is_empty() {
            return;
        }
        let held: Vec<Held> = found.iter().filter_map(hold).collect();
        held.iter().for_each(|process| process.signal(Signal::KILL));
        let deadline = Instant::now() + GONE_AFTER;
        for process in held {
            process.wait_gone(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

/// Cleans up after a harness that ends without doing it.
#[derive(Debug)]
pub struct Reaper {
    child: Child,
}

impl Reaper {
    pub fn start(program: &Path, root: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt;
        let child = Command::new(program)
            .arg(root)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // A signal to the harness' group, such as ^C, must not end it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self { child })
    }

    /// There is nothing to clean up any more, or it is not wanted.
    pub fn dismiss(&mut self) {
        if let Some(mut stdin) = self.child.stdin.take() {
            let _ = stdin.write_all(DISMISSED);
        }
        let _ = self.child.wait();
    }
}

/// The last words of a harness that has cleaned up itself.
pub const DISMISSED: &[u8] = b"dismissed";

/// Removes a cluster's directory; a file system that was mounted in it goes first.
pub fn remove_root(root: &Path) {
    for mounted in mounts_below(root) {
        let _ = rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::DETACH);
    }
    let _ = std::fs::remove_dir_all(root);
}

fn mounts_below(root: &Path) -> Vec<PathBuf> {
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mounts") else { return Vec::new() };
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    points.filter(|point| point.starts_with(root)).collect()
}
