//! Create, lock, load, start.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bellwether_lease::LeasePage;
use bellwether_memory::{Ahead, AheadStats, EventSink, LazyEvent, Piece};
use bellwether_statefile::Identity;
use bellwether_types::{Epoch, StateFileRef};

use super::{Activated, Command, CreateConfig, Driver, VmmError};
use crate::clock;
use crate::devices::block::Caching;
use crate::gate::{Gate, Hold};
use crate::lease::{Arbiter, LeaseGuard};
use crate::lifecycle::{Phase, Verb};
use crate::locks::{Claimant, Host, Locks, fresh_nonce};
use crate::machine::{Machine, with_addresses};
use crate::vcpus::EndSink;

/// The first KVM_RUN follows the opening of the gate within microseconds.
const FIRST_RUN: Duration = Duration::from_millis(500);

impl Driver {
    pub(super) fn create(&mut self, config: CreateConfig) -> Result<(), VmmError> {
        let phase = self.next(Verb::Create)?;
        let begun = clock::boottime_ns();
        let page = match (&config.lease_path, config.arbiter) {
            // It tells its fencer over the page that its guest stands still.
            (Some(path), Arbiter::Lease) => Some(LeasePage::open_for_grants(path)?),
            (Some(path), _) => Some(LeasePage::open(path)?),
            (None, Arbiter::Lease) => return Err(VmmError::NoLeasePage),
            (None, _) => None,
        };
        let caching =
            if config.arbiter == Arbiter::Lease { Caching::None } else { Caching::UntilFlush };
        let commands = self.commands.clone();
        let on_end: EndSink = Arc::new(move |end| {
            // If nobody listens any more, the process is about to end anyway.
            let _driver_gone = commands.send(Command::Ended(end));
        });
        let spec = with_addresses(config.spec, config.vm_id);
        let machine = Arc::new(Machine::build(spec, &config.serial, caching, &on_end)?);
        let gate = Arc::clone(&machine.gate);
        let commands = self.commands.clone();
        let changed = Box::new(move || {
            let _driver_gone = commands.send(Command::LeaseChanged);
        });
        let lease = LeaseGuard::start(config.arbiter, page, gate, changed)
            .map_err(|source| VmmError::Host { what: "start the lease's thread", source })?;
        self.claimant = Some(Claimant {
            vm_id: config.vm_id,
            claim_path: config.claim_path,
            node_id: config.node_id,
            boot_id: config.boot_id,
            nonce: fresh_nonce(),
        });
        self.board.update(|view| {
            view.vm_id = config.vm_id.to_string();
            view.machine = Some(Arc::clone(&machine));
            view.lease = Some(Arc::clone(&lease));
        });
        self.machine = Some(machine);
        self.lease = Some(lease);
        tracing::info!(vm_id = %config.vm_id, took_us = clock::us_since(begun), "machine created");
        self.enter(phase);
        Ok(())
    }

    pub(super) fn lock(&mut self, epoch: u64, wait: Duration) -> Result<(), VmmError> {
        self.next(Verb::Lock)?;
        self.ensure_locks(epoch, wait)
    }

    /// Takes the locks, or raises the epoch of those that are held.
    fn ensure_locks(&mut self, epoch: u64, wait: Duration) -> Result<(), VmmError> {
        if epoch == 0 {
            return Err(VmmError::NoEpoch);
        }
        match &mut self.locks {
            Some(locks) => locks.raise(epoch)?,
            None => {
                let claimant = self.claimant.as_ref().ok_or(VmmError::NoMachine)?;
                let host = Host { cancel: &self.cancel, board: &self.board };
                self.locks = Some(Locks::acquire(claimant, epoch, self.machine()?, wait, host)?);
            }
        }
        if let Some(lease) = &self.lease {
            lease.set_epoch(epoch);
        }
        let handover = self.locks.as_ref().and_then(Locks::handover);
        self.board.update(|view| {
            (view.locked, view.epoch) = (true, epoch);
            view.handover = handover;
        });
        tracing::info!(epoch, ?handover, "locks are held");
        Ok(())
    }

    /// Gives back locks that a failed start took.
    fn release_locks(&mut self) {
        self.locks = None;
        if let Some(lease) = &self.lease {
            lease.set_epoch(0);
        }
        self.board.update(|view| {
            (view.locked, view.epoch) = (false, 0);
            view.handover = None;
        });
    }

    pub(super) fn load(&mut self, file: &StateFileRef) -> Result<u64, VmmError> {
        let phase = self.next(Verb::Load)?;
        let begun = clock::boottime_ns();
        let machine = Arc::clone(self.machine()?);
        let vm_id = self.claimant.as_ref().ok_or(VmmError::NoMachine)?.vm_id;
        let sink = self.memory_sink(&machine.gate);
        let loaded = machine.load(vm_id, file, &mut self.ahead, sink).inspect_err(|error| {
            self.is_spoiled = error.is_after_changes();
        })?;
        self.source.path = Some(file.path.clone());
        self.board.update(|view| view.memory = Some(Arc::clone(&loaded.memory)));
        self.loaded = Some(loaded.platform);
        self.enter(phase);
        let took_us = clock::us_since(begun);
        tracing::info!(path = %file.path.display(), took_us, mode = ?loaded.memory.mode(), "state loaded");
        Ok(took_us)
    }

