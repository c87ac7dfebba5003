//! What is measured of one size of a cluster, in a process of its own so that its memory is its own.

use anyhow::{Context, Result, ensure};
use bellwether_core::command::Change;
use bellwether_core::{State, TaskKind};
use bellwether_types::NodeId;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::cluster::Cluster;

/// What grows with the cluster.
pub const MEASURES: [&str; 10] = [
    "state_bytes",
    "commands_per_s",
    "snapshot_bytes",
    "encode_ms",
    "read_ms",
    "recover_ms",
    "idle_plan_ms",
    "drain_plan_ms",
    "failover_plan_ms",
    "failover_apply_ms",
];

/// One node in ten fails, or is drained.
const SHARE: u64 = 10;

/// The most commands that stand in the log behind a snapshot.
const LOG_MAX: u64 = 5_000;

/// Measures one size; times are CPU time of the one thread, so that a busy machine does not count.
pub fn measure(nodes: u64, vms: u64) -> Result<Value> {
    let empty = resident_bytes()?;
    let mut cluster = Cluster::of(nodes, 7);
    let (_, fill_ms) = timed(|| cluster.fill(vms));
    ensure!(cluster.running() as u64 == vms, "{} of {vms} VMs run", cluster.running());
    cluster.report_but(|_| false);
    let state_bytes = resident_bytes()?.saturating_sub(empty);
    let commands = cluster.commands;

    let (image, encode_ms) = timed(|| postcard::to_stdvec(&cluster.state));
    let image = image.context("encode the state")?;
    let (read, read_ms) = timed(|| postcard::from_bytes::<State>(&image));
    let read = read.context("decode the state")?;
    ensure!(read == cluster.state, "what was read is not what was written");
    drop(read);

    // A restarted controller reads the snapshot and applies what stands in the log behind it.
    let replay_ms = fill_ms * LOG_MAX as f64 / commands as f64;
    let recover_ms = read_ms + replay_ms;
    let (idle, idle_plan_ms) = timed(|| cluster.plan());
    ensure!(idle.is_empty(), "a cluster that is well needs nothing: {:?}", idle.first());
    let drain = drain(&mut cluster, nodes)?;
    let failover = failover(&mut cluster, nodes)?;
    Ok(json!({
        "nodes": nodes, "vms": vms, "state_bytes": state_bytes,
        "commands_per_s": commands as f64 / (fill_ms / 1_000.0),
        "snapshot_bytes": image.len(), "encode_ms": encode_ms,
        "read_ms": read_ms, "recover_ms": recover_ms,
        "idle_plan_ms": idle_plan_ms, "drain_plan_ms": drain,
        "failover_vms": failover.vms, "failover_plan_ms": failover.plan_ms,
        "failover_apply_ms": failover.apply_ms,
    }))
}

/// The first round of planning when a tenth of the nodes is to be emptied.
fn drain(cluster: &mut Cluster, nodes: u64) -> Result<f64> {
    let chosen: Vec<NodeId> = every_tenth(cluster, nodes);
    for node in &chosen {
        cluster.apply(Change::Cordon { node: *node, cordoned: true });
    }
    let (changes, plan_ms) = timed(|| cluster.plan());
    ensure!(changes.len() == chosen.len() * 2, "two moves from each node: {}", changes.len());
    for node in chosen {
        cluster.apply(Change::Cordon { node, cordoned: false });
    }
    Ok(plan_ms)
}

struct Failover {
    vms: usize,
    plan_ms: f64,
    apply_ms: f64,
}

/// A tenth of the nodes falls silent at once: all rounds of planning until each of their VMs has a
/// node, and the commands that carry it out.
fn failover(cluster: &mut Cluster, nodes: u64) -> Result<Failover> {
    let lost = every_tenth(cluster, nodes);
    let vms = lost.iter().map(|node| cluster.state.vms_of(*node).count()).sum();
    cluster.now += 10_000;
    cluster.report_but(|node| lost.contains(&node));
    let (mut plan_ms, mut apply_ms) = (0.0, 0.0);
    loop {
        let (changes, planned_ms) = timed(|| cluster.plan());
        plan_ms += planned_ms;
        if changes.is_empty() {
            break;
        }
        let (_, applied_ms) = timed(|| cluster.apply_all(changes));
        apply_ms += applied_ms;
    }
    let placed = cluster.state.active_tasks().filter(|task| {
        task.kind == TaskKind::Failover
            && task.step.attempt().is_some_and(|a| !lost.contains(&a.node))
    });
    ensure!(placed.count() == vms, "each of the {vms} VMs has a new node");
    Ok(Failover { vms, plan_ms, apply_ms })
}

fn every_tenth(cluster: &Cluster, nodes: u64) -> Vec<NodeId> {
    let step = usize::try_from(SHARE).unwrap_or(1);
    let count = usize::try_from((nodes / SHARE).max(1)).unwrap_or(1);
    cluster.state.nodes.keys().copied().step_by(step).take(count).collect()
}

/// The result, and the CPU time that it took in milliseconds.
fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec as f64 * 1_000.0 + time.tv_nsec as f64 / 1e6
    };
    let before = now();
    let result = work();
    (result, now() - before)
}

fn resident_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").context("read /proc/self/statm")?;
    let pages: u64 = text.split(' ').nth(1).context("statm has no second field")?.parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}
