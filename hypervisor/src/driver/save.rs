//! Save: seal the VM, or let it go on as if nothing had been.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bellwether_statefile::Identity;
use bellwether_types::{Handover, StateFileRef};

use super::{Driver, VmmError};
use crate::board::Sealed;
use crate::gate::Hold;
use crate::kvm::dirty::KvmDirtyLog;
use crate::lifecycle::{Phase, Verb};
use crate::machine::Machine;
use crate::precopy::Warm;
use crate::snapshot::{SaveError, Saved};

/// How long one wait for restored memory is, before we look whether the VMM is to stop.
pub(super) const SLICE: Duration = Duration::from_millis(100);

impl Driver {
    pub(super) fn save(&mut self, directory: &Path, generation: u64) -> Result<Sealed, VmmError> {
        let phase = self.next(Verb::Save)?;
        if self.phase == Phase::Sealed {
            return self.sealed_as(generation);
        }
        let machine = Arc::clone(self.machine()?);
        if machine.gate.is_held(Hold::Superseded) || machine.gate.is_held(Hold::Claim) {
            return Err(VmmError::Superseded);
        }
        self.take_back()?;
        self.wait_memory_whole()?;
        let identity = self.save_identity(generation)?;
        let saved = match self.take_warm(directory, generation)? {
            Some(warm) => {
                let (saved, log) = seal_warm(&machine, warm)?;
                self.spent_log = Some(log);
                saved
            }
            None => seal(&machine, directory, identity)?,
        };
        let sealed = Sealed {
            file: StateFileRef {
                path: saved.file.path,
                hash: saved.file.hash,
                epoch: identity.epoch,
                bytes: saved.file.len,
            },
            times: saved.times,
            bytes_written: saved.file.bytes_written,
            generation,
        };
        self.board.update(|view| view.sealed = Some(sealed.clone()));
        self.enter(phase);
        tracing::info!(path = %sealed.file.path.display(), times = ?saved.times, "sealed");
        Ok(sealed)
    }

    /// Records in the claim that this runner has sealed the VM and lets go of it. The process still
    /// holds the locks; they go with it.
    pub(super) fn hand_over(&mut self) -> Result<(), VmmError> {
        self.next(Verb::HandOver)?;
        let sealed = self.board.view().sealed.clone().ok_or(VmmError::NoMachine)?;
        let handover = Handover {
            epoch: sealed.file.epoch,
            generation: sealed.generation,
            bytes: sealed.file.bytes,
            hash: sealed.file.hash,
        };
        self.locks.as_ref().ok_or(VmmError::NoMachine)?.hand_over(handover)?;
        self.board.update(|view| view.handover = Some(handover));
        tracing::info!(path = %sealed.file.path.display(), "handed over");
        Ok(())
    }

    /// Asked again for the same, it answers the same.
    fn sealed_as(&self, generation: u64) -> Result<Sealed, VmmError> {
        let sealed = self.board.view().sealed.clone().ok_or(VmmError::NoMachine)?;
        if sealed.generation == generation {
            return Ok(sealed);
        }
        let (path, sealed) = (sealed.file.path, sealed.generation);
        Err(VmmError::OtherGeneration { sealed, asked: generation, path })
    }

    /// A VM that was restored a moment ago is saved when its memory is here; the guest runs
    /// meanwhile.
    pub(super) fn wait_memory_whole(&self) -> Result<(), VmmError> {
        let Some(memory) = self.board.view().memory.clone() else { return Ok(()) };
        loop {
            match memory.wait_done_for(SLICE) {
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) => return Err(VmmError::MemoryIncomplete(error.to_string())),
                None if self.cancel.load(Ordering::SeqCst) => {
                    return Err(VmmError::MemoryIncomplete("the VMM is to stop".into()));
                }
                None => {}
            }
        }
    }
}

/// Closes the gate, saves, and leaves the guest stopped; after an error it goes on.
fn seal(machine: &Machine, directory: &Path, identity: Identity) -> Result<Saved, SaveError> {
    let writer = machine.create_state_file(directory, identity)?;
    stopped(machine, || machine.save_into(writer))
}

/// The same for a file that has all memory but the residue.
fn seal_warm(machine: &Machine, warm: Warm) -> Result<(Saved, KvmDirtyLog), SaveError> {
    // What is durable now need not become so while the guest stands still.
    machine.sync_disks()?;
    stopped(machine, || machine.save_residue(warm))
}

fn stopped<T>(
    machine: &Machine,
    save: impl FnOnce() -> Result<T, SaveError>,
) -> Result<T, SaveError> {
    machine.gate.hold(Hold::Save);
    let outcome = save();
    if outcome.is_ok() {
        machine.gate.hold(Hold::NotStarted);
    } else {
        machine.wake_devices();
    }
    machine.gate.release(Hold::Save);
    outcome
}
