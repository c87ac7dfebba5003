//! The words of Bellwether as types.
//!
//! Every crate speaks in these: identities that cannot be mixed up ([`ids`]), the specification
//! that an administrator gives ([`spec`]), and the states that a VM and a node can be in
//! ([`states`]). Nothing here does I/O or knows a clock.
#![forbid(unsafe_code)]

pub mod ids;
pub mod member;
pub mod nic;
pub mod rules;
pub mod spec;
pub mod states;
pub mod watchdog;

pub use ids::{BootId, ClusterId, Epoch, Id, NodeId, TaskId, VmId};
pub use member::{MemberRole, Ports};
pub use nic::{Mac, MacError, NicSpec};
pub use rules::{
    ClusterPatch, ClusterSettings, Failback, PreCopy, RestartLimit, RuleError, Strength, VmPatch,
    VmRules,
};
pub use spec::{DiskFormat, DiskSpec, RestartPolicy, SpecError, VmSpec};
pub use states::{Arbiter, FenceProof, Handover, NodePhase, StateFileRef, VmState};
pub use watchdog::{WatchdogBound, WatchdogTiming, WatchdogTimingError};
