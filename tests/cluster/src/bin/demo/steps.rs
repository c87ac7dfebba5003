//! The six things that are shown.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bellwether_cluster_tests::admin::Admin;
use bellwether_cluster_tests::journal::Journal;
use bellwether_cluster_tests::lines::Line;
use bellwether_cluster_tests::process::processes_of;
use bellwether_cluster_tests::{Cluster, Watch, wait_for};
use bellwether_proto::v1;

use crate::report::Report;

const VM: &str = "web-1";
const CMDLINE: &str = "tick_ms=5 mem_mib=160 dirty_mib_s=16 verify_mib_s=128 journal_ms=20";
/// Longer than anything here takes on a slow machine.
const SOON: Duration = Duration::from_secs(30);
/// A write that no leader took is tried again after this.
const WRITE_TIMEOUT: Duration = Duration::from_millis(300);

/// Everything in its order.
pub async fn all(cluster: Cluster, report: &mut Report) -> Result<Cluster> {
    let mut demo = Demo::create(cluster, report).await?;
    demo.migrate(report).await?;
    let dead = demo.kill_node(report).await?;
    demo.kill_leader(dead, report).await?;
    demo.restart_node(dead, report).await?;
    demo.save_and_restore(report).await?;
    demo.check_journal(report)?;
    report.check(
        "the guest never found a wrong byte and never ran twice",
        demo.watch.check().is_ok(),
    )?;
    Ok(demo.cluster)
}

struct Demo {
    cluster: Cluster,
    watch: Watch,
    disk: PathBuf,
}

impl Demo {
    async fn create(cluster: Cluster, report: &mut Report) -> Result<Self> {
        report.step("Create a VM: 256 MiB of memory, a raw disk on the shared storage");
        let guest = cluster.guest(VM)?;
        let disk = guest.disk.clone().context("the guest has a disk")?;
        let (kernel, disk_option) =
            (guest.kernel.display().to_string(), format!("path={},format=raw", disk.display()));
        cluster
            .bell()
            .text(&[
                "vm",
                "create",
                VM,
                "--memory",
                "256M",
                "--vcpus",
                "1",
                "--kernel",
                &kernel,
                "--cmdline",
                CMDLINE,
                "--disk",
                &disk_option,
                "--start",
            ])
            .await?;
        let vm = cluster.bell().json(&["vm", "show", VM]).await?;
        let id = vm["id"].as_str().context("`bell vm show` names no id")?;
        let watch = Watch::start(cluster.runtime_dirs(), id);
        watch.heard_since(0, "the guest to boot", SOON, |line| *line == Line::Boot).await?;
        watch.ticks_on(SOON).await?;
        let node = cluster.admin().vm(VM).await?.node;
        report.check(
            &format!("{VM} boots under KVM on {node}, which the planner chose"),
            !node.is_empty(),
        )?;
        watch.verifies_again(SOON).await?;
        report
            .check("it keeps a pattern in 160 MiB of its memory, rewrites and verifies it", true)?;
        Ok(Self { cluster, watch, disk })
    }

    async fn migrate(&mut self, report: &mut Report) -> Result<()> {
        let home = self.cluster.home_of(VM).await?;
        // The node that will be killed next should not lead: that is another measurement.
        let leader = self.cluster.leader().await?;
        let to = self.cluster.other_than(&[home, leader])?;
        report.step(&format!("Move it to node{to} while it works"));
        let mark = self.watch.mark();
        let to_name = format!("node{to}");
        self.cluster.bell().text(&["vm", "migrate", VM, "--to", &to_name]).await?;
        self.watch.ticks_on(SOON).await?;
        report.check(&format!("it runs on {to_name}"), self.cluster.home_of(VM).await? == to)?;
        self.outage(mark, report).await?;
        self.watch.verifies_again(SOON).await?;
        report.check("its memory is intact", self.watch.check().is_ok())
    }

