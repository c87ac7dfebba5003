//! A runtime directory as an agent leaves it, with real processes in the place of VMMs.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses a part, and all of it is a test"
)]

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use bellwether_fencer::config::FencerConfig;
use bellwether_fencer::device::{Watchdog, WatchdogFacts};
use bellwether_fencer::record::start_ticks;
use bellwether_lease::LeasePage;
use rustix::time::{ClockId, clock_gettime};

pub const MS: u64 = 1_000_000;

pub fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A node.
pub struct Node {
    pub dir: tempfile::TempDir,
}

/// A process that the node takes for a VMM.
pub struct Vmm {
    child: Child,
    /// Closed, it would end the process.
    _stdin: Option<ChildStdin>,
    pub page: LeasePage,
    home: PathBuf,
}

impl Node {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// Times that a machine under load keeps.
    pub fn config(&self) -> FencerConfig {
        let runtime_dir = self.dir.path().to_owned();
        FencerConfig { runtime_dir, pet_ms: 1_000, stop_ms: 1_000, ..FencerConfig::default() }
    }

    /// The agent's end of the grant page.
    pub fn grants(&self) -> LeasePage {
        LeasePage::open_for_grants(&self.dir.path().join("fencer/grant")).unwrap()
    }

    /// Starts a process and writes it down as the agent does.
    pub fn vmm(&self, number: u32, arbiter: &str) -> Vmm {
        let home = self.dir.path().join(format!("vms/{number:036}.7"));
        std::fs::create_dir_all(&home).unwrap();
        let page = LeasePage::create(&home.join("lease")).unwrap();
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let stat = std::fs::read(format!("/proc/{}/stat", child.id())).unwrap();
        let vmm = Vmm { _stdin: child.stdin.take(), child, page, home };
        vmm.write_down(arbiter, start_ticks(&stat).unwrap());
        vmm
    }
}

impl Vmm {
    pub fn write_down(&self, arbiter: &str, started: u64) {
        let record = serde_json::json!({
            "vm_id": "x", "home": 7, "epoch": 7, "arbiter": arbiter, "boot_id": "y",
            "pid": self.child.id(), "start_ticks": started, "loaded": null, "loading": null,
            "load_us": 0, "may_have_run": true, "claiming": null, "claimed_from": null,
            "prepare_us": 1,
        });
        let path = self.home.join("incarnation.json");
        std::fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
    }

    pub fn home(&self) -> &Path {
        &self.home
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end, and says whether it was SIGKILL.
    pub fn was_killed(&mut self) -> bool {
        self.child.wait().unwrap().signal() == Some(9)
    }

    pub fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A pipe in the place of a watchdog: it shows which bytes would reach one, and nothing else. What a
/// real one makes of them is the lab's to show.
pub struct Wire {
    reader: File,
}

impl Wire {
    pub fn new() -> (Self, Watchdog) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let facts = WatchdogFacts {
            device: "/dev/wire".into(),
            identity: "a pipe".into(),
            firmware_version: 0,
            timeout_ms: 5_000,
            nowayout: None,
            hardware: false,
        };
        (Self { reader: file(reader) }, Watchdog::over(file(writer), facts))
    }

    /// What came since the last call.
    pub fn bytes(&mut self) -> String {
        let mut bytes = Vec::new();
        let _would_block = self.reader.read_to_end(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }
}

fn file(fd: OwnedFd) -> File {
    File::from(fd)
}
