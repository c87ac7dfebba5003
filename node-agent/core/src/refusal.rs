//! Why an order is not carried out. The texts reach the administrator through the task's error.

use bellwether_types::{BootId, Epoch, VmId};

use crate::incarnation::Phase;

/// An order that is refused: nothing was done, and nothing will be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    #[error(
        "{order} of VM {vm} comes from a leader of term {term}, but this node has heard of \
         term {seen}; the newer leader decides"
    )]
    OldTerm { vm: VmId, order: &'static str, term: u64, seen: u64 },
    #[error(
        "{order} of VM {vm} is meant for the boot {meant} of this host, but this is the boot {here}; \
         the controllers learn of it when the node registers, then ask again"
    )]
    OtherBoot { vm: VmId, order: &'static str, meant: BootId, here: BootId },
    #[error(
        "{order} of VM {vm} under epoch {epoch}: it is for task {task}, but this node has written \
         the VM's state for task {seen}; the newer task decides"
    )]
    OldTask { vm: VmId, order: &'static str, epoch: Epoch, task: u64, seen: u64 },
    #[error(
        "{order} of VM {vm} under epoch {epoch}: this node has released every epoch up to {floor}; \
         give it a higher one"
    )]
    Released { vm: VmId, order: &'static str, epoch: Epoch, floor: Epoch },
    #[error(
        "{order} of VM {vm} under epoch {epoch}: the guest has not run under it on this node and \
         never will; give a higher epoch"
    )]
    NeverRan { vm: VmId, order: &'static str, epoch: Epoch },
    #[error(
        "{order} of VM {vm} under epoch {epoch}: no VMM of it lives on this node; prepare it first"
    )]
    NoVmm { vm: VmId, order: &'static str, epoch: Epoch },
    #[error(
        "{order} of VM {vm} under epoch {epoch}: its VMM on this node has epoch {current} ({phase})"
    )]
    OtherEpoch { vm: VmId, order: &'static str, epoch: Epoch, current: Epoch, phase: Phase },
    #[error(
        "prepare of VM {vm} under epoch {epoch}: its VMM of epoch {current} still lives on this \
         node ({phase}); release that one first"
    )]
    LowerLives { vm: VmId, epoch: Epoch, current: Epoch, phase: Phase },
    #[error("{order} of VM {vm} under epoch {epoch}: its VMM is {phase}; this needs {needs}")]
    WrongPhase { vm: VmId, order: &'static str, epoch: Epoch, phase: Phase, needs: &'static str },
    #[error(
        "{order} of VM {vm} under epoch {epoch}: its VMM has ended ({reason}); release it, and \
         prepare it again under a higher epoch"
    )]
    Ended { vm: VmId, order: &'static str, epoch: Epoch, reason: String },
    #[error(
        "load-state of VM {vm} under epoch {epoch}: its VMM has loaded another state file; release \
         it and prepare it again"
    )]
    OtherFile { vm: VmId, epoch: Epoch },
    #[error(
        "activate of VM {vm} under epoch {epoch}: its VMM has not loaded the state that the order \
         names, and may have run; release it and prepare it again"
    )]
    NotLoaded { vm: VmId, epoch: Epoch },
    #[error(
        "{order} of VM {vm} under epoch {epoch}: an earlier order ended without an answer and the \
         VMM does not tell its state; outcome unknown, ask again or release it"
    )]
    Uncertain { vm: VmId, order: &'static str, epoch: Epoch },
    #[error(
        "{order} of VM {vm} under epoch {epoch}: its arbiter is the lease, and this node has no \
         live lease; it renews by itself as soon as it reaches a controller, then ask again"
    )]
    NoLease { vm: VmId, order: &'static str, epoch: Epoch },
    #[error(
        "{order} of VM {vm} under epoch {epoch}: this node has not been in touch with a controller \
         recently in this boot; it registers by itself, then ask again"
    )]
    NotRegistered { vm: VmId, order: &'static str, epoch: Epoch },
}

/// What a refusal means for whoever gave the order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum RefusalKind {
    /// The guest has not run under the order's epoch, and never will.
    NeverRan,
    /// It passes by itself: the order is to be given again.
    Passing,
    Lasting,
}

impl Refusal {
    pub fn kind(&self) -> RefusalKind {
        match self {
            Self::NeverRan { .. } => RefusalKind::NeverRan,
            Self::OtherBoot { .. }
            | Self::Uncertain { .. }
            | Self::NoLease { .. }
            | Self::NotRegistered { .. } => RefusalKind::Passing,
            _ => RefusalKind::Lasting,
        }
    }
}
