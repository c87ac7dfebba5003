//! Identities. Each is a type of its own, so that a node can never be taken for a task.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A UUID that names one kind of thing. `K` is a marker and never has a value.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct Id<K> {
    uuid: Uuid,
    #[serde(skip)]
    kind: PhantomData<fn() -> K>,
}

/// Marks the identity of a virtual machine.
pub enum VmKind {}
/// Marks the identity of a cluster.
pub enum ClusterKind {}
/// Marks one boot of one host.
pub enum BootKind {}

/// The logical machine that an administrator owns.
pub type VmId = Id<VmKind>;
/// One cluster; certificates and claims carry it.
pub type ClusterId = Id<ClusterKind>;
/// One boot of one host, as Linux gives it in `/proc/sys/kernel/random/boot_id`.
pub type BootId = Id<BootKind>;

impl<K> Id<K> {
    /// The smallest one, at which a range of ids begins. It names nothing.
    pub const MIN: Self = Self::from_uuid(Uuid::nil());

    /// Wraps a UUID that came from outside: the wire, a disk, a test.
    pub const fn from_uuid(uuid: Uuid) -> Self {
        Self { uuid, kind: PhantomData }
    }

    /// The bare UUID, for encodings.
    pub const fn uuid(&self) -> Uuid {
        self.uuid
    }
}

impl<K> FromStr for Id<K> {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self::from_uuid(Uuid::from_str(text.trim())?))
    }
}

impl<K> fmt::Display for Id<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uuid.fmt(f)
    }
}

impl<K> fmt::Debug for Id<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uuid.fmt(f)
    }
}

// Derives would bind K, although no K is ever stored.
impl<K> Clone for Id<K> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<K> Copy for Id<K> {}
impl<K> PartialEq for Id<K> {
    fn eq(&self, other: &Self) -> bool {
        self.uuid == other.uuid
    }
}
impl<K> Eq for Id<K> {}
impl<K> PartialOrd for Id<K> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<K> Ord for Id<K> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.uuid.cmp(&other.uuid)
    }
}
impl<K> std::hash::Hash for Id<K> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.uuid.hash(state);
    }
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id! {
    /// One host of the cluster. The controller on that host, if any, has the same number.
    NodeId
}
number_id! {
    /// One task (a saga) of the cluster, numbered in the order of the replicated log.
    TaskId
}
number_id! {
    /// Who may run a VM: raised by every change of runner; an older one may touch nothing.
    Epoch
}

impl Epoch {
    /// The epoch after this one.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text() {
        let id: VmId = "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap();
        assert_eq!(id.to_string().parse::<VmId>().unwrap(), id);
        assert!("not-a-uuid".parse::<VmId>().is_err());
    }

    #[test]
    fn boot_id_takes_the_kernel_file_with_its_newline() {
        assert!("01890a5d-ac96-774b-bcce-b302099a8057\n".parse::<BootId>().is_ok());
    }
}
