//! Decisions in words: why this node, and why not the others.

use std::fmt;

use bellwether_types::NodeId;

use super::Free;

/// Why a node was not chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    NotWanted,
    NotOnline(&'static str),
    Cordoned,
    Quarantined,
    NotAnOwner,
    Leaving,
    TriedBefore,
    Apart { group: String },
    Memory { free_mib: u64, needed_mib: u64 },
    Vcpus { free: u32, needed: u32 },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWanted => write!(f, "another node was asked for"),
            Self::NotOnline(phase) => write!(f, "is {phase}"),
            Self::Cordoned => write!(f, "is draining or in maintenance"),
            Self::Quarantined => write!(f, "is in quarantine, it was lost too often"),
            Self::NotAnOwner => write!(f, "is not among the VM's possible owners"),
            Self::Leaving => write!(f, "the VM runs there now"),
            Self::TriedBefore => write!(f, "failed in this task already"),
            Self::Apart { group } => {
                write!(f, "has a VM of the group {group}, from which it is kept apart")
            }
            Self::Memory { free_mib, needed_mib } => {
                write!(f, "has {free_mib} MiB of memory free, {needed_mib} MiB are needed")
            }
            Self::Vcpus { free, needed } => write!(f, "has {free} vCPUs free, {needed} are needed"),
        }
    }
}

/// No node will do; each with its reason.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NoNode {
    pub vm: String,
    /// It is not the nodes: this VM has to run first.
    pub waits_for: Option<String>,
    pub reasons: Vec<(String, Reason)>,
}

/// How many nodes a refusal names; the others it counts by their reasons' kinds.
const REFUSED_MAX: usize = 16;

impl fmt::Display for NoNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(other) = &self.waits_for {
            return write!(f, "VM {} waits for VM {other}", self.vm);
        }
        write!(f, "no node can take VM {}: {}", self.vm, self.why())
    }
}

impl NoNode {
    /// The reasons alone.
    pub fn why(&self) -> String {
        if let Some(other) = &self.waits_for {
            return format!("it waits for VM {other}");
        }
        if self.reasons.is_empty() {
            return "the cluster has no nodes".to_owned();
        }
        let named = self.reasons.len().min(REFUSED_MAX);
        let list = self.reasons[..named].iter().map(|(node, reason)| format!("{node} {reason}"));
        let list = list.collect::<Vec<_>>().join("; ");
        match self.reasons.len() - named {
            0 => list,
            more => format!("{list}; and {more} more"),
        }
    }
}

fn write_reasons(
    f: &mut fmt::Formatter<'_>,
    first: &str,
    reasons: &[(String, Reason)],
) -> fmt::Result {
    for (index, (node, reason)) in reasons.iter().enumerate() {
        write!(f, "{}{node} {reason}", if index == 0 { first } else { "; " })?;
    }
    Ok(())
}

/// A node that was chosen, with what spoke for it and against the others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    pub node: NodeId,
    pub name: String,
    /// What it had left before.
    pub free: Free,
    /// Its memory in MiB and its vCPUs.
    pub total: (u64, u32),
    /// Its place among the preferred owners, from 0.
    pub preference: Option<usize>,
    /// VMs of the VM's own anti-affinity groups there.
    pub neighbours: u32,
    pub next_best: Option<String>,
    /// Other nodes that could take it.
    pub others: usize,
    /// Some of those that could not, and how many there are.
    pub refused: Vec<(String, Reason)>,
    pub refused_count: usize,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (memory, vcpus) = self.total;
        write!(f, "{} had {} of {memory} MiB", self.name, self.free.memory_mib)?;
        write!(f, " and {} of {vcpus} vCPUs free", self.free.vcpus)?;
        if let Some(preference) = self.preference {
            write!(f, ", is its preferred owner number {}", preference + 1)?;
        }
        match self.neighbours {
            0 => {}
            1 => write!(f, ", has 1 VM of its groups")?,
            many => write!(f, ", has {many} VMs of its groups")?,
        }
        match (&self.next_best, self.others) {
            (Some(next), 1) => write!(f, "; {next} could have taken it, too")?,
            (Some(next), others) => {
                write!(f, "; {others} others could have taken it, {next} the best of them")?;
            }
            (None, _) if self.refused.is_empty() => {}
            (None, _) => write!(f, "; no other node could")?,
        }
        write_reasons(f, ": ", &self.refused)?;
        match self.refused_count.saturating_sub(self.refused.len()) {
            0 => Ok(()),
            more => write!(f, "; and {more} more could not"),
        }
    }
}
