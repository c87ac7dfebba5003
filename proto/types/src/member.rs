//! What members of a cluster are, and where they listen.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a member does. An administrator is no member, so there is no word for it here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberRole {
    /// Holds replicated state and decides.
    Controller,
    /// Runs VMs on its host.
    Agent,
}

impl MemberRole {
    /// The word on the wire and in files.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Agent => "agent",
        }
    }

    /// The role for a word, or none.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Controller, Self::Agent].into_iter().find(|role| role.as_str() == word)
    }
}

impl fmt::Display for MemberRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The TCP ports of a host. A member listens only on those of its role.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ports {
    /// Administration and nodes (controllers).
    pub api: u16,
    /// Raft (controllers).
    pub raft: u16,
    /// Joining (controllers).
    pub join: u16,
    /// Commands of the controller (agents).
    pub agent: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self { api: 7400, raft: 7401, join: 7402, agent: 7410 }
    }
}

impl Ports {
    /// What is wrong with them, in words for an administrator.
    pub fn problem(&self) -> Option<String> {
        let ports = [self.api, self.raft, self.join, self.agent];
        if ports.contains(&0) {
            return Some("a port is 0; give each a number from 1 to 65535".into());
        }
        let twice = ports.iter().enumerate().find(|(i, port)| ports[..*i].contains(port));
        twice.map(|(_, port)| format!("the port {port} is given twice; each service needs its own"))
    }
}
