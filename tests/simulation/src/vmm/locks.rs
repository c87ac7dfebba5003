//! What makes a VMM the one runner of its VM: the claim with its epoch, then the disk's lock.

use bellwether_claim::record::{self, ClaimRecord, SLOT_OFFSETS, Slot};
use bellwether_types::{Epoch, Handover};

use super::{LOCK_SLICE, Locks, Vmm, io, status};
use crate::kernel::{MS, Nanos};
use crate::storage::IoError;
use crate::wire::{Code, Status, claim_path, disk_path};

impl Vmm {
    /// Takes the locks, or raises the epoch of those that are held.
    pub(super) async fn ensure_locks(&self, epoch: Epoch, wait_ms: u64) -> Result<(), Status> {
        let held = self.state.borrow().locks.as_ref().map(|locks| locks.epoch);
        match held {
            Some(held) if epoch < held => {
                return Err(status(Code::Aborted, format!("the VMM holds epoch {held}")));
            }
            Some(held) if epoch == held => {}
            Some(_) => self.raise(epoch).await?,
            None => self.acquire(epoch, wait_ms).await?,
        }
        self.set_epoch(epoch);
        Ok(())
    }

    pub(super) fn set_epoch(&self, epoch: Epoch) {
        if let Some(fact) = self.world.oracle.borrow_mut().vmms.get_mut(&self.process)
            && epoch != Epoch(0)
        {
            fact.epoch = epoch;
        }
        self.enforce();
    }

    pub(super) fn ours(&self, epoch: Epoch) -> ClaimRecord {
        let nonce = self.state.borrow().nonce;
        let boot_id = self.world.boot(self.node);
        ClaimRecord { vm_id: self.vm, epoch, node: self.node, boot_id, nonce }
    }

    /// Takes the claim, then the disk; waits at most so long in all.
    async fn acquire(&self, epoch: Epoch, wait_ms: u64) -> Result<(), Status> {
        let deadline = self.world.kernel.boottime(self.host()) + wait_ms * MS;
        let claim = self.take(claim_path(self.vm), deadline).await?;
        let (slot, index) = match self.write_claim(claim, epoch).await {
            Ok(written) => written,
            Err(error) => {
                self.unlock();
                return Err(error);
            }
        };
        let disk = match self.take(disk_path(self.vm), deadline).await {
            Ok(disk) => disk,
            Err(error) => {
                self.unlock();
                return Err(error);
            }
        };
        self.state.borrow_mut().locks = Some(Locks { epoch, claim, disk, slot, index });
        Ok(())
    }

    pub(super) fn unlock(&self) {
        self.world.storage.unlock_all(self.host(), self.process, |_| {});
    }

    /// One lock, tried again while somebody else has it.
    pub(super) async fn take(&self, path: String, deadline: Nanos) -> Result<u64, Status> {
        loop {
            let lock = self.world.storage.lock(self.process, path.clone()).await.map_err(io)?;
            if let Some(stamp) = lock {
                return Ok(stamp);
            }
            self.world.hit("storage", "lock-busy");
            if self.world.kernel.boottime(self.host()) >= deadline {
                return Err(status(Code::FailedPrecondition, format!("{path} is held")));
            }
            if self.stopping.get() {
                return Err(status(Code::FailedPrecondition, "the VMM is to stop"));
            }
            self.sleep(LOCK_SLICE).await;
        }
    }

    /// Reads the claim under its lock, and writes ours if the record lets us in.
    async fn write_claim(&self, stamp: u64, epoch: Epoch) -> Result<(Slot, usize), Status> {
        let (storage, host, path) = (&self.world.storage, self.host(), claim_path(self.vm));
        let ours = self.ours(epoch);
        let bytes = match storage.read_claim(host, path.clone()).await {
            Err(IoError::NotFound) => {
                let fresh = record::unclaimed_file(&ours);
                storage.create_claim(host, path.clone(), fresh.clone()).await.map_err(io)?;
                fresh
            }
            other => other.map_err(io)?,
        };
        let Some((slot, index)) = record::current(&bytes) else {
            return Err(status(Code::DataLoss, "the claim is damaged"));
        };
        self.put_claim(slot, index, stamp, ours).await
    }

    pub(super) async fn put_claim(
        &self,
        slot: Slot,
        index: usize,
        stamp: u64,
        ours: ClaimRecord,
    ) -> Result<(Slot, usize), Status> {
        if slot.admit(&ours).is_err() {
            self.world.hit("storage", "claim-superseded");
            return Err(status(Code::Aborted, format!("superseded by {}", slot.record)));
        }
        let (next, at) = slot.succeed(index, ours);
        self.write_slot(next, at, stamp).await?;
        Ok((next, at))
    }

    /// What was handed over ends with the next guest, durably before its first instruction.
    pub(super) async fn consume_handover(&self) -> Result<(), Status> {
        let known = self.state.borrow().locks.as_ref().and_then(|locks| locks.slot.handover);
        match known {
            Some(_) => self.record_handover(None).await,
            None => Ok(()),
        }
    }

    /// Writes our record with this hand-over into the slot that does not count.
    pub(super) async fn record_handover(&self, handover: Option<Handover>) -> Result<(), Status> {
        let (next, at, claim) = {
            let state = self.state.borrow();
            let Some(Locks { slot, index, claim, .. }) = &state.locks else {
                return Err(status(Code::FailedPrecondition, "the VMM holds no claim"));
            };
            let (next, at) = slot.succeed(*index, slot.record);
            (Slot { handover, ..next }, at, *claim)
        };
        self.write_slot(next, at, claim).await?;
        if let Some(locks) = &mut self.state.borrow_mut().locks {
            (locks.slot, locks.index) = (next, at);
        }
        Ok(())
    }

    async fn write_slot(&self, slot: Slot, at: usize, stamp: u64) -> Result<(), Status> {
        let offset = usize::try_from(SLOT_OFFSETS[at]).unwrap_or(0);
        let target = (claim_path(self.vm), stamp);
        let (storage, host) = (&self.world.storage, self.host());
        storage.write_claim(host, target, offset, slot.encode().to_vec()).await.map_err(io)
    }

    /// Takes the claim on to a higher epoch, without letting go.
    async fn raise(&self, epoch: Epoch) -> Result<(), Status> {
        let (slot, index, claim) = {
            let state = self.state.borrow();
            let Some(locks) = &state.locks else { return Ok(()) };
            (locks.slot, locks.index, locks.claim)
        };
        let (slot, index) = self.put_claim(slot, index, claim, self.ours(epoch)).await?;
        if let Some(locks) = &mut self.state.borrow_mut().locks {
            (locks.slot, locks.index, locks.epoch) = (slot, index, epoch);
        }
        Ok(())
    }
}
