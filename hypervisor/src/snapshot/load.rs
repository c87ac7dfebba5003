//! Loading: check the file against this machine and host, then set all state; memory comes on demand.
//!
//! The order of setting: memory can be faulted in; vCPUs; interrupt chips and timer; devices; all
//! interrupt routes in one call. The clock is set at the start, right before the guest runs.

use std::sync::Arc;
use std::time::Instant;

use bellwether_memory::{Ahead, AheadError, EventSink, LazyOptions, LazyRestore, RestoreError};
use bellwether_statefile::{Expect, Sections, StateFile, StateFileError};
use bellwether_types::StateFileRef;

use super::MachineV1;
use crate::devices::block::BlockV1;
use crate::devices::net::NetV1;
use crate::devices::pci::PciHostV1;
use crate::devices::power::AcpiPmV1;
use crate::devices::rng::RngV1;
use crate::devices::saved::{SavedError, SavedForm, decode, section_name};
use crate::devices::serial::SerialV1;
use crate::devices::virtio::VirtioPciV1;
use crate::kvm::KvmError;
use crate::kvm::cpuid::missing_features;
use crate::kvm::platform::PlatformStateV1;
use crate::kvm::vcpu_state::VcpuStateV1;
use crate::machine::Machine;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("load: {0}")]
    File(#[from] StateFileError),
    #[error("load: {0}")]
    Saved(#[from] SavedError),
    #[error("load {path}: the file is of a VM with {theirs}, this VM has {ours}")]
    Shape { path: String, theirs: String, ours: String },
    #[error("load {path}: this host's processor lacks what the guest uses: {missing}")]
    Processor { path: String, missing: String },
    #[error("load: {0}")]
    Kvm(#[from] KvmError),
    #[error("load: {0}")]
    Memory(#[from] RestoreError),
    #[error("load: {0}")]
    Ahead(#[from] AheadError),
}

impl LoadError {
    /// Whether the machine was already being changed, so that it is of no use any more.
    pub fn is_after_changes(&self) -> bool {
        matches!(
            self,
            Self::Kvm(_)
                | Self::Memory(_)
                | Self::Ahead(_)
                | Self::Saved(SavedError::Mismatch { .. })
        )
    }
}

/// A machine with all state but, perhaps, memory.
pub struct Loaded {
    pub memory: Arc<LazyRestore>,
    pub platform: PlatformStateV1,
}

/// All sections of a file, decoded.
struct State {
    machine: MachineV1,
    serial: SerialV1,
    acpi_pm: AcpiPmV1,
    pci_host: PciHostV1,
    disks: Vec<(VirtioPciV1, BlockV1)>,
    rng: (VirtioPciV1, RngV1),
    nics: Vec<(VirtioPciV1, NetV1)>,
    vcpus: Vec<VcpuStateV1>,
    platform: PlatformStateV1,
}

impl Machine {
    /// Loads a sealed file into this machine, which has not run. `on_event` hears of its memory. What
    /// was loaded ahead from the same file is used, once nothing can be refused any more.
    pub fn load(
        &self,
        vm: bellwether_types::VmId,
        file: &StateFileRef,
        ahead: &mut Option<Ahead>,
        on_event: EventSink,
    ) -> Result<Loaded, LoadError> {
        let expect = Expect { vm_id: vm, epoch: file.epoch, generation: None, hash: file.hash };
        let begun = Instant::now();
        let known = ahead.as_mut().map(Ahead::take_segments).unwrap_or_default();
        let mut file = StateFile::open_knowing(&file.path, &expect, known)?;
        let path = file.path().display().to_string();
        self.check_memory(&file, &path)?;
        let state = self.decode(file.take_sections(), &path)?;
        self.check_processor(&state, &path)?;
        let options = LazyOptions { on_event: Some(on_event), ..Default::default() };
        self.set_devices(&state)?;
        let checked_us = begun.elapsed().as_micros();
        let memory = Arc::new(self.load_memory(file, ahead.take(), options)?);
        let memory_us = begun.elapsed().as_micros() - checked_us;
        for (mut vcpu, state) in self.vcpus.stopped().zip(&state.vcpus) {
            vcpu.restore(state, &self.vm.caps)?;
        }
        self.vm.restore_platform(&state.platform)?;
        self.vm.irq.commit()?;
        let all_us = begun.elapsed().as_micros();
        tracing::info!(checked_us, memory_us, all_us, "loaded");
        Ok(Loaded { memory, platform: state.platform })
    }

    fn load_memory(
        &self,
        file: StateFile,
        ahead: Option<Ahead>,
        options: LazyOptions,
    ) -> Result<LazyRestore, LoadError> {
        match ahead {
            Some(ahead) if ahead.identity() == file.header().identity => {
                return Ok(LazyRestore::start_after(ahead, file, options)?);
            }
            Some(ahead) => ahead.discard()?,
            None => {}
        }
        Ok(LazyRestore::start(Arc::clone(&self.ram), file, options)?)
    }

    fn check_memory(&self, file: &StateFile, path: &str) -> Result<(), LoadError> {
        let total = |regions: &[bellwether_statefile::MemoryRegion]| {
            regions.iter().map(|region| region.length).sum::<u64>() >> 20
        };
        let (theirs, ours) = (&file.header().regions, self.ram.regions());
        if *theirs == ours {
            return Ok(());
        }
        Err(LoadError::Shape {
            path: path.to_owned(),
            theirs: format!("{} MiB of memory", total(theirs)),
            ours: format!("{} MiB", total(&ours)),
        })
    }

    fn decode(&self, mut sections: Sections, path: &str) -> Result<State, LoadError> {
        let machine: MachineV1 = take(&mut sections, None)?;
        let ours = (self.spec.vcpus, self.disks.len() as u32);
        if (machine.vcpus, machine.disks) != ours {
            return Err(LoadError::Shape {
                path: path.to_owned(),
                theirs: format!("{} vCPUs and {} disks", machine.vcpus, machine.disks),
                ours: format!("{} and {}", ours.0, ours.1),
            });
        }
        let disks = (0..self.disks.len())
            .map(|index| Ok((take(&mut sections, Some(index))?, take(&mut sections, Some(index))?)))
            .collect::<Result<_, LoadError>>()?;
        let rng = (take(&mut sections, Some(self.rng.instance()))?, take(&mut sections, None)?);
        let nics = self
            .nics
            .iter()
            .enumerate()
            .map(|(index, nic)| {
                let transport = take(&mut sections, Some(nic.instance()))?;
                Ok((transport, take(&mut sections, Some(index))?))
            })
            .collect::<Result<_, LoadError>>()?;
        let vcpus = (0..machine.vcpus as usize)
            .map(|index| take(&mut sections, Some(index)))
            .collect::<Result<_, LoadError>>()?;
        let state = State {
            serial: take(&mut sections, None)?,
            acpi_pm: take(&mut sections, None)?,
            pci_host: take(&mut sections, None)?,
            platform: take(&mut sections, None)?,
            machine,
            disks,
            rng,
            nics,
            vcpus,
        };
        sections.finish()?;
        Ok(state)
    }

    fn check_processor(&self, state: &State, path: &str) -> Result<(), LoadError> {
        let offered = self.vm.supported_cpuid()?;
        let wanted = state.vcpus.first().map_or(&[][..], |vcpu| &vcpu.cpuid);
        let missing = missing_features(wanted, &offered);
        if missing.is_empty() {
            return Ok(());
        }
        tracing::warn!(source = ?state.machine.capabilities, host = ?self.vm.caps, "CPU does not fit");
        Err(LoadError::Processor { path: path.to_owned(), missing: missing.join(", ") })
    }

    fn set_devices(&self, state: &State) -> Result<(), LoadError> {
        for (index, (unit, (transport, block))) in self.disks.iter().zip(&state.disks).enumerate() {
            unit.block.restore(block).map_err(mismatch::<BlockV1>(Some(index)))?;
            unit.transport.restore(transport).map_err(mismatch::<VirtioPciV1>(Some(index)))?;
        }
        let (transport, rng) = &state.rng;
        self.rng.device.restore(rng).map_err(mismatch::<RngV1>(None))?;
        let instance = Some(self.rng.instance());
        self.rng.transport.restore(transport).map_err(mismatch::<VirtioPciV1>(instance))?;
        for (index, (unit, (transport, net))) in self.nics.iter().zip(&state.nics).enumerate() {
            unit.device.restore(net).map_err(mismatch::<NetV1>(Some(index)))?;
            let instance = Some(unit.instance());
            unit.transport.restore(transport).map_err(mismatch::<VirtioPciV1>(instance))?;
        }
        self.serial.restore(state.serial.clone())?;
        self.acpi_pm.restore(state.acpi_pm);
        self.config_ports.restore(state.pci_host);
        Ok(())
    }
}

fn take<T: SavedForm>(sections: &mut Sections, instance: Option<usize>) -> Result<T, LoadError> {
    Ok(decode(&sections.take(&section_name::<T>(instance))?)?)
}

fn mismatch<T: SavedForm>(instance: Option<usize>) -> impl Fn(String) -> LoadError {
    move |why| SavedError::Mismatch { kind: section_name::<T>(instance), why }.into()
}
