//! The ordered end: nothing in flight, nothing locked, the reason recorded.

use super::Driver;
use crate::clock;
use crate::gate::Hold;
use crate::lifecycle::Phase;

impl Driver {
    /// Stops the guest where it is, drains and syncs its disks, and lets go of the locks.
    ///
    /// If the disks cannot be drained, the locks stay until the process has ended: the kernel then
    /// releases them after the last request.
    pub(super) fn stop(&mut self, reason: &str) -> String {
        let begun = clock::boottime_ns();
        self.abort_pre_copy();
        if let Some(machine) = &self.machine {
            machine.gate.hold(Hold::NotStarted);
            let was_sealed = self.phase == Phase::Sealed;
            match if was_sealed { Ok(()) } else { machine.settle() } {
                Ok(()) => {
                    self.locks = None;
                    self.board.update(|view| view.locked = false);
                }
                Err(error) => {
                    tracing::error!(%error, "the disks are not drained; the locks stay");
                    // Dropping them would unlock; the end of the process does it at the right time.
                    std::mem::forget(self.locks.take());
                    self.board.update(|view| view.locked = true);
                }
            }
            machine.serial.console().flush();
        }
        self.board.update(|view| view.reason = reason.to_owned());
        tracing::info!(reason, state = %self.phase, took_us = clock::us_since(begun), "the VMM ends");
        crate::exit::record(reason);
        self.enter(Phase::Exited);
        reason.to_owned()
    }
}
