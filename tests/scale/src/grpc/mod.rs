//! A real controller group, three processes with mutual TLS and a disk, under the load of simulated
//! hosts over real gRPC.
//!
//! ```text
//!   clients (32) --create, start--> controllers 1..3 (processes) <--join, register, renew-- hosts 1..n
//!                                        leader ------------ orders (each host has a port) --> hosts
//! ```
//!
//! The hosts are a load generator and no test of agents: their joining, renewal and reports are the
//! real agent's code, their orders are answered at once without a VMM ([`orders`]).

mod claims;
mod fleet;
mod load;
mod orders;
pub mod snapshot;
mod usage;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bellwether_cluster_tests::measure::load_average;
use bellwether_cluster_tests::{Cluster, Options, wait_for};
use bellwether_proto::v1;
use serde_json::{Map, Value, json};

use self::fleet::Fleet;
use self::usage::Usage;

const CONTROLLERS: usize = 3;
/// Silence after which a node is called unknown; a busy machine must not look like dead hosts.
const SUSPECT_AFTER_MS: u64 = 6_000;
/// A failover that takes longer is measured, and the controllers' logs are kept.
const SLOW_FAILOVER_MS: f64 = 3.0 * SUSPECT_AFTER_MS as f64;
/// Nothing takes longer, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(600);
/// Commands that are committed while a controller is down.
const MISSED: usize = 50;

/// What grows with the cluster.
pub const MEASURES: [&str; 21] = [
    "join_ms",
    "online_ms",
    "create_per_s",
    "start_per_s",
    "start_all_ms",
    "start_all_leader_cpu_ms",
    "start_all_group_cpu_ms",
    "leader_bytes",
    "follower_bytes",
    "peak_bytes",
    "rest_leader_cpu_share",
    "rest_group_cpu_share",
    "snapshot_bytes",
    "snapshot_ms",
    "snapshot_cpu_ms",
    "open_ms",
    "recover_ms",
    "recover_cpu_ms",
    "failover_ms",
    "failover_leader_cpu_ms",
    "failover_group_cpu_ms",
];

/// Measures one size; the cluster is watched at rest for so long.
pub async fn measure(nodes: usize, vms: usize, rest: Duration) -> Result<Value> {
    let mut bench = Bench::start(nodes, vms).await?;
    bench.fill().await?;
    bench.rest(rest).await?;
    bench.recover().await?;
    bench.fail().await?;
    bench.end()
}

/// A cluster under load, and what was measured of it so far.
struct Bench {
    nodes: usize,
    vms: usize,
    cluster: Cluster,
    fleet: Fleet,
    leader: usize,
    leader_changes: u64,
    result: Map<String, Value>,
}

/// When a part began, and what each controller had used until then.
struct Mark {
    at: Instant,
    leader: usize,
    used: Vec<Usage>,
}

/// What a part has used.
struct Used {
    ms: f64,
    /// None when the leader was another one at the end than at the beginning.
    leader_cpu_ms: Option<f64>,
    group_cpu_ms: f64,
}

impl Bench {
    async fn start(nodes: usize, vms: usize) -> Result<Self> {
        ensure!(vms >= MISSED, "give at least {MISSED} VMs");
        let timing = vec![("suspect_after_ms", SUSPECT_AFTER_MS)];
        let options = Options { nodes: CONTROLLERS, agents: false, timing, ..Options::default() };
        let cluster = Cluster::start(options).await?;
        let leader = cluster.leader().await?;
        let address = cluster.nodes().first().context("a cluster of no nodes")?.address;
        let mut result = Map::new();
        result.insert("nodes".into(), json!(nodes));
        result.insert("vms".into(), json!(vms));
        result.insert("machine_load".into(), json!(load_average()?));
        let begun = Instant::now();
        let directory = cluster.root().join("a");
        let fleet = Fleet::join(cluster.admin(), &directory, address, nodes).await?;
        result.insert("join_ms".into(), json!(milliseconds(begun)));
        let mut bench = Self { nodes, vms, cluster, fleet, leader, leader_changes: 0, result };
        let begun = Instant::now();
        bench.all_online(nodes).await?;
        bench.note("online_ms", milliseconds(begun));
        Ok(bench)
    }

    fn note(&mut self, name: &str, value: impl Into<Value>) {
        self.result.insert(name.into(), value.into());
    }

    fn say(&self, what: &str) {
        eprintln!("  {} nodes, {} VMs over gRPC: {what}", self.nodes, self.vms);
    }

