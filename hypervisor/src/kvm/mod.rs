//! KVM: the virtual machine, its vCPUs, its interrupts, and their complete saved state.
//!
//! Everything that is `unsafe` outside guest memory lives here. The rest of the VMM sees a [`Vm`],
//! [`Vcpu`]s that run against a [`GuestBus`], and an [`IrqRouter`].
//!
//! What a KVM can lack without harm (nested state, TSC control, clock flags) is probed once into
//! [`Capabilities`], recorded in the state file, and never fatal by itself.

pub mod caps;
pub mod cpuid;
pub mod dirty;
mod entry;
mod ioctl;
pub mod irq;
pub mod kick;
pub mod msr;
pub mod platform;
pub mod vcpu;
pub mod vcpu_state;
pub mod vm;

pub use caps::Capabilities;
pub use entry::LongMode;
pub use irq::{IrqRouter, MsiMessage};
pub use vcpu::{GuestBus, GuestEnd, RunOutcome, Vcpu};
pub use vm::Vm;

use std::io;

/// A KVM operation that failed, and on what.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error("open /dev/kvm: {0}; is the kvm module loaded, and may this user open it?")]
    Open(#[source] io::Error),
    #[error("this kernel's KVM has API version {0}; 12 is needed")]
    ApiVersion(i32),
    #[error("this kernel's KVM lacks {0}")]
    Missing(&'static str),
    #[error("{operation}: {source}")]
    Call { operation: &'static str, source: io::Error },
    #[error("vCPU {vcpu}: {operation}: {source}")]
    Vcpu { vcpu: u8, operation: &'static str, source: io::Error },
    #[error("vCPU {vcpu}: set {registers}: {source}")]
    Registers { vcpu: u8, registers: String, source: io::Error },
    #[error("vCPU {vcpu}: MSR {msr:#x} does not take the value {value:#x}")]
    Msr { vcpu: u8, msr: u32, value: u64 },
    #[error("{what}: {count} do not fit")]
    TooMany { what: &'static str, count: usize },
}

/// Names the operation of a failed call.
pub(crate) fn call(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { operation, source: source.into() }
}
