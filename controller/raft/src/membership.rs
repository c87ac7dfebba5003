//! Who belongs to the group. Every change goes through the log, and one change at a time.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::BoxFuture;
use openraft::ChangeMembers;
use openraft::error::{ClientWriteError, RaftError};
use tokio::time::{Instant, timeout_at};

use crate::error::MembershipError;
use crate::handle::RaftHandle;
use crate::machine::StateMachine;
use crate::types::{ControllerNode, TypeConfig};

type WriteError = RaftError<TypeConfig, ClientWriteError<TypeConfig>>;
type Raft = openraft::Raft<TypeConfig, StateMachine>;
/// One try of a change.
type Change = BoxFuture<'static, Result<(), WriteError>>;

impl RaftHandle {
    /// Adds a controller that receives the log and does not vote, and waits until it has nearly all
    /// of it. A controller that belongs to the group already stays what it is.
    pub async fn add_learner(&self, id: u64, node: ControllerNode) -> Result<(), MembershipError> {
        let add = |raft: Raft| -> Change {
            let node = node.clone();
            Box::pin(async move { raft.add_learner(id, node, true).await.map(drop) })
        };
        self.bounded(add).await
    }

    /// Adds a controller that votes. It is a learner first, so that the quorum never waits for one
    /// that has nothing.
    pub async fn add_voter(&self, id: u64, node: ControllerNode) -> Result<(), MembershipError> {
        self.add_learner(id, node).await?;
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id]))).await
    }

    /// Removes a controller, whether it votes or not. A leader that is removed hands over.
    pub async fn remove_member(&self, id: u64) -> Result<(), MembershipError> {
        let status = self.status();
        if status.voters.contains_key(&id) {
            return self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id]))).await;
        }
        self.change(ChangeMembers::RemoveNodes(BTreeSet::from([id]))).await
    }

    /// Records other addresses of a member, for instance after its host was renumbered.
    pub async fn update_member(
        &self,
        id: u64,
        node: ControllerNode,
    ) -> Result<(), MembershipError> {
        self.change(ChangeMembers::SetNodes(BTreeMap::from([(id, node)]))).await
    }

    async fn change(
        &self,
        change: ChangeMembers<u64, ControllerNode>,
    ) -> Result<(), MembershipError> {
        let apply = |raft: Raft| -> Change {
            let change = change.clone();
            Box::pin(async move { raft.change_membership(change, false).await.map(drop) })
        };
        self.bounded(apply).await
    }

    /// Tries a change, and again while this leader cannot write for a moment, or while the entries
    /// of an election or of another change are not committed: each change says what shall be, so a
    /// second try of one that came half way completes it.
    ///
    /// A try is boxed, because the compiler cannot prove openraft's bare futures `Send` in a task
    /// that the caller spawns.
    async fn bounded(&self, change: impl Fn(Raft) -> Change) -> Result<(), MembershipError> {
        let waited = self.config.timers.admin_timeout;
        let deadline = Instant::now() + waited;
        let patience = deadline.min(Instant::now() + self.config.timers.election_timeout_max);
        loop {
            let Ok(result) = timeout_at(deadline, change(self.raft.clone())).await else {
                let reason = format!("no commit after {waited:?}");
                return Err(MembershipError::OutcomeUnknown { reason });
            };
            let error = match result {
                Ok(_) => return Ok(()),
                Err(error) => MembershipError::from(error),
            };
            let settling = match &error {
                MembershipError::NotLeader { leader } => self.may_lead(leader),
                MembershipError::Busy(_) => true,
                _ => false,
            };
            if !settling || Instant::now() >= patience {
                return Err(error);
            }
            self.wait_for_news().await;
        }
    }
}
