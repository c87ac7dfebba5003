//! Moves and saves that write memory while the guest runs: what the guest sees of it, and what is
//! left when somebody dies in the middle of the rounds.
#![forbid(unsafe_code)]
// The log of a failed run is read by a person.
#![allow(clippy::print_stderr)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use bellwether_cluster_tests::lines::Line;
use bellwether_cluster_tests::migration::{Move, Victim, nothing_left, runs_once};
use bellwether_cluster_tests::{Cases, Cluster, Guest, Options, Watch, wait_for};
use bellwether_proto::v1;

const SOON: Duration = Duration::from_secs(60);
const VM: &str = "busy";
const MEMORY_MIB: u64 = 128;
/// Round 0 alone is all memory that the guest has filled; a few pages of its own are zeros.
const ROUND_0_BYTES_MIN: u64 = (MEMORY_MIB << 20) / 10 * 9;

/// All its memory is filled, and a quarter of it is rewritten and verified all the time.
async fn busy(cluster: &Cluster, dirty_mib_s: u64) -> Result<(Guest, Watch)> {
    let guest = cluster.guest(VM)?.memory_mib(MEMORY_MIB).cmdline(format!(
        "tick_ms=5 mem_mib=32 dirty_mib_s={dirty_mib_s} verify_mib_s=32 journal_ms=20 fill=100"
    ));
    let watch = cluster.run(&guest).await?;
    let is_filled = |line: &Line| *line == Line::Filled;
    watch.heard_since(0, "the guest to fill its memory", SOON, is_filled).await?;
    Ok((guest, watch))
}

fn measure(task: &v1::Task, name: &str) -> Result<u64> {
    let found = task.measures.get(name).copied();
    found.with_context(|| format!("no measure {name}: {:?} {:?}", task.measures, task.log))
}

#[tokio::test]
async fn a_busy_guest_is_moved_to_and_fro_and_saved() -> Result<()> {
    let cluster = Cluster::start(Options::patient(2)).await?;
    let (_guest, watch) = busy(&cluster, 16).await?;
    for number in 0..4 {
        let to = cluster.other_than(&[cluster.home_of(VM).await?])?;
        let task = cluster.migrate(VM, to).await.with_context(|| format!("move {number}"))?;
        ensure!(measure(&task, "precopy_rounds")? > 0);
        ensure!(measure(&task, "precopy_bytes")? >= ROUND_0_BYTES_MIN, "{:?}", task.measures);
        ensure!(measure(&task, "pieces_left_out")? == 0, "{:?}", task.measures);
        ensure!(task.log.iter().any(|line| line.text.contains("while the guest ran")));
        watch.verifies_again(SOON).await?;
        eprintln!("move {number}: {:?}", task.measures);
    }
    let task = cluster.admin().save(VM).await?;
    let task = cluster.admin().task_done(task, SOON).await?;
    ensure!(measure(&task, "precopy_bytes")? >= ROUND_0_BYTES_MIN, "{:?}", task.measures);
    let task = cluster.admin().restore(VM, "").await?;
    cluster.admin().task_done(task, SOON).await?;
    watch.verifies_again(SOON).await?;
    ensure!(watch.record().boots() == 1, "the guest booted anew");
    watch.check()?;
    nothing_left(&cluster, SOON).await?;
    cluster.finish()
}

