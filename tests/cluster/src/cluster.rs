//! A whole cluster on this machine.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bellwether_pki::IdentityFiles;
use bellwether_proto::v1;

use crate::admin::Admin;
use crate::bell::Bell;
use crate::binaries::Binaries;
use crate::clock;
use crate::failpoints::Failpoints;
use crate::guest::Guest;
use crate::net::Subnet;
use crate::node::{Node, Setting};
use crate::options::Options;
use crate::process::{self, Reaper, kill_all_of, processes_of, remove_root};
use crate::storage::Storage;
use crate::vmm::{self, Incarnation};
use crate::wait::wait_for;
use crate::watch::Watch;

/// A cluster is up within seconds; a loaded machine with debug builds takes longer.
const UP: Duration = Duration::from_secs(60);

/// A cluster of real processes. Dropping it ends all of them.
#[derive(Debug)]
pub struct Cluster {
    root: PathBuf,
    nodes: Vec<Node>,
    agents: bool,
    storage: Storage,
    bell: Bell,
    admin: Admin,
    /// Where the administrator's certificate and key are.
    identity: PathBuf,
    failpoints: Option<Failpoints>,
    binaries: Binaries,
    reaper: Reaper,
    /// Set by [`Cluster::finish`]: nothing needs to be kept for a person to look at.
    finished: bool,
}

impl Cluster {
    /// Makes a cluster and waits until all of it is up.
    pub async fn start(options: Options) -> Result<Self> {
        bellwether_pki::install_crypto_provider();
        let mut cluster = Self::prepare(&options)?;
        cluster.found().await?;
        for index in 1..cluster.nodes.len() {
            cluster.add_controller(index).await?;
        }
        if options.agents {
            cluster.add_agents().await?;
        }
        cluster.wait_whole().await?;
        Ok(cluster)
    }

    fn prepare(options: &Options) -> Result<Self> {
        let binaries = Binaries::find(options.agents)?;
        let [x, y, z, w, ..] = *uuid::Uuid::new_v4().as_bytes();
        // Short on purpose, and not in TMPDIR: the VMMs' sockets lie below it.
        let root = PathBuf::from(format!("/tmp/bw-{x:02x}{y:02x}{z:02x}{w:02x}"));
        std::fs::create_dir(&root).with_context(|| format!("create {}", root.display()))?;
        let reaper = Reaper::start(&binaries.reaper, &root)?;
        let storage = Storage::create(&options.storage, &root)?;
        let failpoints = match options.failpoints {
            true => Some(Failpoints::create(root.join("fp"))?),
            false => None,
        };
        let setting = Setting {
            binaries: binaries.clone(),
            root: root.clone(),
            environment: environment(failpoints.as_ref()),
            memory_mib: options.memory_mib,
            controller_toml: controller_toml(options),
            agent_toml: options
                .agent
                .iter()
                .map(|(key, value)| format!("{key} = {value}\n"))
                .collect(),
            clock_library: match options.wall_clocks {
                true => Some(clock::build_library(&root)?),
                false => None,
            },
        };
        let subnet = Subnet::choose(options.nodes)?;
        let node = |number| Node::create(number, subnet.address(number), setting.clone());
        let nodes: Vec<Node> = (1..=options.nodes).map(node).collect::<Result<_>>()?;
        let bell = Bell::new(&binaries.bell, &root.join("bell/bell.toml"));
        // Without endpoints until `found` has made the administrator's identity.
        let (admin, identity) = (Admin::none(), PathBuf::new());
        Ok(Self {
            identity,
            root,
            nodes,
            agents: options.agents,
            storage,
            bell,
            admin,
            failpoints,
            binaries,
            reaper,
            finished: false,
        })
    }

    /// The first controller.
    async fn found(&mut self) -> Result<()> {
        let data_dir = self.nodes[0].controller_dir().display().to_string();
        let address = self.nodes[0].address.to_string();
        let storage = self.storage.path().display().to_string();
        let made = self
            .bell
            .json(&[
                "cluster",
                "init",
                "--data-dir",
                &data_dir,
                "--name",
                "node1",
                "--cluster-name",
                "demo",
                "--address",
                &address,
                "--storage",
                &storage,
            ])
            .await?;
        let identity =
            made["identity"].as_str().context("`bell cluster init` names no identity")?;
        let endpoints: Vec<SocketAddr> = self.nodes.iter().map(Node::api).collect();
        self.identity = identity.into();
        self.admin = Admin::new(Path::new(identity), &endpoints)?;
        let endpoints: Vec<String> = endpoints.iter().map(SocketAddr::to_string).collect();
        let mut words = vec!["context", "add", "demo", "--identity", identity, "--use"];
        words.extend(endpoints.iter().flat_map(|endpoint| ["--endpoint", endpoint.as_str()]));
        self.bell.text(&words).await?;
        self.nodes[0].write_controller_toml()?;
        self.nodes[0].start_controller()?;
        let first = self.admin.of(1);
        wait_for("the first controller to lead", UP, async || {
            let status = first.clone().get_cluster_status(v1::ClusterStatusRequest {}).await?;
            let status = status.into_inner();
            // It leads a moment before it has written down that there is a cluster.
            Ok((status.leader == 1 && !status.controllers.is_empty()).then_some(()))
        })
        .await
    }