    /// How long the guest stood still, by its own clock, by the host's, and by the cluster's account.
    async fn outage(&self, mark: usize, report: &mut Report) -> Result<()> {
        let gap =
            self.watch.record().gap_at_move(mark).context("no ticks before and after the move")?;
        let (inside, outside) = (millis(gap.inside), millis(gap.outside));
        report.row(
            "outage inside the guest",
            format!("{inside:.1} ms between two ticks, by its own clock"),
        );
        report.row("outage outside", format!("{outside:.1} ms between their arrivals"));
        let task = last_task(self.cluster.admin(), "migrate").await?;
        report.row("its parts", parts(&task));
        // A guest whose clock stands still with it would never notice an outage.
        let stopped = task.measures.get("outage_us").map_or(0.0, |us| *us as f64 / 1_000.0);
        let claim =
            format!("the guest's clock counted the {stopped:.1} ms in which it stood still");
        report.check(&claim, inside > 0.8 * stopped && stopped > 0.0)?;
        let longest = self.watch.largest_gap(mark).context("the guest printed no ticks")?;
        // The move itself, or a stall while the memory came after it: the guest's worst either way.
        let longest = millis(longest.inside);
        report.row("longest pause", format!("{longest:.1} ms between two ticks, around the move"));
        report.migration_outage_ms = Some(longest);
        Ok(())
    }

    async fn kill_node(&mut self, report: &mut Report) -> Result<usize> {
        let home = self.cluster.home_of(VM).await?;
        report.step(&format!("Kill node{home} without warning: controller, agent and VMM"));
        let mark = self.watch.mark();
        let killed = Instant::now();
        self.cluster.node(home).power_off();
        let tick = self.watch.tick_after(killed, mark, SOON);
        let booted = self
            .watch
            .heard_since(mark, "the guest to boot again", SOON, |line| *line == Line::Boot);
        let booted = booted.await?;
        let tick = tick.await?;
        let tick = if tick.who == booted.who { tick } else { self.watch.ticks_on(SOON).await? };
        let failover = tick.at.saturating_duration_since(killed).as_secs_f64();
        report.failover_s = Some(failover);
        let vm = self.cluster.admin().settled(VM, &["running"], SOON).await?;
        report.check(
            &format!("{VM} runs on {}", vm.node),
            self.cluster.number_of(&vm.node)? != home,
        )?;
        report.row("failover", format!("{failover:.2} s from the kill to the guest's first tick"));
        report.check("there is a fence proof", !vm.fence_proof.is_empty())?;
        report.row("fence proof", vm.fence_proof.clone());
        report.fence_proof = Some(vm.fence_proof);
        self.check_journal(report)?;
        Ok(home)
    }

    /// Every record that the guest called durable has to be on the disk.
    fn check_journal(&self, report: &mut Report) -> Result<()> {
        let acknowledged = self.watch.acknowledged();
        let journal = Journal::scan(&self.disk)?;
        let lost = journal.lost(acknowledged);
        report.journal_records = Some(journal.records);
        report.journal_lost = Some(lost);
        let claim = format!(
            "all {acknowledged} journal records that the guest had flushed are on the disk"
        );
        report.check(&claim, lost == 0 && acknowledged > 0)
    }

    async fn kill_leader(&mut self, dead: usize, report: &mut Report) -> Result<()> {
        let leader = self.cluster.leader().await?;
        report.step(&format!("Kill the leading controller, on node{leader}"));
        report.say(&format!(
            "with node{dead} down it is needed for a quorum, so it is started again at once, as a \
             service manager does"
        ));
        let mark = self.watch.mark();
        let killed = Instant::now();
        self.cluster.node(leader).kill_controller();
        self.cluster.node(leader).start_controller()?;
        let gap = self.first_write(dead, killed).await?;
        report.leader_gap_s = Some(gap);
        report.row("writes refused", format!("{gap:.2} s after the leader was killed"));
        let listed = self.cluster.bell().json(&["vm", "list"]).await?;
        let is_listed = listed.as_array().is_some_and(|vms| vms.len() == 1);
        report.check("management goes on", is_listed)?;
        self.watch.ticks_on(SOON).await?;
        let pause = self.watch.largest_gap(mark).map_or(f64::NAN, |gap| millis(gap.inside));
        report.check(
            &format!("the guest noticed nothing (longest pause {pause:.1} ms)"),
            pause < 1_000.0,
        )
    }

