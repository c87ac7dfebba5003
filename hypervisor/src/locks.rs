//! What makes a VMM the one runner of its VM: the claim with its epoch, then each disk's lock.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bellwether_claim::{Claim, ClaimError, ClaimRecord, DiskLock, DiskLockError};
use bellwether_types::{BootId, Epoch, Handover, NodeId, VmId};
use uuid::Uuid;

use crate::board::Board;
use crate::claim_watch::WatchedClaim;
use crate::machine::{DiskUnit, Machine};

/// How long one attempt waits before it looks whether the VMM is to stop.
const SLICE: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error(transparent)]
    Claim(#[from] ClaimError),
    #[error(transparent)]
    Disk(#[from] DiskLockError),
    #[error("the VMM holds epoch {held}; epoch {asked} is older")]
    OlderEpoch { held: u64, asked: u64 },
    #[error("start the watch over the claim: {0}")]
    Watch(std::io::Error),
    #[error("the VM has no claim in which a handover could be recorded; its VMM works alone")]
    NoClaim,
    #[error("waiting for the locks was called off: the VMM is to stop")]
    Cancelled,
}

impl LockError {
    /// Somebody else holds what we need; it may become free.
    pub fn is_held(&self) -> bool {
        matches!(
            self,
            Self::Claim(ClaimError::Held { .. }) | Self::Disk(DiskLockError::Held { .. })
        )
    }
}

/// Who asks for the locks.
#[derive(Clone, Debug)]
pub struct Claimant {
    pub vm_id: VmId,
    /// No claim for a VMM that works alone.
    pub claim_path: Option<PathBuf>,
    pub node_id: NodeId,
    pub boot_id: BootId,
    /// Tells this process's start command from any other of the same epoch.
    pub nonce: u64,
}

impl Claimant {
    fn record(&self, epoch: u64) -> ClaimRecord {
        ClaimRecord {
            vm_id: self.vm_id,
            epoch: Epoch(epoch),
            node: self.node_id,
            boot_id: self.boot_id,
            nonce: self.nonce,
        }
    }
}

/// What waiting for locks and watching over them needs of the VMM.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    /// Set when the VMM is to stop.
    pub cancel: &'a Arc<AtomicBool>,
    pub board: &'a Arc<Board>,
}

/// The locks, held until this is dropped or the process ends. Drop it only when the guest stands still.
pub struct Locks {
    epoch: u64,
    nonce: u64,
    claim: Option<WatchedClaim>,
    _disks: Vec<DiskLock>,
}

impl Locks {
    /// Takes the claim, then the disks in their order; waits at most `wait` in all.
    pub fn acquire(
        claimant: &Claimant,
        epoch: u64,
        machine: &Machine,
        wait: Duration,
        host: Host<'_>,
    ) -> Result<Self, LockError> {
        let cancel = host.cancel;
        let deadline = Instant::now() + wait;
        let record = claimant.record(epoch);
        let claim = claimant.claim_path.as_ref().map(|path| {
            in_slices(deadline, cancel, |until| Ok(Claim::acquire_within(path, record, until)?))
        });
        let claim = claim.transpose()?;
        let lock = |unit: &DiskUnit| {
            let disk = unit.block.disk();
            in_slices(deadline, cancel, |until| {
                let (file, path) = (disk.file(), disk.path());
                Ok(DiskLock::acquire_within(file, path, disk.is_read_only(), until)?)
            })
        };
        let disks = machine.disks.iter().map(lock).collect::<Result<_, LockError>>()?;
        Self::watched(claimant, epoch, claim, disks, machine, host)
    }

    /// Takes back the locks of `epoch` that were let go, at once or not at all: only if nobody has
    /// claimed the VM in between.
    pub fn retake(
        claimant: &Claimant,
        epoch: u64,
        machine: &Machine,
        host: Host<'_>,
    ) -> Result<Self, LockError> {
        let record = claimant.record(epoch);
        let claim = claimant.claim_path.as_ref().map(|path| Claim::retake(path, record));
        let claim = claim.transpose()?;
        let lock = |unit: &DiskUnit| {
            let disk = unit.block.disk();
            DiskLock::acquire(disk.file(), disk.path(), disk.is_read_only())
        };
        let disks = machine.disks.iter().map(lock).collect::<Result<_, DiskLockError>>()?;
        Self::watched(claimant, epoch, claim, disks, machine, host)
    }

    fn watched(
        claimant: &Claimant,
        epoch: u64,
        claim: Option<Claim>,
        disks: Vec<DiskLock>,
        machine: &Machine,
        host: Host<'_>,
    ) -> Result<Self, LockError> {
        let watch =
            |claim| WatchedClaim::start(claim, Arc::clone(&machine.gate), Arc::clone(host.board));
        let claim = claim.map(watch).transpose().map_err(LockError::Watch)?;
        Ok(Self { epoch, nonce: claimant.nonce, claim, _disks: disks })
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Takes the claim on to a higher epoch, without letting go; the same epoch changes nothing.
    pub fn raise(&mut self, epoch: u64) -> Result<(), LockError> {
        if epoch < self.epoch {
            return Err(LockError::OlderEpoch { held: self.epoch, asked: epoch });
        }
        if let Some(claim) = self.claim.as_ref().filter(|_| epoch > self.epoch) {
            claim.with(|claim| claim.raise(Epoch(epoch), self.nonce)).transpose()?;
        }
        self.epoch = epoch;
        Ok(())
    }

    /// Records in the claim that the VM is sealed and let go.
    pub fn hand_over(&self, handover: Handover) -> Result<(), LockError> {
        let claim = self.claim.as_ref().ok_or(LockError::NoClaim)?;
        Ok(claim.with(|claim| claim.hand_over(handover)).ok_or(LockError::NoClaim)??)
    }

    /// A guest is about to run: what was handed over before is of the past.
    pub fn consume_handover(&self) -> Result<(), LockError> {
        let claim = self.claim.as_ref();
        Ok(claim.and_then(|it| it.with(Claim::consume_handover)).unwrap_or(Ok(()))?)
    }

    /// What an earlier runner handed over with the claim.
    pub fn handover(&self) -> Option<Handover> {
        self.claim.as_ref().and_then(|it| it.with(|claim| claim.handover())).flatten()
    }
}

/// A node's boot id, for a VMM that was given none.
pub fn host_boot_id() -> BootId {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.parse().unwrap_or_else(|_| BootId::from_uuid(Uuid::nil()))
}

/// A number that no other start command has.
pub fn fresh_nonce() -> u64 {
    Uuid::new_v4().as_u64_pair().0
}

/// Repeats a bounded wait until the deadline, so that a stop is noticed in between.
fn in_slices<T>(
    deadline: Instant,
    cancel: &AtomicBool,
    mut attempt: impl FnMut(Instant) -> Result<T, LockError>,
) -> Result<T, LockError> {
    loop {
        let until = deadline.min(Instant::now() + SLICE);
        match attempt(until) {
            Err(error) if error.is_held() && Instant::now() < deadline => {
                if cancel.load(Ordering::SeqCst) {
                    return Err(LockError::Cancelled);
                }
            }
            outcome => return outcome,
        }
    }
}