    async fn add_controller(&mut self, index: usize) -> Result<()> {
        let token = self.join_token("controller").await?;
        self.nodes[index].join("controller", &token).await?;
        self.nodes[index].start_controller()?;
        let name = self.nodes[index].name.clone();
        let what = format!("the controller of {name} to vote");
        wait_for(&what, UP, async || {
            let status = self.admin.status().await?;
            let is_it = |c: &&v1::ControllerStatus| {
                c.voter && c.member.as_ref().is_some_and(|member| member.name == name)
            };
            Ok(status.controllers.iter().find(is_it).map(|_| ()))
        })
        .await
    }

    async fn add_agents(&mut self) -> Result<()> {
        for index in 0..self.nodes.len() {
            let token = self.join_token("agent").await?;
            self.nodes[index].join("agent", &token).await?;
            self.nodes[index].start_agent()?;
        }
        Ok(())
    }

    /// A token as an administrator gets one.
    pub async fn join_token(&self, role: &str) -> Result<String> {
        let text = self.bell.text(&["cluster", "join-token", "--role", role]).await?;
        Ok(text.trim().to_owned())
    }

    /// Waits until all controllers vote and all nodes are online.
    pub async fn wait_whole(&self) -> Result<()> {
        let count = self.nodes.len();
        let agents = if self.agents { count as u64 } else { 0 };
        wait_for("the whole cluster to be up", UP, async || {
            let status = self.admin.status().await?;
            let voters = status.controllers.iter().filter(|controller| controller.voter).count();
            let (online, leader) = (status.nodes_online, status.leader);
            if voters != count || online != agents || leader == 0 {
                bail!("{voters} voters, {online} nodes online, leader {leader}");
            }
            self.all_answer().await.map(Some)
        })
        .await
    }

    /// Each controller by itself: one that is down still votes on paper.
    async fn all_answer(&self) -> Result<()> {
        for node in &self.nodes {
            let mut client = self.admin.of(node.number);
            let asked = client.get_cluster_status(v1::ClusterStatusRequest {});
            asked.await.with_context(|| format!("ask the controller of {}", node.name))?;
        }
        Ok(())
    }

    pub fn root(&self) -> &Path {
        &self.root
    }
    pub fn storage(&self) -> &Path {
        self.storage.path()
    }
    pub fn bell(&self) -> &Bell {
        &self.bell
    }
    pub fn admin(&self) -> &Admin {
        &self.admin
    }
    /// The administrator's certificate and key.
    pub fn admin_identity(&self) -> Result<IdentityFiles> {
        let dir = &self.identity;
        IdentityFiles::load(dir).with_context(|| format!("load {}", dir.display()))
    }
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node, counted from 1.
    pub fn node(&mut self, number: usize) -> &mut Node {
        &mut self.nodes[number - 1]
    }

    pub fn failpoints(&self) -> Result<&Failpoints> {
        self.failpoints.as_ref().context("this cluster was started without failpoints")
    }

    /// The number in a node's name.
    pub fn number_of(&self, name: &str) -> Result<usize> {
        let node = self.nodes.iter().find(|node| node.name == name);
        node.map(|node| node.number).with_context(|| format!("there is no node `{name}`"))
    }

    /// A node that is none of these.
    pub fn other_than(&self, not: &[usize]) -> Result<usize> {
        let mut numbers = self.nodes.iter().map(|node| node.number);
        numbers.find(|number| !not.contains(number)).context("there is no other node")
    }

    /// The number of the node whose controller leads, as the controllers themselves say.
    pub async fn leader(&self) -> Result<usize> {
        wait_for("a leader", UP, async || {
            let leader = self.admin.status().await?.leader;
            Ok(usize::try_from(leader).ok().filter(|leader| *leader != 0))
        })
        .await
    }

    /// Starts every controller and agent that is not running.
    pub fn ensure_running(&mut self) -> Result<()> {
        self.nodes.iter_mut().try_for_each(Node::ensure_running)
    }

    /// Where the sockets of the VMMs of each node are.
    pub fn runtime_dirs(&self) -> Vec<(usize, PathBuf)> {
        self.nodes.iter().map(|node| (node.number, node.runtime_dir())).collect()
    }

    /// The VMMs of a VM, ended ones included as long as their directories are there.
    pub fn incarnations(&self, vm_id: &str) -> Vec<Incarnation> {
        vmm::incarnations(&self.runtime_dirs(), vm_id)
    }

    /// The VMMs of a VM whose vCPUs run now.
    pub async fn running_instances(&self, vm_id: &str) -> Vec<Incarnation> {
        let mut running = Vec::new();
        for incarnation in self.incarnations(vm_id) {
            let status = vmm::status(&incarnation.socket).await;
            if status.is_ok_and(|status| status.state == "running") {
                running.push(incarnation);
            }
        }
        running
    }

