//! Saving: stop the guest, drain and flush the disks, collect the state, write it, seal it.
//!
//! ```text
//! create the file | hold -> vCPUs out -> disks idle -> sync | sections, memory  | seal
//! pre-copy        | hold -> vCPUs out -> disks idle ------> | sections, residue | seal
//!                 |                                         | sync of the disks |
//!  guest runs     |                       guest stands still
//! ```
//!
//! On any error the file is removed and the guest goes on; that is the caller's part, because only
//! it knows the reasons for which the guest is held.

use std::path::Path;
use std::thread;
use std::time::Duration;

use bellwether_memory::{
    Copier, PreCopyError, SaveError as MemoryError, SaveOptions, StopSignal, collect_dirty,
    save_memory,
};
use bellwether_statefile::{
    Identity, SealedFile, Section, StateFile, StateFileError, StateFileWriter,
};

use super::MachineV1;
use crate::clock;
use crate::devices::saved::{SavedError, encode};
use crate::gate::Hold;
use crate::kvm::KvmError;
use crate::kvm::dirty::KvmDirtyLog;
use crate::machine::Machine;
use crate::precopy::Warm;

/// A vCPU leaves the guest within microseconds; this only bounds the absurd.
const VCPUS_OUT: Duration = Duration::from_secs(10);
/// Storage that needs longer than this is not one to save to.
const DISKS_IDLE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("save: {0}")]
    File(#[from] StateFileError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Residue(#[from] PreCopyError),
    #[error("save: {0}")]
    Kvm(#[from] KvmError),
    #[error("save: {0}")]
    Saved(#[from] SavedError),
    #[error("save: sync disk {path}: {source}")]
    Sync { path: String, source: std::io::Error },
    #[error("{what} after {} s", after.as_secs())]
    Busy { what: &'static str, after: Duration },
    #[error("save: the guest has just ended")]
    GuestEnded,
}

/// How long the parts took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SaveTimes {
    pub stop_us: u64,
    pub save_us: u64,
    pub seal_us: u64,
    /// CLOCK_BOOTTIME when the last vCPU was out.
    pub stopped_at_ns: u64,
}

/// A sealed file and what it took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    pub file: SealedFile,
    pub times: SaveTimes,
}

impl Machine {
    /// Creates the file, while the guest still runs: this syncs the directory.
    pub fn create_state_file(
        &self,
        directory: &Path,
        identity: Identity,
    ) -> Result<StateFileWriter, SaveError> {
        remove_unsealed(&directory.join(identity.file_name()));
        Ok(StateFileWriter::create(directory, identity, &self.ram.regions())?)
    }

    /// The same for a pre-copy.
    pub fn create_rounds_file(
        &self,
        directory: &Path,
        identity: Identity,
    ) -> Result<StateFileWriter, SaveError> {
        remove_unsealed(&directory.join(identity.file_name()));
        Ok(StateFileWriter::create_with_rounds(directory, identity, &self.ram.regions())?)
    }

    /// Saves the machine, whose gate the caller has closed.
    pub fn save_into(&self, mut writer: StateFileWriter) -> Result<Saved, SaveError> {
        let begun = clock::boottime_ns();
        let stopped_at_ns = self.quiesce()?;
        let mut times =
            SaveTimes { stop_us: clock::us_since(begun), stopped_at_ns, ..Default::default() };
        self.serial.console().flush();
        let saving = clock::boottime_ns();
        for section in self.sections()? {
            writer.add_section(&section.kind, section.version, &section.bytes)?;
        }
        save_memory(&self.ram, &mut writer, &SaveOptions::default())?;
        times.save_us = clock::us_since(saving);
        let sealing = clock::boottime_ns();
        let file = writer.seal()?;
        times.seal_us = clock::us_since(sealing);
        Ok(Saved { file, times })
    }

    /// Completes the file of a pre-copy; the caller has closed the gate. The log stays on until the
    /// caller drops it, which it need not do while somebody waits.
    pub fn save_residue(&self, warm: Warm) -> Result<(Saved, KvmDirtyLog), SaveError> {
        let Warm { mut writer, log, mut rest, round } = warm;
        let begun = clock::boottime_ns();
        let stopped_at_ns = self.stand_still()?;
        let mut times =
            SaveTimes { stop_us: clock::us_since(begun), stopped_at_ns, ..Default::default() };
        self.serial.console().flush();
        let saving = clock::boottime_ns();
        thread::scope(|scope| {
            let syncing = scope.spawn(|| self.sync_disks());
            for section in self.sections()? {
                writer.add_section(&section.kind, section.version, &section.bytes)?;
            }
            // Last, because saving a vCPU or a device may write to guest memory.
            collect_dirty(&self.ram, &log, &mut rest).map_err(PreCopyError::Log)?;
            let copier = Copier {
                ram: &self.ram,
                log: None,
                threads: SaveOptions::default().threads,
                rate: None,
                stop: &StopSignal::default(),
                on_piece: None,
            };
            copier.round(&writer, round, &mut rest)?;
            syncing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        times.save_us = clock::us_since(saving);
        let sealing = clock::boottime_ns();
        let file = writer.seal()?;
        times.seal_us = clock::us_since(sealing);
        Ok((Saved { file, times }, log))
    }

    /// Waits until nothing moves, and makes the disks durable. Returns when the vCPUs were out.
    pub fn quiesce(&self) -> Result<u64, SaveError> {
        let stopped_at_ns = self.stand_still()?;
        self.sync_disks()?;
        Ok(stopped_at_ns)
    }

    /// The same without the disks' sync.
    fn stand_still(&self) -> Result<u64, SaveError> {
        self.wait_vcpus_out()?;
        let stopped_at_ns = clock::boottime_ns();
        if self.gate.is_held(Hold::Ended) {
            return Err(SaveError::GuestEnded);
        }
        self.wait_disks_idle()?;
        Ok(stopped_at_ns)
    }

    /// Waits until nothing moves. A vCPU that waits for memory that never comes is not waited for:
    /// it executes nothing.
    pub fn wait_still(&self) -> Result<(), SaveError> {
        if !self.gate.is_held(Hold::IoError) {
            self.wait_vcpus_out()?;
        }
        self.wait_disks_idle()
    }

    /// The same at the end of a VM, and makes the disks durable.
    pub fn settle(&self) -> Result<(), SaveError> {
        self.wait_still()?;
        self.sync_disks()
    }

    fn wait_vcpus_out(&self) -> Result<(), SaveError> {
        match self.gate.wait_vcpus_out(VCPUS_OUT) {
            true => Ok(()),
            false => {
                Err(SaveError::Busy { what: "a vCPU is still in the guest", after: VCPUS_OUT })
            }
        }
    }

    fn wait_disks_idle(&self) -> Result<(), SaveError> {
        let what = "a disk request is still outstanding";
        match self.gate.wait_disks_idle(DISKS_IDLE) {
            true => Ok(()),
            false => Err(SaveError::Busy { what, after: DISKS_IDLE }),
        }
    }

    pub fn sync_disks(&self) -> Result<(), SaveError> {
        for disk in
            self.disks.iter().map(|unit| unit.block.disk()).filter(|disk| !disk.is_read_only())
        {
            let failed =
                |source| SaveError::Sync { path: disk.path().display().to_string(), source };
            disk.sync().map_err(failed)?;
        }
        Ok(())
    }

    /// The state of everything but memory: devices, then vCPUs, then the chips.
    fn sections(&self) -> Result<Vec<Section>, SaveError> {
        let machine = MachineV1 {
            vcpus: self.spec.vcpus,
            disks: self.disks.len() as u32,
            capabilities: self.vm.caps.clone(),
        };
        let mut sections = vec![
            encode(None, &machine)?,
            encode(None, &self.serial.save())?,
            encode(None, &self.acpi_pm.save())?,
            encode(None, &self.config_ports.save())?,
        ];
        for (index, unit) in self.disks.iter().enumerate() {
            sections.push(encode(Some(index), &unit.transport.save())?);
            sections.push(encode(Some(index), &unit.block.save())?);
        }
        let rng = &self.rng;
        sections.push(encode(Some(rng.instance()), &rng.transport.save())?);
        sections.push(encode(None, &rng.device.save())?);
        for (index, nic) in self.nics.iter().enumerate() {
            sections.push(encode(Some(nic.instance()), &nic.transport.save())?);
            sections.push(encode(Some(index), &nic.device.save())?);
        }
        for (index, vcpu) in self.vcpus.stopped().enumerate() {
            sections.push(encode(Some(index), &vcpu.save(&self.vm.caps, &self.msrs)?)?);
        }
        sections.push(encode(None, &self.vm.save_platform()?)?);
        Ok(sections)
    }
}

/// Removes what an attempt of the same name left behind when its process died. A sealed file stays,
/// and the creation then fails on it.
fn remove_unsealed(path: &Path) {
    let sealed = StateFile::inspect(path).map_or(true, |inspection| inspection.header.sealed);
    if !sealed && std::fs::remove_file(path).is_ok() {
        tracing::info!(path = %path.display(), "removed an unsealed state file of an earlier attempt");
    }
}