    /// Loads parts of a file that its writer has told of. For another file what was loaded before is
    /// dropped.
    pub(super) fn load_ahead(
        &mut self,
        path: &Path,
        epoch: Epoch,
        generation: u64,
        pieces: &[Piece],
    ) -> Result<AheadStats, VmmError> {
        self.next(Verb::LoadAhead)?;
        let machine = Arc::clone(self.machine()?);
        let vm_id = self.claimant.as_ref().ok_or(VmmError::NoMachine)?.vm_id;
        let identity = Identity { vm_id, epoch, generation };
        let is_same = |ahead: &Ahead| ahead.identity() == identity && ahead.path() == path;
        if !self.ahead.as_ref().is_some_and(is_same) {
            self.discard_ahead()?;
            self.ahead = Some(Ahead::open(Arc::clone(&machine.ram), path, &identity)?);
        }
        let Some(ahead) = &self.ahead else { return Err(VmmError::NoMachine) };
        let cancel = &self.cancel;
        let stats = ahead.load(pieces, &|| cancel.load(Ordering::SeqCst));
        self.board.update(|view| view.ahead_bytes += stats.bytes);
        Ok(stats)
    }

    /// Makes memory fresh again that was loaded ahead.
    fn discard_ahead(&mut self) -> Result<(), VmmError> {
        self.board.update(|view| view.ahead_bytes = 0);
        match self.ahead.take() {
            Some(ahead) => Ok(ahead.discard().inspect_err(|_| self.is_spoiled = true)?),
            None => Ok(()),
        }
    }

    /// Closes the gate at once when memory fails, and tells the driver.
    fn memory_sink(&self, gate: &Arc<Gate>) -> EventSink {
        let (commands, gate) = (self.commands.clone(), Arc::clone(gate));
        Box::new(move |event| {
            if matches!(event, LazyEvent::Failed { .. }) {
                gate.hold(Hold::IoError);
            }
            let _driver_gone = commands.send(Command::Memory(event));
        })
    }

    pub(super) fn start(
        &mut self,
        epoch: u64,
        wait: Duration,
        consume: bool,
    ) -> Result<Activated, VmmError> {
        let phase = self.next(Verb::Start)?;
        self.check_epoch(epoch)?;
        let begun = clock::boottime_ns();
        let had_locks = self.locks.is_some();
        self.ensure_locks(epoch, wait)?;
        let lock_us = clock::us_since(begun);
        let resuming = clock::boottime_ns();
        if let Err(error) = self.prepare_start() {
            if !had_locks {
                self.release_locks();
            }
            return Err(error);
        }
        if let Err(error) = self.consume_handover() {
            if !had_locks {
                self.release_locks();
            }
            return Err(error);
        }
        let machine = Arc::clone(self.machine()?);
        machine.run();
        let running_at_ns = machine.gate.wait_entered(FIRST_RUN).unwrap_or(0);
        let resume_us = running_at_ns.saturating_sub(resuming) / 1000;
        self.forget_sealed(consume);
        self.enter(phase);
        tracing::info!(epoch, lock_us, resume_us, "the guest runs");
        Ok(Activated { lock_us, resume_us, running_at_ns })
    }

    /// Before the first instruction, and after everything else that can fail.
    fn consume_handover(&self) -> Result<(), VmmError> {
        if let Some(locks) = &self.locks {
            locks.consume_handover()?;
        }
        self.board.update(|view| view.handover = None);
        Ok(())
    }

    /// A sealed VM needs a higher epoch: its file may have been promised to somebody else.
    fn check_epoch(&self, epoch: u64) -> Result<(), VmmError> {
        let held = self.locks.as_ref().map_or(0, Locks::epoch);
        if self.phase == Phase::Sealed && epoch <= held {
            return Err(VmmError::EpochNotHigher { held, asked: epoch });
        }
        Ok(())
    }

    /// What each way of starting needs right before the first instruction.
    fn prepare_start(&mut self) -> Result<(), VmmError> {
        let machine = Arc::clone(self.machine()?);
        match self.phase {
            Phase::Created => {
                self.discard_ahead()?;
                machine.prepare_boot()?;
            }
            Phase::Loaded => {
                if let Some(platform) = &self.loaded {
                    machine
                        .vm
                        .restore_clock(platform)
                        .map_err(crate::machine::MachineError::from)?;
                }
                self.loaded = None;
            }
            _ => {}
        }
        Ok(())
    }

    /// The VM runs, so the file from which it could have been resumed is worth nothing.
    fn forget_sealed(&mut self, consume: bool) {
        let mut sealed = None;
        self.board.update(|view| sealed = view.sealed.take());
        if let Some(sealed) = sealed {
            self.source.path = Some(sealed.file.path);
            self.source.is_complete = true;
        }
        self.source.consume = consume;
        self.consume_source();
        self.cancel.store(false, Ordering::SeqCst);
    }
}