    /// SIGKILL to the VMMs of one VM on a node. Returns how many there were.
    pub fn kill_vmm(&self, number: usize, vm_id: &str) -> usize {
        let vmms: Vec<_> = processes_of(self.nodes[number - 1].dir())
            .into_iter()
            .filter(|found| found.program == "bellwether-vmm")
            .filter(|found| found.arguments.iter().any(|argument| argument.contains(vm_id)))
            .collect();
        vmms.iter().for_each(process::kill);
        vmms.len()
    }

    /// A small VM of the test guest with a new disk, not yet created.
    pub fn guest(&self, name: &str) -> Result<Guest> {
        Guest::small(name, &self.binaries.guest).with_disk(self.storage())
    }

    /// Creates and starts a VM, and waits until its guest works.
    pub async fn run(&self, guest: &Guest) -> Result<Watch> {
        let reply = self.admin.create_vm(&guest.spec(), true).await?;
        let vm = reply.vm.context("the reply has no VM")?;
        let watch = Watch::start(self.runtime_dirs(), &vm.id);
        if reply.task != 0 {
            self.admin.task_done(reply.task, UP).await?;
        }
        watch.ticks_on(UP).await?;
        Ok(watch)
    }

    /// The node on which a VM may run now, by its number.
    pub async fn home_of(&self, vm: &str) -> Result<usize> {
        self.number_of(&self.admin.vm(vm).await?.node)
    }

    /// Moves a VM and waits for the end of it.
    pub async fn migrate(&self, vm: &str, to: usize) -> Result<v1::Task> {
        let name = self.nodes[to - 1].name.clone();
        let task = self.admin.migrate(vm, &name).await?;
        self.admin.task_done(task, UP).await
    }

    /// Stops a VM, if it runs, and removes it.
    pub async fn remove(&self, vm: &str) -> Result<()> {
        wait_for("the VM to be gone", UP, async || {
            let task = self.admin.stop(vm).await.unwrap_or(0);
            if task != 0 {
                self.admin.task_ended(task, UP).await?;
            }
            // Deleting ends by a task, after which the VM is unknown.
            match self.admin.delete(vm).await {
                Err(status) if status.code() == tonic::Code::NotFound => Ok(Some(())),
                Err(status) => Err(status.into()),
                Ok(()) => Ok(None),
            }
        })
        .await
    }

    /// Ends everything and checks that nothing is left.
    pub fn finish(mut self) -> Result<()> {
        self.finished = true;
        let root = self.root.clone();
        drop(self);
        let left = processes_of(&root);
        match left.is_empty() && !root.exists() {
            true => Ok(()),
            false => bail!("left behind: {} and {left:?}", root.display()),
        }
    }

    /// Leaves everything running; nobody will clean up but the person who reads this.
    pub fn keep(mut self) -> PathBuf {
        let root = self.root.clone();
        self.reaper.dismiss();
        std::mem::forget(self);
        root
    }

    fn keep_logs(&self) {
        let kept = PathBuf::from(format!("{}-logs", self.root.display()));
        let mut logs = Vec::new();
        for node in &self.nodes {
            logs.extend(["controller", "agent"].map(|program| (node, node.log(program))));
        }
        let _ = std::fs::create_dir_all(&kept);
        for (node, log) in logs {
            let name = log.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let _ = std::fs::copy(&log, kept.join(format!("{}-{name}", node.name)));
        }
        self.keep_vmm_logs(&kept);
        eprintln!("the logs of the cluster are kept in {}", kept.display());
    }

    fn keep_vmm_logs(&self, kept: &Path) {
        for node in &self.nodes {
            let Ok(homes) = std::fs::read_dir(node.runtime_dir().join("vms")) else { continue };
            for home in homes.flatten() {
                let name = format!("{}-{}.vmm.log", node.name, home.file_name().display());
                let _ = std::fs::copy(home.path().join("vmm.log"), kept.join(name));
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        kill_all_of(&self.root);
        self.nodes.iter_mut().for_each(Node::power_off);
        if !self.finished {
            self.keep_logs();
        }
        remove_root(&self.root);
        self.reaper.dismiss();
    }
}

fn environment(failpoints: Option<&Failpoints>) -> Vec<(String, String)> {
    let log = std::env::var("BELLWETHER_TEST_LOG").unwrap_or_else(|_| "info,openraft=warn".into());
    let mut environment = vec![("RUST_LOG".to_owned(), log)];
    environment
        .extend(failpoints.map(|points| ("BELLWETHER_FAILPOINTS".to_owned(), points.variable())));
    environment
}

fn controller_toml(options: &Options) -> String {
    let lines = options.timing.iter().map(|(key, value)| format!("{key} = {value}\n"));
    format!("[timing]\n{}", lines.collect::<String>())
}
