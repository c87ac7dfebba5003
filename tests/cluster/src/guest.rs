//! VMs that run the test guest.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bellwether_proto::v1;

/// What a test's VM is like.
#[derive(Clone, Debug)]
pub struct Guest {
    pub name: String,
    pub memory_mib: u64,
    pub vcpus: u32,
    pub kernel: PathBuf,
    pub disk: Option<PathBuf>,
    pub cmdline: String,
    pub priority: u32,
    pub never_restart: bool,
}

/// Room for the whole journal: 8192 sectors.
const DISK_BYTES: u64 = 8192 * 512;

impl Guest {
    /// A small VM: quick to boot and to move.
    pub fn small(name: &str, kernel: &Path) -> Self {
        Self {
            name: name.to_owned(),
            memory_mib: 64,
            vcpus: 1,
            kernel: kernel.to_owned(),
            disk: None,
            cmdline: "tick_ms=10 mem_mib=16 dirty_mib_s=8 verify_mib_s=32 journal_ms=20".to_owned(),
            priority: 0,
            never_restart: false,
        }
    }

    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// With a new, empty raw disk on the storage.
    pub fn with_disk(mut self, storage: &Path) -> Result<Self> {
        let path = storage.join(format!("{}.raw", self.name));
        let made = File::create(&path).and_then(|file| file.set_len(DISK_BYTES));
        made.with_context(|| format!("make disk {}", path.display()))?;
        self.disk = Some(path);
        Ok(self)
    }

    pub fn spec(&self) -> v1::VmSpec {
        let disk = |path: &PathBuf| v1::Disk {
            path: path.display().to_string(),
            format: "raw".to_owned(),
            read_only: false,
        };
        v1::VmSpec {
            name: self.name.clone(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            kernel: self.kernel.display().to_string(),
            initrd: String::new(),
            nics: Vec::new(),
            cmdline: self.cmdline.clone(),
            disks: self.disk.iter().map(disk).collect(),
            possible_owners: Vec::new(),
            priority: self.priority,
            restart: if self.never_restart { "never" } else { "restart" }.to_owned(),
        }
    }
}
