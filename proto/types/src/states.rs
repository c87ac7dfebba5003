//! The states of VMs and nodes, and the evidence that an old runner is gone.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::{BootId, Epoch, NodeId};

/// What an agent observes of a VM. Intent is never written in these words.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    Stopped,
    Starting,
    Running,
    Paused,
    Saving,
    Saved,
    Restoring,
    Stopping,
    Failed,
    Unknown,
}

/// Where a node stands in the life of the cluster.
///
/// ```text
/// joining -> online <-> draining <-> maintenance
///              |  ^
///              v  |  (registers again: same boot = it was only cut off; new boot = proof)
///            unknown -> fencing -> fenced -> (registers again) online
///              any -> gone (removed by an administrator)
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodePhase {
    Joining,
    Online,
    Draining,
    Maintenance,
    Unknown,
    Fencing,
    Fenced,
    Gone,
}

/// Who decides whether the running VMM may go on when its node loses its lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arbiter {
    /// An exclusive lock on the storage, held all the VMM's life: the VM goes on.
    Storage,
    /// The clock: the VM pauses at the deadline and goes on if the same epoch is granted again.
    Lease,
}

/// The recorded evidence that an old runner can no longer write (design, protocol 1).
///
/// A takeover needs one of these. The variants that this release cannot produce yet have their
/// place here, because replicated logs outlive releases.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FenceProof {
    /// The agent of the old runner reports its VMM reaped and its I/O drained, in the same boot.
    Released { node: NodeId, boot_id: BootId },
    /// The old runner sealed the VM's state on the storage and let go.
    HandedOver { node: NodeId },
    /// The node registered again with a new boot id, so nothing of its old boot runs.
    Rebooted { node: NodeId, old: BootId, new: BootId },
    /// The new node holds the lock that the old runner held for all its life.
    Storage { holder: NodeId, epoch: Epoch },
    /// A fence agent switched the node off and its status then said off.
    Power { device: String },
    /// The armed hardware watchdog's bound has passed.
    Watchdog { waited_ms: u64 },
    /// A person with the right to do so asserted it.
    Operator { who: String },
}

impl FenceProof {
    /// The stable short name, as shown to administrators and in JSON.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Released { .. } => "released",
            Self::HandedOver { .. } => "handed-over",
            Self::Rebooted { .. } => "rebooted",
            Self::Storage { .. } => "storage",
            Self::Power { .. } => "power",
            Self::Watchdog { .. } => "watchdog",
            Self::Operator { .. } => "operator",
        }
    }
}

impl fmt::Display for FenceProof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Released { node, .. } => write!(f, "released: node {node} reaped its VMM"),
            Self::HandedOver { node } => write!(f, "handed-over: node {node} sealed and let go"),
            Self::Rebooted { node, new, .. } => {
                write!(f, "rebooted: node {node} registered with boot {new}")
            }
            Self::Storage { holder, epoch } => {
                write!(f, "storage: node {holder} holds the lock since epoch {epoch}")
            }
            Self::Power { device } => write!(f, "power: {device} reports off"),
            Self::Watchdog { waited_ms } => write!(f, "watchdog: waited {waited_ms} ms"),
            Self::Operator { who } => write!(f, "operator: asserted by {who}"),
        }
    }
}

/// A sealed state file, as replicated state knows it. The hash roots all its checksums.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StateFileRef {
    pub path: PathBuf,
    /// Blake3 of the sealed header, which holds the checksums of everything else.
    pub hash: [u8; 32],
    /// The epoch of the runner that sealed it.
    pub epoch: Epoch,
    pub bytes: u64,
}

/// A runner that was cut off from the controllers has sealed its VM and let go of it. It stands in the
/// VM's claim, under its lock.
///
/// The record and not the file decides: a seal that failed may leave a file that looks sealed, and
/// its guest went on. Every later claim carries the record on, until one lets a guest run: that one
/// erases it first, durably (docs/model.md, `NoHandoverRecord`, `RecordKept`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Handover {
    /// The epoch under which the VM was sealed.
    pub epoch: Epoch,
    /// The generation in the name of the state file.
    pub generation: u64,
    pub bytes: u64,
    /// As in [`StateFileRef`].
    pub hash: [u8; 32],
}

macro_rules! lowercase_names {
    ($type:ident { $($variant:ident => $name:literal),+ $(,)? }) => {
        impl $type {
            /// The word as administrators and scripts see it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
            /// The value for a word, or none.
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($name => Some(Self::$variant),)+ _ => None }
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

lowercase_names!(VmState {
    Stopped => "stopped", Starting => "starting", Running => "running", Paused => "paused",
    Saving => "saving", Saved => "saved", Restoring => "restoring", Stopping => "stopping",
    Failed => "failed", Unknown => "unknown",
});
lowercase_names!(NodePhase {
    Joining => "joining", Online => "online", Draining => "draining",
    Maintenance => "maintenance", Unknown => "unknown", Fencing => "fencing",
    Fenced => "fenced", Gone => "gone",
});
lowercase_names!(Arbiter { Storage => "storage", Lease => "lease" });
