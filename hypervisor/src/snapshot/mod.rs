//! The machine's state as sections of a state file, and back.
//!
//! | section | what |
//! |---|---|
//! | `machine` | shape, and what the source's KVM could do |
//! | `vcpu.N` | one vCPU |
//! | `platform` | interrupt chips, timer, clock |
//! | `serial`, `acpi-pm`, `pci-host` | devices of which there is one |
//! | `virtio-pci.N`, `virtio-blk.N` | transport and device of disk N |
//! | `virtio-rng`, `virtio-net.N` | other devices; their transports count on behind the disks' slots |
//!
//! Everything is decoded and checked before anything is changed, so that a file that does not fit
//! leaves the machine as it was.

mod load;
mod save;

pub use load::{LoadError, Loaded};
pub use save::{SaveError, SaveTimes, Saved};

use serde::{Deserialize, Serialize};

use crate::devices::saved::SavedForm;
use crate::kvm::Capabilities;
use crate::kvm::platform::PlatformStateV1;
use crate::kvm::vcpu_state::VcpuStateV1;

/// What must be alike on both sides, and what helps to explain a refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineV1 {
    pub vcpus: u32,
    pub disks: u32,
    pub capabilities: Capabilities,
}

impl SavedForm for MachineV1 {
    const KIND: &'static str = "machine";
    const VERSION: u32 = 1;
}

impl SavedForm for VcpuStateV1 {
    const KIND: &'static str = "vcpu";
    const VERSION: u32 = 1;
}

impl SavedForm for PlatformStateV1 {
    const KIND: &'static str = "platform";
    const VERSION: u32 = 1;
}