#[tokio::test]
async fn rules_say_whether_and_how() -> Result<()> {
    let cluster = Cluster::start(Options::patient(2)).await?;
    let (_guest, watch) = busy(&cluster, 64).await?;
    let home = cluster.home_of(VM).await?;
    let to = cluster.other_than(&[home])?;

    // So little may be written that no round gets ahead of the guest.
    cluster.bell().text(&["cluster", "set", "--pre-copy-mib-s", "48"]).await?;
    cluster.bell().text(&["vm", "set", VM, "--pre-copy", "give-up", "--downtime-ms", "20"]).await?;
    let task = cluster.admin().migrate(VM, &format!("node{to}")).await?;
    let task = cluster.admin().task_ended(task, SOON).await?;
    ensure!(task.outcome == "failed", "{:?}", task.log);
    ensure!(task.error.contains("cannot converge"), "the reason is: {}", task.error);
    ensure!(cluster.home_of(VM).await? == home);
    nothing_left(&cluster, SOON).await?;

    cluster.bell().text(&["vm", "set", VM, "--pre-copy", "finish"]).await?;
    let task = cluster.migrate(VM, to).await?;
    ensure!(measure(&task, "predicted_outage_us")? > 0);

    cluster.bell().text(&["vm", "set", VM, "--pre-copy", "never"]).await?;
    let task = cluster.migrate(VM, home).await?;
    ensure!(!task.measures.contains_key("precopy_bytes"), "{:?}", task.measures);

    watch.verifies_again(SOON).await?;
    ensure!(watch.record().boots() == 1, "the guest booted anew");
    watch.check()?;
    cluster.finish()
}

/// In the middle of the rounds, not at a step: the limit makes them long enough to be met.
#[tokio::test]
async fn kill_anybody_while_rounds_are_written() -> Result<()> {
    let mut cluster = Cluster::start(Options::default()).await?;
    let (guest, watch) = busy(&cluster, 4).await?;
    cluster.bell().text(&["cluster", "set", "--pre-copy-mib-s", "64"]).await?;
    let mut cases = Cases::new();
    use Victim::{DestinationAgent, DestinationVmm, Leader, SourceAgent, SourceVmm};
    for victim in [SourceAgent, DestinationAgent, Leader, DestinationVmm, SourceVmm] {
        let started = Instant::now();
        let result = in_the_rounds(&mut cluster, &watch, victim).await;
        cases.note(&format!("{victim:?}"), started, result);
    }
    cases.finish()?;
    watch.check()?;
    drop(guest);
    cluster.finish()
}

async fn in_the_rounds(cluster: &mut Cluster, watch: &Watch, victim: Victim) -> Result<()> {
    cluster.wait_whole().await?;
    let vm = cluster.admin().settled(VM, &["running"], SOON).await?;
    let home = cluster.home_of(VM).await?;
    let to = cluster.other_than(&[home])?;
    let boots = watch.record().boots();
    let task = cluster.admin().migrate(VM, &format!("node{to}")).await?;
    wait_for("the rounds to begin", SOON, async || {
        let task = cluster.admin().task(task).await?;
        match task.measures.get("precopy_bytes") {
            Some(_) if task.step == "pre-copy" => Ok(Some(())),
            _ => Err(anyhow!("{} {} {:?}", task.step, task.outcome, task.measures)),
        }
    })
    .await?;
    ensure!(Move { home, to, vm_id: vm.id }.kill(cluster, victim).await?, "nobody to kill");
    cluster.ensure_running()?;
    let task = cluster.admin().task_ended(task, SOON).await?;
    eprintln!("{victim:?}: {} {}", task.outcome, task.error);
    let moved = task.outcome == "done";
    let vm = cluster.admin().settled(VM, &["running"], SOON).await?;
    watch.ticks_on(SOON).await?;
    match victim {
        Victim::SourceVmm => ensure!(watch.record().boots() == boots + 1, "no failover"),
        // The guest of all others has noticed nothing, or a move.
        _ => ensure!(watch.record().boots() == boots, "the guest booted anew"),
    }
    if victim == Victim::DestinationVmm {
        ensure!(!moved && cluster.number_of(&vm.node)? == home, "{}", task.error);
    }
    runs_once(cluster, watch, SOON).await?;
    second_attempt(cluster, watch).await.context("a new attempt")?;
    nothing_left(cluster, SOON).await
}

async fn second_attempt(cluster: &Cluster, watch: &Watch) -> Result<()> {
    cluster.wait_whole().await?;
    cluster.admin().settled(VM, &["running"], SOON).await?;
    let to = cluster.other_than(&[cluster.home_of(VM).await?])?;
    cluster.migrate(VM, to).await?;
    watch.verifies_again(SOON).await?;
    runs_once(cluster, watch, SOON).await
}
