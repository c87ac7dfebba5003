//! The types that openraft is instantiated with.

use std::fmt;

use bellwether_core::{Command, Outcome};
use serde::{Deserialize, Serialize};

/// Where one controller is reached. It is part of the replicated membership, so every controller
/// can name the leader's addresses to whoever asks the wrong one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerNode {
    /// The name of the host, as the administrator knows it.
    pub name: String,
    /// A host name or an IP address, without port and without brackets.
    pub address: String,
    /// Where agents and administrators are served.
    pub api_port: u16,
    /// Where other controllers are served.
    pub raft_port: u16,
    /// Where hosts that have no certificate yet ask to join.
    pub join_port: u16,
}

impl ControllerNode {
    /// `host:port` of the Raft service, with brackets around an IPv6 address.
    pub fn raft_authority(&self) -> String {
        authority(&self.address, self.raft_port)
    }

    /// `host:port` of the API, with brackets around an IPv6 address.
    pub fn api_authority(&self) -> String {
        authority(&self.address, self.api_port)
    }
}

fn authority(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

impl fmt::Display for ControllerNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.raft_authority())
    }
}

/// A command on its way through the log. openraft wants to print what it replicates, and a
/// command of the core has no reason to be printable otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Proposal(pub Command);

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// What applying one log entry gives back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Applied {
    /// A command was applied, and this is what the core made of it.
    Outcome(Outcome),
    /// An entry of Raft itself (a new leader's blank entry, a change of membership).
    Internal,
}

openraft::declare_raft_types!(
    /// One leader per term (`leader_id_std`), so that a term names a leadership.
    pub TypeConfig:
        D = Proposal,
        R = Applied,
        NodeId = u64,
        Node = ControllerNode,
        Term = u64,
        LeaderId = openraft::impls::leader_id_std::LeaderId<Self::Term, Self::NodeId>,
        AsyncRuntime = openraft_rt_tokio::TokioRuntime,
);

/// The position of an entry in the log: the term of the leader that wrote it, and its index.
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
/// A vote, as Raft persists it.
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
/// One log entry.
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
/// A membership, with the log id of the entry that set it.
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
/// What is known of a snapshot besides its bytes.
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
/// A snapshot with its bytes.
pub type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Vec<u8>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_is_bracketed() {
        let node = |address: &str| ControllerNode {
            address: address.into(),
            raft_port: 7444,
            ..ControllerNode::default()
        };
        assert_eq!(node("fd00::1").raft_authority(), "[fd00::1]:7444");
        assert_eq!(node("host-a").raft_authority(), "host-a:7444");
    }
}
