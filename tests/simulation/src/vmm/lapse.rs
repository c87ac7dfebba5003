//! A lease that has run out: the guest stands still, and its locks are let go until the same epoch is
//! granted again (`hypervisor/src/driver/lapse.rs`).

use std::rc::Rc;

use bellwether_claim::record;
use bellwether_types::{Arbiter, Epoch};

use super::{Hold, Locks, Phase, This, Vmm, io, status};
use crate::storage::IoError;
use crate::wire::{Code, Status, claim_path, disk_path};

impl Vmm {
    /// The epoch of the locks, held or let go; 0 before.
    pub(super) fn epoch(&self) -> Epoch {
        let state = self.state.borrow();
        let held = state.locks.as_ref().map(|locks| locks.epoch);
        held.or(state.unlocked).unwrap_or_default()
    }

    /// The driver does one thing at a time.
    pub(super) async fn begin(&self) {
        let is_free = || (!self.driver_busy.get()).then_some(());
        self.gate.until(is_free).await;
        self.driver_busy.set(true);
    }

    pub(super) fn done(&self) {
        self.driver_busy.set(false);
        if self.state.borrow().arbiter == Arbiter::Lease {
            self.gate.notify();
        }
    }

    /// The lease has run out with the guest at rest.
    pub(super) fn let_go(&self) {
        let is_due = {
            let state = self.state.borrow();
            let runs = state.phase == Phase::Running && state.arbiter == Arbiter::Lease;
            runs && state.locks.is_some() && !state.writing && !self.driver_busy.get()
        };
        if is_due {
            self.set_hold(Hold::Unlocked, true);
            let locks = self.state.borrow_mut().locks.take();
            self.state.borrow_mut().unlocked = locks.map(|locks| locks.epoch);
            self.unlock();
            self.world.hit("agent", "locks let go");
        }
    }

    /// Takes the locks back under the same epoch, and lets the guest go on as far as they are concerned.
    pub(super) async fn take_back(&self) -> Result<(), Status> {
        let Some(epoch) = self.state.borrow().unlocked else { return Ok(()) };
        match self.retake(epoch).await {
            Ok(locks) => {
                let mut state = self.state.borrow_mut();
                (state.locks, state.unlocked) = (Some(locks), None);
                drop(state);
                self.world.hit("agent", "locks taken back");
                self.enforce();
                self.set_hold(Hold::Unlocked, false);
                Ok(())
            }
            Err(error) => {
                self.unlock();
                if error.code == Code::Aborted {
                    self.world.hit("agent", "locks lost");
                    self.state.borrow_mut().unlocked = None;
                }
                Err(error)
            }
        }
    }

    /// At once or not at all: only if nobody has claimed the VM in between.
    async fn retake(&self, epoch: Epoch) -> Result<Locks, Status> {
        let claim = self.take(claim_path(self.vm), 0).await?;
        let (storage, host, ours) = (&self.world.storage, self.host(), self.ours(epoch));
        let bytes = match storage.read_claim(host, claim_path(self.vm)).await {
            Err(IoError::NotFound) => return Err(status(Code::NotFound, "the claim is gone")),
            other => other.map_err(io)?,
        };
        let Some((slot, index)) = record::current(&bytes) else {
            return Err(status(Code::DataLoss, "the claim is damaged"));
        };
        if !slot.claimed || slot.record != ours {
            return Err(status(Code::Aborted, format!("claim-lost: {}", slot.record)));
        }
        let (slot, index) = self.put_claim(slot, index, claim, ours).await?;
        let disk = self.take(disk_path(self.vm), 0).await?;
        Ok(Locks { epoch, claim, disk, slot, index })
    }
}

/// The lease came back to a guest without locks: the driver is to take them back.
pub(super) fn resume(this: &This) {
    if this.state.borrow().unlocked.is_some() && !this.driver_busy.replace(true) {
        let driver = Rc::clone(this);
        this.world.kernel.spawn(this.process, async move {
            let _asked_again = driver.take_back().await;
            driver.done();
        });
    }
}
