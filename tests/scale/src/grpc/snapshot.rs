//! The snapshot of a controller that was killed: a copy of its database is opened by the same code
//! that a controller starts with, and a new snapshot is made of what it then knows.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bellwether_raft::{ConnectError, ControllerNode, RaftConfig, RaftHandle};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use tonic::transport::Channel;

const PATIENCE: Duration = Duration::from_secs(120);

/// Opens the database in a directory, and makes a snapshot. The process is to have nothing else to
/// do: CPU time is that of all its threads.
pub async fn measure(directory: &Path, node_id: u64) -> Result<Value> {
    let nobody = |_: u64, _: ControllerNode| async {
        Err::<Channel, ConnectError>("nobody is connected to".into())
    };
    let (begun, cpu_ms) = (Instant::now(), own_cpu_ms());
    let raft = RaftHandle::start(RaftConfig::new(node_id, directory), nobody);
    let raft = raft.await.context("open the copy of a controller's database")?;
    let (open_ms, open_cpu_ms) = (milliseconds(begun), own_cpu_ms() - cpu_ms);
    let view = raft.view();
    let applied = view.last_applied.map_or(0, |at| at.index);
    // What the group's status says comes a moment behind the state.
    let mut status = raft.watch_status();
    let caught_up = status.wait_for(|status| status.last_applied.unwrap_or(0) >= applied);
    let covered = tokio::time::timeout(PATIENCE, caught_up).await.context("no status")??.snapshot;
    let covered = covered.unwrap_or(0);
    ensure!(applied > covered, "nothing stands in the log behind the snapshot at {covered}");

    let (begun, cpu_ms) = (Instant::now(), own_cpu_ms());
    raft.trigger_snapshot().await.map_err(anyhow::Error::msg)?;
    let made = status.wait_for(|status| status.snapshot.is_some_and(|at| at >= applied));
    tokio::time::timeout(PATIENCE, made).await.context("no snapshot was made")??;
    let (write_ms, write_cpu_ms) = (milliseconds(begun), own_cpu_ms() - cpu_ms);
    let image = postcard::to_stdvec(&*view.state).context("encode the state")?;
    Ok(json!({
        "snapshot_bytes": image.len(), "snapshot_ms": write_ms, "snapshot_cpu_ms": write_cpu_ms,
        "open_ms": open_ms, "open_cpu_ms": open_cpu_ms, "replayed_entries": applied - covered,
    }))
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1_000.0
}

fn own_cpu_ms() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1_000.0 + time.tv_nsec as f64 / 1e6
}