    async fn all_online(&self, count: usize) -> Result<()> {
        let what = format!("{count} nodes to be online");
        wait_for(&what, PATIENCE, async || {
            let status = self.cluster.admin().status().await?;
            match status.nodes_online == count as u64 {
                true => Ok(Some(())),
                false => bail!("{} are", status.nodes_online),
            }
        })
        .await
    }

    /// A part begins.
    async fn mark(&mut self) -> Result<Mark> {
        let leader = self.cluster.leader().await?;
        self.leader_changes += u64::from(leader != self.leader);
        self.leader = leader;
        Ok(Mark { at: Instant::now(), leader, used: self.usage()? })
    }

    /// What all controllers have used so far.
    fn usage(&self) -> Result<Vec<Usage>> {
        let pids = self.cluster.nodes().iter().map(|node| node.controller_pid());
        pids.map(|pid| Usage::of(pid.context("a controller is not running")?)).collect()
    }

    /// What was used since a mark.
    async fn since(&mut self, mark: &Mark) -> Result<Used> {
        let ms = milliseconds(mark.at);
        let now = self.mark().await?;
        let each = now.used.iter().zip(&mark.used).map(|(now, then)| now.cpu_ms - then.cpu_ms);
        let each: Vec<f64> = each.collect();
        let leader_cpu_ms = each.get(mark.leader - 1).filter(|_| now.leader == mark.leader);
        let group_cpu_ms = each.iter().sum();
        Ok(Used { ms, leader_cpu_ms: leader_cpu_ms.copied(), group_cpu_ms })
    }

    async fn note_since(&mut self, part: &str, mark: &Mark) -> Result<Used> {
        let used = self.since(mark).await?;
        self.note(&format!("{part}_ms"), used.ms);
        self.note(&format!("{part}_leader_cpu_ms"), json!(used.leader_cpu_ms));
        self.note(&format!("{part}_group_cpu_ms"), used.group_cpu_ms);
        Ok(used)
    }

    /// Creates all VMs, then starts all of them.
    async fn fill(&mut self) -> Result<()> {
        let created = load::create(self.cluster.admin(), self.vms).await?;
        self.say(&format!("{:.0} VMs created a second", created.per_s()));
        self.note("create_per_s", created.per_s());
        self.note("create_latency_ms", created.latency_ms());
        let mark = self.mark().await?;
        let started = load::start(self.cluster.admin(), self.vms).await?;
        self.all_run().await?;
        let used = self.note_since("start_all", &mark).await?;
        self.note("start_per_s", self.vms as f64 / used.ms * 1_000.0);
        self.note("start_latency_ms", started.latency_ms());
        self.say(&format!("all run after {:.1} s", used.ms / 1_000.0));
        self.all_settled().await
    }

    /// Waits until as many VMs run as there are, by the hosts' own account.
    async fn all_run(&self) -> Result<()> {
        let mut running = self.fleet.claims.running();
        let all = running.wait_for(|running| *running == self.vms);
        match tokio::time::timeout(PATIENCE, all).await {
            Ok(all) => all.map(drop).context("the hosts are gone"),
            Err(_) => bail!("{} of {} VMs run", *self.fleet.claims.running().borrow(), self.vms),
        }
    }

    /// Waits until no task is under way and the controllers know that all VMs run.
    async fn all_settled(&self) -> Result<()> {
        wait_for("the controllers to be at rest", PATIENCE, async || {
            let request = v1::ListTasksRequest { all: false };
            let admin = self.cluster.admin();
            let tasks = admin.ask(async |mut c| c.list_tasks(request).await).await?.tasks;
            let status = admin.status().await?;
            match tasks.is_empty() && status.vms_running == self.vms as u64 {
                true => Ok(Some(())),
                false => bail!("{} tasks, {} VMs run", tasks.len(), status.vms_running),
            }
        })
        .await
    }

    /// What the controllers take when nothing is asked of them.
    async fn rest(&mut self, rest: Duration) -> Result<()> {
        let (mark, renewals) = (self.mark().await?, self.fleet.renewals());
        tokio::time::sleep(rest).await;
        let renewals = self.fleet.renewals() - renewals;
        let used = self.since(&mark).await?;
        let leader = used.leader_cpu_ms.map(|ms| ms / used.ms);
        self.note("renewals_per_s", renewals as f64 / used.ms * 1_000.0);
        self.note("rest_leader_cpu_share", json!(leader));
        self.note("rest_group_cpu_share", used.group_cpu_ms / used.ms);
        let sizes: Vec<u64> = self.usage()?.iter().map(|usage| usage.resident_bytes).collect();
        let largest = |leads: bool| {
            let those = sizes.iter().enumerate().filter(|(n, _)| (n + 1 == self.leader) == leads);
            those.map(|(_, bytes)| *bytes).max().unwrap_or(0)
        };
        let (leader_bytes, follower_bytes) = (largest(true), largest(false));
        self.note("leader_bytes", leader_bytes);
        self.note("follower_bytes", follower_bytes);
        self.say(&format!(
            "at rest the leader takes {:.0} % of a core and {} MB",
            leader.unwrap_or(f64::NAN) * 100.0,
            leader_bytes / 1_000_000
        ));
        Ok(())
    }

