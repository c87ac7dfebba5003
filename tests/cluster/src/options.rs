//! What a test says about the cluster that it wants.

use std::path::PathBuf;

/// Where the cluster's shared storage lies.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum StorageKind {
    /// A directory of the cluster's temporary directory.
    #[default]
    Directory,
    /// A file system of its own with so many MiB, so that it can be full. It needs the right to mount.
    Tmpfs { mib: u64 },
    /// A directory made below this one, on the storage that is to be measured.
    Below(PathBuf),
}

/// What a test says about the cluster that it wants.
#[derive(Clone, Debug)]
pub struct Options {
    pub nodes: usize,
    /// Each node has an agent; without them these are controllers alone.
    pub agents: bool,
    /// Memory that VMs may have on each node. Given, so that tests do not depend on the machine.
    pub memory_mib: u64,
    pub storage: StorageKind,
    /// Let tests hold and kill processes at named points; needs a debug build.
    pub failpoints: bool,
    /// Give every node a wall clock that a test can make jump.
    pub wall_clocks: bool,
    /// Lines of `controller.toml` below `[timing]`.
    pub timing: Vec<(&'static str, u64)>,
    /// Lines of each node's `agent.toml`.
    pub agent: Vec<(&'static str, u64)>,
}

impl Options {
    /// For tests in which no node fails: a machine that is busy must not look like one that is gone.
    pub fn patient(nodes: usize) -> Self {
        Self { nodes, timing: vec![("suspect_after_ms", 6_000)], ..Self::default() }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 3,
            agents: true,
            memory_mib: 2048,
            storage: StorageKind::Directory,
            failpoints: false,
            wall_clocks: false,
            timing: Vec::new(),
            agent: Vec::new(),
        }
    }
}
