//! `kill -9` of everybody at every step of a migration.
//!
//! One cluster, one VM, a cell for each point and victim: the leader is held at the point, the
//! victim is killed, the leader is let go, and what was killed is started again as a service manager
//! does. Then the VM must run exactly once or be saved, must never have run twice, must have lost no
//! record, and another migration must work.
#![forbid(unsafe_code)]
// The log of a failed run is read by a person.
#![allow(clippy::print_stderr)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bellwether_cluster_tests::failpoints::Hold;
use bellwether_cluster_tests::journal::Journal;
use bellwether_cluster_tests::migration::{Move, Victim, runs_once};
use bellwether_cluster_tests::{Cases, Cluster, Guest, Options, Watch};

const SOON: Duration = Duration::from_secs(40);
const VM: &str = "web";

/// Every step of a migration, before its order is given and after its result is known.
const POINTS: [&str; 10] = [
    "task.migrate.prepare.before",
    "task.migrate.prepare.after",
    "task.migrate.pre-copy.before",
    "task.migrate.pre-copy.after",
    "task.migrate.seal.before",
    "task.migrate.seal.after",
    "task.migrate.load.before",
    "task.migrate.load.after",
    "task.migrate.activate.before",
    "task.migrate.activate.after",
];

#[tokio::test]
async fn kill_the_source_agent_at_every_step() -> Result<()> {
    at_every_point(Victim::SourceAgent).await
}

#[tokio::test]
async fn kill_the_destination_agent_at_every_step() -> Result<()> {
    at_every_point(Victim::DestinationAgent).await
}

#[tokio::test]
async fn kill_the_source_vmm_at_every_step() -> Result<()> {
    at_every_point(Victim::SourceVmm).await
}

#[tokio::test]
async fn kill_the_destination_vmm_at_every_step() -> Result<()> {
    at_every_point(Victim::DestinationVmm).await
}

#[tokio::test]
async fn kill_the_leader_at_every_step() -> Result<()> {
    at_every_point(Victim::Leader).await
}

async fn at_every_point(victim: Victim) -> Result<()> {
    let mut matrix = Matrix::start().await?;
    let mut cases = Cases::new();
    for point in POINTS {
        let started = Instant::now();
        let result = matrix.cell(point, victim).await;
        cases.note(&format!("{victim:?} at {point}"), started, result);
    }
    cases.finish()?;
    matrix.cluster.finish()
}

/// The two places that are not steps of the saga: what an agent has done is not yet known to the
/// leader, and the agent or the leader dies with that knowledge.
#[tokio::test]
async fn kill_with_an_order_half_done() -> Result<()> {
    let mut matrix = Matrix::start().await?;
    let mut cases = Cases::new();
    for point in [
        "agent.pre-copy.after",
        "agent.seal.after",
        "agent.load-state.after",
        "agent.activate.after",
    ] {
        for victim in [Victim::Leader, Victim::SourceAgent, Victim::DestinationAgent] {
            let started = Instant::now();
            let result = matrix.cell(point, victim).await;
            cases.note(&format!("{victim:?} at {point}"), started, result);
        }
    }
    cases.finish()?;
    matrix.cluster.finish()
}

struct Matrix {
    cluster: Cluster,
    guest: Guest,
}

impl Matrix {
    async fn start() -> Result<Self> {
        let options = Options { failpoints: true, ..Options::default() };
        let cluster = Cluster::start(options).await?;
        let guest = cluster.guest(VM)?;
        drop(cluster.run(&guest).await?);
        Ok(Self { cluster, guest })
    }

    async fn cell(&mut self, point: &str, victim: Victim) -> Result<()> {
        self.recover().await.context("before the cell")?;
        let vm_id = self.cluster.admin().vm(VM).await?.id;
        let watch = Watch::start(self.cluster.runtime_dirs(), &vm_id);
        watch.ticks_on(SOON).await.context("before the cell")?;

        let home = self.cluster.home_of(VM).await?;
        let to = self.cluster.other_than(&[home])?;
        let hold = self.cluster.failpoints()?.hold(point)?;
        let task = self.cluster.admin().migrate(VM, &format!("node{to}")).await?;
        self.held(&hold, task).await?;
        let killed = Move { home, to, vm_id }.kill(&mut self.cluster, victim).await?;
        hold.let_go();
        if !killed {
            eprintln!("        nobody to kill: {victim:?} at {point}");
        }
        self.cluster.ensure_running()?;

        let vm = self.cluster.admin().settled(VM, &["running", "saved"], SOON).await?;
        if vm.state == "saved" {
            self.cluster
                .bell()
                .text(&["vm", "restore", VM])
                .await
                .context("restore what was saved")?;
        }
        self.runs_once(&watch).await?;
        self.second_attempt(&watch).await.context("the second attempt")?;
        self.no_record_lost(&watch)
    }

    /// Waits until the point is reached; a task that ends before says why.
    async fn held(&self, hold: &Hold, task: u64) -> Result<()> {
        let held = async { hold.wait_reached(SOON).await.map(|_| ()) };
        let ended = async {
            let task = self.cluster.admin().task_ended(task, SOON).await?;
            bail!(
                "the task ended without being held: {} {} {:?}",
                task.outcome,
                task.error,
                task.log
            )
        };
        tokio::select! {
            held = held => held,
            ended = ended => ended,
        }
    }

    /// Whatever an earlier cell left must not count against this one.
    async fn recover(&mut self) -> Result<()> {
        self.cluster.failpoints()?.clear()?;
        self.cluster.ensure_running()?;
        self.cluster.wait_whole().await?;
        let vm = self.cluster.admin().settled(VM, &["running", "saved", "stopped"], SOON).await?;
        match vm.state.as_str() {
            "saved" => self.cluster.bell().text(&["vm", "restore", VM]).await.map(|_| ()),
            "stopped" => self.cluster.bell().text(&["vm", "start", VM]).await.map(|_| ()),
            _ => Ok(()),
        }
    }

    async fn runs_once(&self, watch: &Watch) -> Result<()> {
        watch.ticks_on(SOON).await?;
        runs_once(&self.cluster, watch, SOON).await
    }

    async fn second_attempt(&self, watch: &Watch) -> Result<()> {
        self.cluster.wait_whole().await?;
        self.cluster.admin().settled(VM, &["running"], SOON).await?;
        let home = self.cluster.home_of(VM).await?;
        let to = self.cluster.other_than(&[home])?;
        self.cluster.migrate(VM, to).await?;
        ensure!(self.cluster.home_of(VM).await? == to, "it is not on node{to}");
        self.runs_once(watch).await
    }

    fn no_record_lost(&self, watch: &Watch) -> Result<()> {
        let disk = self.guest.disk.as_ref().context("the guest has a disk")?;
        let acknowledged = watch.acknowledged();
        let journal = Journal::scan(disk)?;
        let lost = journal.lost(acknowledged);
        ensure!(lost == 0, "{lost} of {acknowledged} records are lost; holes: {:?}", journal.holes);
        Ok(())
    }
}
