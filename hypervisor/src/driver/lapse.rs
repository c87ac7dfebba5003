//! A lease that has run out: the guest stands still, and its locks are let go.
//!
//! ```text
//!              the deadline has passed, no vCPU in the guest, no disk request outstanding
//! locks held ---------------------------------------------------------------------------> let go
//!    ^                                                                                      |
//!    |  granted again, or to be saved: the claim shows our own record still                 |
//!    +--------------------------------------------------------------------------------------+
//!                                       it shows a later runner, or is gone: held for good
//! ```
//!
//! Whoever is given a proof that this runner has stopped finds the locks free, although nobody can
//! reach this host to stop its VMM. Nothing is at stake if the proof never comes: only the runner whose
//! record stands in the claim takes its locks back. A crash in between leaves them free.

use bellwether_claim::ClaimError;

use super::{Driver, VmmError};
use crate::gate::Hold;
use crate::lifecycle::Phase;
use crate::locks::{Host, LockError, Locks};

impl Driver {
    /// The lease has run out with the guest at rest, or came back to a guest without locks.
    pub(super) fn lease_changed(&mut self) {
        let Some(lease) = self.lease.clone() else { return };
        lease.heard();
        let is_lapsed = self.machine.as_ref().is_some_and(|it| it.gate.is_held(Hold::Lease));
        match (self.unlocked, is_lapsed) {
            (None, true) => self.let_go(),
            (Some(_), false) => {
                // The reason is on the board; the lease asks again.
                let _not_yet = self.take_back();
            }
            _ => {}
        }
    }

    fn let_go(&mut self) {
        let (Some(machine), Phase::Running) = (self.machine.clone(), self.phase) else { return };
        machine.gate.hold(Hold::Unlocked);
        // With that hold nobody comes in any more; who came in on a grant of this moment is seen.
        if self.locks.is_none() || !machine.gate.is_held(Hold::Lease) || !machine.gate.is_still() {
            machine.gate.release(Hold::Unlocked);
            return;
        }
        self.unlocked = self.locks.take().map(|locks| locks.epoch());
        self.board.update(|view| view.locked = false);
        tracing::warn!(epoch = self.unlocked, "the lease has run out: the locks are let go");
    }

    /// Takes the locks back under the same epoch, and lets the guest go on as far as they are concerned.
    pub(super) fn take_back(&mut self) -> Result<(), VmmError> {
        let (Some(epoch), Some(machine)) = (self.unlocked, self.machine.clone()) else {
            return Ok(());
        };
        let claimant = self.claimant.as_ref().ok_or(VmmError::NoMachine)?;
        let host = Host { cancel: &self.cancel, board: &self.board };
        match Locks::retake(claimant, epoch, &machine, host) {
            Ok(locks) => self.locks = Some(locks),
            Err(error) => {
                self.not_taken_back(&error);
                return Err(error.into());
            }
        }
        self.unlocked = None;
        self.board.update(|view| view.locked = true);
        machine.wake_devices();
        // The record has just been written anew: an earlier failure to do so is over.
        machine.gate.release(Hold::Claim);
        machine.gate.release(Hold::Unlocked);
        tracing::info!(epoch, "the locks are held again");
        Ok(())
    }

    /// The guest stays held. If a later runner was granted the claim, nothing is tried any more.
    fn not_taken_back(&mut self, error: &LockError) {
        let fault = format!("claim-lost: {error}");
        if self.board.view().claim_fault != fault {
            tracing::warn!(%error, "the locks cannot be taken back");
        }
        self.board.update(|view| view.claim_fault = fault);
        if let (LockError::Claim(ClaimError::Lost { .. }), Some(machine)) = (error, &self.machine) {
            machine.gate.hold(Hold::Claim);
            self.unlocked = None;
        }
    }
}
