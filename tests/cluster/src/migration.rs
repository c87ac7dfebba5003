//! A move that a test hits, who can be hit in it, and what must be so afterwards.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use crate::{Cluster, Watch, wait_for};

/// Who can be hit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Victim {
    SourceAgent,
    DestinationAgent,
    SourceVmm,
    DestinationVmm,
    /// The controller that leads.
    Leader,
}

/// From a node to another, by their numbers.
pub struct Move {
    pub home: usize,
    pub to: usize,
    pub vm_id: String,
}

impl Move {
    /// SIGKILL. Returns whether there was anybody.
    pub async fn kill(&self, cluster: &mut Cluster, victim: Victim) -> Result<bool> {
        match victim {
            Victim::SourceAgent => cluster.node(self.home).kill_agent(),
            Victim::DestinationAgent => cluster.node(self.to).kill_agent(),
            Victim::SourceVmm => return Ok(cluster.kill_vmm(self.home, &self.vm_id) > 0),
            Victim::DestinationVmm => return Ok(cluster.kill_vmm(self.to, &self.vm_id) > 0),
            Victim::Leader => {
                let leader = cluster.leader().await?;
                cluster.node(leader).kill_controller();
            }
        }
        Ok(true)
    }
}

/// Waits until one VMM runs the guest, and checks that there never were two.
pub async fn runs_once(cluster: &Cluster, watch: &Watch, limit: Duration) -> Result<()> {
    wait_for("exactly one VMM to run the guest", limit, async || {
        let running = cluster.running_instances(watch.vm_id()).await;
        match running.len() {
            1 => Ok(Some(())),
            _ => Err(anyhow!("{running:?}")),
        }
    })
    .await?;
    watch.check()
}

/// Waits until no state file is left: one that was not sealed, or that was loaded, goes.
pub async fn nothing_left(cluster: &Cluster, limit: Duration) -> Result<()> {
    let dir = cluster.storage().join("state");
    wait_for("the state files to go", limit, async || {
        let left = std::fs::read_dir(&dir)?.collect::<std::io::Result<Vec<_>>>()?;
        if left.is_empty() { Ok(Some(())) } else { bail!("{left:?}") }
    })
    .await
}
