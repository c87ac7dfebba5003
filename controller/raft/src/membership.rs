//! Who belongs to the group. Every change goes through the log, and one change at a time.

use std::collections::{BTreeMap, BTreeSet};

use openraft::ChangeMembers;
use openraft::error::{ClientWriteError, RaftError};
use tokio::time::timeout;

use crate::error::MembershipError;
use crate::handle::RaftHandle;
use crate::types::{ControllerNode, TypeConfig};

type WriteError = RaftError<TypeConfig, ClientWriteError<TypeConfig>>;

impl RaftHandle {
    /// Adds a controller that receives the log and does not vote, and waits until it has nearly all
    /// of it. A controller that belongs to the group already stays what it is.
    pub async fn add_learner(&self, id: u64, node: ControllerNode) -> Result<(), MembershipError> {
        self.bounded(self.raft.add_learner(id, node, true)).await
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
        self.bounded(self.raft.change_membership(change, false)).await
    }

    async fn bounded<T>(
        &self,
        change: impl Future<Output = Result<T, WriteError>>,
    ) -> Result<(), MembershipError> {
        let waited = self.config.timers.admin_timeout;
        match timeout(waited, change).await {
            Ok(result) => Ok(result.map(drop)?),
            Err(_) => {
                let reason = format!("no commit after {waited:?}");
                Err(MembershipError::OutcomeUnknown { reason })
            }
        }
    }
}
