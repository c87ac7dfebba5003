//! One node: a controller and an agent with everything that a host of their own would give them.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

use crate::binaries::Binaries;
use crate::clock::WallClock;
use crate::net::{AGENT_PORT, API_PORT, JOIN_PORT, RAFT_PORT};
use crate::process::{Daemon, NODE_ENV, ROOT_ENV, kill_all_of, processes_of};
use crate::storage::mount_tmpfs;

/// How long a program may take to join: it waits for one commit.
const JOIN_TIME: Duration = Duration::from_secs(30);

/// What all nodes of a cluster have in common.
#[derive(Clone, Debug)]
pub struct Setting {
    pub binaries: Binaries,
    pub root: PathBuf,
    /// The environment variables of all processes.
    pub environment: Vec<(String, String)>,
    pub memory_mib: u64,
    pub controller_toml: String,
    /// More lines of `agent.toml`.
    pub agent_toml: String,
    /// The library that lets wall clocks jump.
    pub clock_library: Option<PathBuf>,
}

/// A host of the cluster, as far as one kernel can have several.
#[derive(Debug)]
pub struct Node {
    pub number: usize,
    pub name: String,
    pub address: IpAddr,
    dir: PathBuf,
    setting: Setting,
    controller: Option<Daemon>,
    agent: Option<Daemon>,
    clock: Option<WallClock>,
}

impl Node {
    pub fn create(number: usize, address: IpAddr, setting: Setting) -> Result<Self> {
        let name = format!("node{number}");
        // Short, because the VMMs' sockets lie below it and their paths end at 107 bytes.
        let dir = setting.root.join(format!("n{number}"));
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let library = setting.clock_library.as_deref();
        let clock = library.map(|library| WallClock::create(library, &dir)).transpose()?;
        let (controller, agent) = (None, None);
        let node = Self { number, name, address, dir, setting, controller, agent, clock };
        node.new_boot_id()?;
        node.make_runtime_dir()?;
        Ok(node)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn controller_dir(&self) -> PathBuf {
        self.dir.join("controller")
    }

    pub fn agent_dir(&self) -> PathBuf {
        self.dir.join("agent")
    }

    /// The node's `/run`.
    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.join("r")
    }

    /// In memory, as on a host. Without the right to mount it is on the disk with the rest, and an
    /// agent's records wait for the disk's journal.
    fn make_runtime_dir(&self) -> Result<()> {
        let path = self.runtime_dir();
        std::fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        let _on_the_disk = mount_tmpfs(&path, "mode=0700");
        Ok(())
    }

    pub fn log(&self, program: &str) -> PathBuf {
        self.dir.join(format!("{program}.log"))
    }

    pub fn api(&self) -> SocketAddr {
        SocketAddr::new(self.address, API_PORT)
    }

    pub fn raft(&self) -> SocketAddr {
        SocketAddr::new(self.address, RAFT_PORT)
    }

    pub fn join_port(&self) -> SocketAddr {
        SocketAddr::new(self.address, JOIN_PORT)
    }

    pub fn agent_port(&self) -> SocketAddr {
        SocketAddr::new(self.address, AGENT_PORT)
    }

    fn new_boot_id(&self) -> Result<()> {
        let path = self.dir.join("boot_id");
        let id = uuid::Uuid::new_v4();
        std::fs::write(&path, format!("{id}\n"))
            .with_context(|| format!("write {}", path.display()))
    }

    fn settings(&self) -> Vec<(String, String)> {
        let own = (NODE_ENV.to_owned(), self.dir.display().to_string());
        let root = (ROOT_ENV.to_owned(), self.setting.root.display().to_string());
        let common = self.setting.environment.iter().cloned();
        let clock = self.clock.iter().flat_map(WallClock::environment);
        common.chain([root, own]).chain(clock).collect()
    }

    /// Lets a program become a member with a token.
    pub async fn join(&self, role: &str, token: &str) -> Result<()> {
        let (program, data_dir) = match role {
            "controller" => (&self.setting.binaries.controller, self.controller_dir()),
            _ => (&self.setting.binaries.agent, self.agent_dir()),
        };
        join_with(program, token, &data_dir, &self.name, self.address).await?;
        match role {
            "controller" => self.write_controller_toml(),
            _ => self.write_agent_toml(),
        }
    }

    pub fn write_controller_toml(&self) -> Result<()> {
        let path = self.controller_dir().join("controller.toml");
        std::fs::write(&path, &self.setting.controller_toml)
            .with_context(|| format!("write {}", path.display()))
    }

