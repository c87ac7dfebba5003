//! What this controller knows of the group: who leads, who belongs to it, how far it is.

use std::collections::BTreeMap;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::{RaftMetrics, ServerState};

use crate::error::LeaderHint;
use crate::types::{ControllerNode, TypeConfig};

/// What a controller is at the moment, in its own opinion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Receives the log and does not vote: it joins, or was removed.
    Learner,
    Follower,
    Candidate,
    /// It leads *as far as it knows*; see [`crate::RaftHandle::confirm_leadership`].
    Leader,
    Stopped,
}

/// A picture of the group as one controller sees it. Nothing here is proof of anything.
#[derive(Clone, Debug, PartialEq)]
pub struct RaftStatus {
    pub node_id: u64,
    pub term: u64,
    pub role: Role,
    pub leader: LeaderHint,
    /// The index of the last entry in the log here.
    pub last_log: Option<u64>,
    /// The index of the last entry applied here.
    pub last_applied: Option<u64>,
    /// The last index that the snapshot here covers.
    pub snapshot: Option<u64>,
    /// The last index that was removed from the log here.
    pub purged: Option<u64>,
    pub voters: BTreeMap<u64, ControllerNode>,
    pub learners: BTreeMap<u64, ControllerNode>,
    /// On the leader: the last index that each other controller is known to have.
    pub replicated: BTreeMap<u64, Option<u64>>,
    /// Why Raft has stopped, if it has.
    pub stopped: Option<String>,
}

impl RaftStatus {
    pub(crate) fn new(metrics: &RaftMetrics<TypeConfig>) -> Self {
        let membership = metrics.membership_config.membership();
        let node = |id: u64| membership.get_node(&id).cloned().unwrap_or_default();
        let stopped = metrics.running_state.as_ref().err().map(ToString::to_string);
        let replicated = metrics.replication.iter().flatten();
        Self {
            node_id: metrics.id,
            term: metrics.current_term,
            role: if stopped.is_some() { Role::Stopped } else { role(metrics.state) },
            leader: metrics
                .current_leader
                .and_then(|id| membership.get_node(&id).map(|node| (id, node.clone()))),
            last_log: metrics.last_log_index,
            last_applied: metrics.last_applied.map(|id| id.index),
            snapshot: metrics.snapshot.map(|id| id.index),
            purged: metrics.purged.map(|id| id.index),
            voters: membership.voter_ids().map(|id| (id, node(id))).collect(),
            learners: membership.learner_ids().map(|id| (id, node(id))).collect(),
            replicated: replicated.map(|(id, at)| (*id, at.map(|id| id.index))).collect(),
            stopped,
        }
    }

    /// Whether this controller thinks that it leads.
    pub fn is_leader(&self) -> bool {
        self.role == Role::Leader
    }
}

fn role(state: ServerState) -> Role {
    match state {
        ServerState::Learner => Role::Learner,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Leader => Role::Leader,
        ServerState::Shutdown => Role::Stopped,
    }
}

pub(crate) type MetricsReceiver =
    openraft::alias::WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>;

/// Raft has stopped, so nothing will change any more.
#[derive(Debug, thiserror::Error)]
#[error("raft has stopped")]
pub struct Stopped;

/// Lets one task follow the status.
#[derive(Clone)]
pub struct StatusWatch {
    metrics: MetricsReceiver,
}

impl StatusWatch {
    pub(crate) fn new(metrics: MetricsReceiver) -> Self {
        Self { metrics }
    }

    /// The status now.
    pub fn current(&self) -> RaftStatus {
        RaftStatus::new(&self.metrics.borrow_watched())
    }

    /// Waits until something changed since the last call, and returns the status then.
    pub async fn changed(&mut self) -> Result<RaftStatus, Stopped> {
        self.metrics.changed().await.map_err(|_| Stopped)?;
        Ok(self.current())
    }

    /// Waits until the status satisfies a condition; it may do so already.
    pub async fn wait_for(
        &mut self,
        mut condition: impl FnMut(&RaftStatus) -> bool,
    ) -> Result<RaftStatus, Stopped> {
        loop {
            let status = self.current();
            if condition(&status) {
                return Ok(status);
            }
            self.metrics.changed().await.map_err(|_| Stopped)?;
        }
    }
}