    /// A controller that does not lead is killed, misses some commands, and comes back.
    async fn recover(&mut self) -> Result<()> {
        let number = self.cluster.other_than(&[self.leader])?;
        self.cluster.node(number).kill_controller();
        let directory = self.cluster.nodes()[number - 1].controller_dir();
        self.look_at_snapshot(&directory, number)?;
        load::touch(&self.cluster.admin().of(self.leader), MISSED).await?;
        let target = self.cluster.admin().of(self.leader);
        let target = target.clone().get_cluster_status(v1::ClusterStatusRequest {}).await?;
        let target = target.into_inner().last_applied;
        let begun = Instant::now();
        self.cluster.node(number).start_controller()?;
        let itself = self.cluster.admin().of(number);
        wait_for("the restarted controller to be as far as the others", PATIENCE, async || {
            let status = itself.clone().get_cluster_status(v1::ClusterStatusRequest {}).await?;
            let is_it = |c: &v1::ControllerStatus| {
                c.matched >= target && c.member.as_ref().is_some_and(|m| m.id == number as u64)
            };
            Ok(status.into_inner().controllers.iter().any(is_it).then_some(()))
        })
        .await?;
        self.note("recover_ms", milliseconds(begun));
        let pid = self.cluster.nodes()[number - 1].controller_pid();
        let usage = Usage::of(pid.context("the restarted controller has ended")?)?;
        self.note("recover_cpu_ms", usage.cpu_ms);
        self.say(&format!("a killed controller is back after {:.0} ms", milliseconds(begun)));
        Ok(())
    }

    /// In a process of its own, so that CPU time is that of the snapshot alone.
    fn look_at_snapshot(&mut self, directory: &Path, number: usize) -> Result<()> {
        let copy = self.cluster.root().join("copy");
        std::fs::create_dir(&copy).context("make room for a copy")?;
        let name = bellwether_raft::DATABASE_FILE;
        std::fs::copy(directory.join(name), copy.join(name)).context("copy a database")?;
        let own = std::env::current_exe().context("find this program")?;
        let number = number.to_string();
        let mut command = Command::new(own);
        command.arg("snapshot").arg(&copy).arg(number);
        let measured = crate::measured(&mut command)?;
        for (name, value) in measured.as_object().into_iter().flatten() {
            self.note(name, value.clone());
        }
        std::fs::remove_dir_all(&copy).context("remove the copy")
    }

    /// Every tenth host loses power, until all their VMs run elsewhere.
    async fn fail(&mut self) -> Result<()> {
        let mark = self.mark().await?;
        let (hosts, lost) = self.fleet.cut_power_of_a_tenth();
        self.all_run().await?;
        let used = self.note_since("failover", &mark).await?;
        self.note("failover_vms", lost);
        self.note("failover_hosts", hosts);
        let seconds = used.ms / 1_000.0;
        self.say(&format!("{lost} VMs of {hosts} hosts run again after {seconds:.1} s"));
        self.all_settled().await?;
        let peak = self.usage()?.iter().map(|usage| usage.peak_bytes).max();
        self.note("peak_bytes", peak.unwrap_or(0));
        let nodes = self.cluster.admin().nodes().await?;
        let suspected = nodes.iter().filter(|node| node.losses > 0).count();
        self.note("falsely_suspected", suspected.saturating_sub(hosts));
        let gone = nodes.iter().filter(|node| node.phase != "online").count();
        ensure!(gone == hosts, "{gone} nodes are not online, and {hosts} lost power");
        Ok(())
    }

    fn end(mut self) -> Result<Value> {
        if let Some(broken) = self.fleet.claims.broken() {
            bail!("a VM was to run twice: {broken}");
        }
        self.note("leader_changes", self.leader_changes);
        let slow = self.result["failover_ms"].as_f64().is_some_and(|ms| ms > SLOW_FAILOVER_MS);
        drop(self.fleet);
        match slow {
            // Dropped unfinished, it leaves its logs for a person to look at.
            true => drop(self.cluster),
            false => self.cluster.finish()?,
        }
        Ok(Value::Object(self.result))
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1_000.0
}
