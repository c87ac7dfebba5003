//! What can go wrong, as the controller needs to tell it apart.

use std::time::Duration;

use openraft::error::{
    ChangeMembershipError, ClientWriteError, Fatal, ForwardToLeader, LinearizableReadError,
    RaftError,
};
use thiserror::Error;

use crate::codec::CodecError;
use crate::store::StoreError;
use crate::types::{ControllerNode, TypeConfig};

/// A controller that leads, as far as is known.
pub type LeaderHint = Option<(u64, ControllerNode)>;

/// Why Raft did not start.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("raft configuration: {0}")]
    Config(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("start raft: {0}")]
    Raft(String),
}

/// Why a new cluster was not made here.
#[derive(Debug, Error)]
pub enum InitializeError {
    #[error("this controller belongs to a cluster already")]
    AlreadyInitialized,
    #[error("initialize the cluster: {0}")]
    Rejected(String),
    #[error("initialize the cluster: raft has stopped: {0}")]
    Fatal(String),
}

/// Why a proposal has no outcome.
#[derive(Debug, Error)]
pub enum ProposeError {
    /// Nothing was written. Ask the leader, if one is known.
    #[error("propose: this controller does not lead{}", hint(.leader))]
    NotLeader { leader: LeaderHint },
    /// The command may or may not be applied, now or later. Never report it as a failure.
    #[error("propose: the outcome is unknown: {reason}")]
    OutcomeUnknown { reason: String },
    /// Nothing was written: no message could carry it.
    #[error("propose: the command has {bytes} bytes, and {max} are allowed")]
    TooLarge { bytes: usize, max: usize },
    #[error("propose: {0}")]
    Encode(CodecError),
    /// Raft has stopped; the outcome is unknown here too, and this process must end.
    #[error("propose: raft has stopped: {0}")]
    Fatal(String),
}

impl ProposeError {
    /// Whether the command may have been applied.
    pub fn is_outcome_unknown(&self) -> bool {
        matches!(self, Self::OutcomeUnknown { .. } | Self::Fatal(_))
    }
}

/// Why leadership is not confirmed.
#[derive(Debug, Error)]
pub enum ConfirmError {
    #[error("confirm leadership: this controller does not lead{}", hint(.leader))]
    NotLeader { leader: LeaderHint },
    #[error("confirm leadership: no quorum answered within {waited:?}")]
    NoQuorum { waited: Duration },
    #[error("confirm leadership: raft has stopped: {0}")]
    Fatal(String),
}

/// Why the membership did not change, or is not known to have changed.
#[derive(Debug, Error)]
pub enum MembershipError {
    #[error("change the membership: this controller does not lead{}", hint(.leader))]
    NotLeader { leader: LeaderHint },
    /// Another change has not ended yet; nothing was written.
    #[error("change the membership: {0}")]
    Busy(String),
    #[error("change the membership: {0}")]
    Rejected(String),
    #[error("change the membership: the outcome is unknown: {reason}")]
    OutcomeUnknown { reason: String },
    #[error("change the membership: raft has stopped: {0}")]
    Fatal(String),
}

/// Why another controller does not lead.
#[derive(Debug, Error)]
pub enum TransferError {
    #[error("transfer leadership to {to}: this controller does not lead{}", hint(.leader))]
    NotLeader { to: u64, leader: LeaderHint },
    #[error("transfer leadership to {to}: it is not a voter")]
    NotVoter { to: u64 },
    #[error("transfer leadership to {to}: it does not lead after {waited:?}")]
    NotTaken { to: u64, waited: Duration },
    #[error("transfer leadership to {to}: raft has stopped: {reason}")]
    Fatal { to: u64, reason: String },
}

fn hint(leader: &LeaderHint) -> String {
    match leader {
        Some((id, node)) => format!("; the leader is {id}, {node}"),
        None => "; no leader is known".into(),
    }
}

pub(crate) fn leader_of(forward: ForwardToLeader<TypeConfig>) -> LeaderHint {
    forward.leader_id.zip(forward.leader_node)
}

pub(crate) fn fatal_text(fatal: &Fatal<TypeConfig>) -> String {
    fatal.to_string()
}

impl From<RaftError<TypeConfig, ClientWriteError<TypeConfig>>> for ProposeError {
    fn from(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> Self {
        match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
                Self::NotLeader { leader: leader_of(forward) }
            }
            // The entry was in the log when the leadership ended: the next leader may have it.
            RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => Self::OutcomeUnknown {
                reason: "the leadership was lost before the command was committed".into(),
            },
            RaftError::APIError(other) => Self::OutcomeUnknown { reason: other.to_string() },
            RaftError::Fatal(fatal) => Self::Fatal(fatal_text(&fatal)),
        }
    }
}

impl From<RaftError<TypeConfig, ClientWriteError<TypeConfig>>> for MembershipError {
    fn from(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> Self {
        match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
                Self::NotLeader { leader: leader_of(forward) }
            }
            RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => Self::OutcomeUnknown {
                reason: "the leadership was lost before the change was committed".into(),
            },
            RaftError::APIError(ClientWriteError::ChangeMembershipError(
                busy @ (ChangeMembershipError::InProgress(_)
                | ChangeMembershipError::UncommittedLeaderLog(_)),
            )) => Self::Busy(busy.to_string()),
            RaftError::APIError(other) => Self::Rejected(other.to_string()),
            RaftError::Fatal(fatal) => Self::Fatal(fatal_text(&fatal)),
        }
    }
}

impl ConfirmError {
    pub(crate) fn from_read(
        error: RaftError<TypeConfig, LinearizableReadError<TypeConfig>>,
        waited: Duration,
    ) -> Self {
        match error {
            RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)) => {
                Self::NotLeader { leader: leader_of(forward) }
            }
            RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)) => {
                Self::NoQuorum { waited }
            }
            RaftError::Fatal(fatal) => Self::Fatal(fatal_text(&fatal)),
        }
    }
}