    /// Seconds until a write is accepted again.
    async fn first_write(&self, dead: usize, killed: Instant) -> Result<f64> {
        let living: Vec<usize> = (1..=self.cluster.nodes().len()).filter(|n| *n != dead).collect();
        wait_for("a write to be accepted", SOON, async || {
            for &node in &living {
                let request = v1::CreateJoinTokenRequest { role: "agent".into(), ttl_s: 60 };
                let mut client = self.cluster.admin().of(node);
                let write = tokio::time::timeout(WRITE_TIMEOUT, client.create_join_token(request));
                if matches!(write.await, Ok(Ok(_))) {
                    return Ok(Some(killed.elapsed().as_secs_f64()));
                }
            }
            Ok(None)
        })
        .await
    }

    async fn restart_node(&mut self, dead: usize, report: &mut Report) -> Result<()> {
        report.step(&format!("Switch node{dead} on again"));
        let started = Instant::now();
        self.cluster.node(dead).power_on()?;
        self.cluster.admin().node_is(&format!("node{dead}"), "online", SOON).await?;
        self.cluster.wait_whole().await?;
        report.check(&format!("node{dead} has rejoined"), true)?;
        report.row(
            "rejoin",
            format!("{:.1} s from the start of its processes", started.elapsed().as_secs_f64()),
        );
        let stale = processes_of(self.cluster.nodes()[dead - 1].dir())
            .iter()
            .any(|process| process.program == "bellwether-vmm");
        report.check("its stale VM is gone", !stale)?;
        let running = self.cluster.running_instances(self.watch.vm_id()).await.len();
        report.check("nothing runs twice", running == 1 && self.watch.check().is_ok())
    }

    async fn save_and_restore(&mut self, report: &mut Report) -> Result<()> {
        report.step("Save the VM to the storage, and restore it");
        let bell = self.cluster.bell();
        bell.text(&["vm", "save", VM]).await?;
        let vm = bell.json(&["vm", "show", VM]).await?;
        report.check("it is shown as saved", vm["state"] == "saved")?;
        let running = self.cluster.running_instances(self.watch.vm_id()).await.len();
        report.check("nobody runs it", running == 0)?;
        let bytes = vm["state_file"]["bytes"].as_u64().unwrap_or(0);
        report.row("state file", format!("{} MiB", bytes >> 20));
        let boots = self.watch.record().boots();
        let mark = self.watch.mark();
        bell.text(&["vm", "restore", VM]).await?;
        self.watch.ticks_on(SOON).await?;
        report.check("it goes on where it stopped", self.watch.record().boots() == boots)?;
        self.watch.verifies_again(SOON).await?;
        report.check("its memory's pattern is intact", self.watch.check().is_ok())?;
        let node = self.cluster.admin().vm(VM).await?.node;
        report.say(&format!("it runs on {node}; lines heard since: {}", self.watch.mark() - mark));
        Ok(())
    }
}

async fn last_task(admin: &Admin, kind: &str) -> Result<v1::Task> {
    let reply =
        admin.ask(async |mut c| c.list_tasks(v1::ListTasksRequest { all: true }).await).await?;
    let last = reply.tasks.into_iter().filter(|task| task.kind == kind).max_by_key(|task| task.id);
    last.with_context(|| format!("there was no task {kind}"))
}

/// The measured parts of a move, in the order in which they happen.
fn parts(task: &v1::Task) -> String {
    let names = ["stop", "save", "seal", "commit", "load", "lock", "resume", "outage"];
    let part = |name: &&str| {
        let us = task.measures.get(&format!("{name}_us"))?;
        Some(format!("{name} {:.1}", *us as f64 / 1_000.0))
    };
    let parts: Vec<String> = names.iter().filter_map(part).collect();
    format!("{} (ms)", parts.join(", "))
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}