    fn agent_toml(&self) -> PathBuf {
        self.dir.join("agent.toml")
    }

    fn write_agent_toml(&self) -> Result<()> {
        let path = self.agent_toml();
        let mut text = format!(
            "vmm = {:?}\nruntime_dir = {:?}\nboot_id_path = {:?}\nmemory_mib = {}\n\
             vcpu_overcommit = 64\nstatus_interval_ms = 50\n",
            self.setting.binaries.vmm,
            self.runtime_dir(),
            self.dir.join("boot_id"),
            self.setting.memory_mib,
        );
        text.push_str(&self.setting.agent_toml);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    pub fn start_controller(&mut self) -> Result<()> {
        let mut command = std::process::Command::new(&self.setting.binaries.controller);
        command.arg("run").arg("--data-dir").arg(self.controller_dir()).envs(self.settings());
        self.controller = Some(Daemon::spawn(&mut command, &self.log("controller"))?);
        Ok(())
    }

    pub fn start_agent(&mut self) -> Result<()> {
        let mut command = std::process::Command::new(&self.setting.binaries.agent);
        command.arg("run").arg("--data-dir").arg(self.agent_dir());
        command.arg("--config").arg(self.agent_toml()).envs(self.settings());
        self.agent = Some(Daemon::spawn(&mut command, &self.log("agent"))?);
        Ok(())
    }

    /// From now on what this node takes for the time of day is so many seconds off.
    pub fn set_clock(&self, seconds: i64) -> Result<()> {
        self.clock.as_ref().context("this cluster was started without wall clocks")?.set(seconds)
    }

    /// SIGKILL to the controller alone.
    pub fn kill_controller(&mut self) {
        if let Some(daemon) = self.controller.take() {
            daemon.kill();
        }
    }

    /// SIGKILL to the agent alone; its VMMs go on.
    pub fn kill_agent(&mut self) {
        if let Some(daemon) = self.agent.take() {
            daemon.kill();
        }
    }

    /// What a service manager does: SIGTERM, and a restart.
    pub fn restart_agent_gracefully(&mut self) -> Result<bool> {
        let ended = match self.agent.take() {
            Some(daemon) => daemon.terminate(Duration::from_secs(10))?,
            None => true,
        };
        self.start_agent()?;
        Ok(ended)
    }

    pub fn controller_pid(&self) -> Option<u32> {
        self.controller.as_ref().map(Daemon::pid)
    }

    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Daemon::pid)
    }

    pub fn has_controller(&mut self) -> bool {
        self.controller.as_mut().is_some_and(Daemon::is_running)
    }

    pub fn has_agent(&mut self) -> bool {
        self.agent.as_mut().is_some_and(Daemon::is_running)
    }

    /// Starts what is not running, as a service manager does after a crash.
    pub fn ensure_running(&mut self) -> Result<()> {
        if !self.has_controller() {
            self.start_controller()?;
        }
        if !self.has_agent() {
            self.start_agent()?;
        }
        Ok(())
    }

    /// SIGKILL to everything that runs on this node, VMMs included.
    pub fn power_off(&mut self) {
        kill_all_of(&self.dir);
        self.kill_controller();
        self.kill_agent();
    }

    /// A new boot: what lies in `/run` is gone, and nothing runs that was not started now.
    pub fn power_on(&mut self) -> Result<()> {
        if !processes_of(&self.dir).is_empty() {
            bail!("{} is still running", self.name);
        }
        empty(&self.runtime_dir()).context("empty the runtime directory")?;
        self.new_boot_id()?;
        self.start_controller()?;
        self.start_agent()
    }
}

/// Removes what is in a directory, and not the directory: something may be mounted on it.
fn empty(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => std::fs::remove_dir_all(entry.path())?,
            false => std::fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

/// Runs the `join` of a controller or an agent.
pub async fn join_with(
    program: &Path,
    token: &str,
    data_dir: &Path,
    name: &str,
    address: IpAddr,
) -> Result<()> {
    let mut command = Command::new(program);
    command.arg("join").arg("--token").arg(token).arg("--data-dir").arg(data_dir);
    command.arg("--name").arg(name).arg("--address").arg(address.to_string());
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(JOIN_TIME, command.output()).await;
    let output = output.context("joining takes too long")?.context("start the join")?;
    match output.status.success() {
        true => Ok(()),
        false => bail!("{}", String::from_utf8_lossy(&output.stderr).trim()),
    }
}
