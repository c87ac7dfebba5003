//! Model-specific registers: which ones to save, and reading and writing them in chunks.
//!
//! The kernel stops at the first register that it cannot handle and returns how far it came; both
//! loops below look at that count, so that no register is lost silently.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{KvmError, Vm, call};

pub const MSR_IA32_TSC: u32 = 0x10;
pub const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
pub const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
pub const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;

/// Registers that KVM keeps and does not list: memory types (MTRR: variable, fixed, default) and the
/// machine check banks, as many as any host has. What a host lacks is left out when it is read.
const UNLISTED: [RangeInclusive<u32>; 6] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    MSR_MTRR_DEF_TYPE..=MSR_MTRR_DEF_TYPE,
    0x400..=0x47f,
];

/// One ioctl handles at most 256.
const CHUNK: usize = 256;

impl Vm {
    /// The registers that a complete vCPU state has, the TSC deadline last: it needs the TSC.
    pub fn msrs_to_save(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.kvm.get_msr_index_list().map_err(call("read the list of MSRs"))?;
        let mut indices = list.as_slice().to_vec();
        indices.extend(UNLISTED.into_iter().flatten());
        indices.sort_unstable();
        indices.dedup();
        indices.sort_by_key(|&index| (index == MSR_IA32_TSC_DEADLINE, index != MSR_IA32_TSC));
        Ok(indices)
    }
}

fn table(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries)
        .map_err(|_| KvmError::TooMany { what: "MSRs", count: entries.len() })
}

/// Reads what can be read of `indices`; a register that this vCPU does not have is left out.
pub fn read(fd: &VcpuFd, vcpu: u8, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let wanted: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut values = Vec::with_capacity(wanted.len());
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(CHUNK)];
        let mut msrs = table(chunk)?;
        let done = fd.get_msrs(&mut msrs).map_err(|source| KvmError::Vcpu {
            vcpu,
            operation: "read MSRs",
            source: source.into(),
        })?;
        values.extend_from_slice(&msrs.as_slice()[..done]);
        if let Some(refused) = chunk.get(done) {
            tracing::debug!(vcpu, msr = format!("{:#x}", refused.index), "MSR is not readable");
        }
        rest = &rest[(done + usize::from(done < chunk.len()))..];
    }
    Ok(values)
}

/// Writes all of `values`. A register that cannot be written must hold its value already.
pub fn write(fd: &VcpuFd, vcpu: u8, values: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(CHUNK)];
        let done = fd.set_msrs(&table(chunk)?).map_err(|source| KvmError::Vcpu {
            vcpu,
            operation: "write MSRs",
            source: source.into(),
        })?;
        if let Some(refused) = chunk.get(done) {
            expect_value(fd, vcpu, refused)?;
        }
        rest = &rest[(done + usize::from(done < chunk.len()))..];
    }
    Ok(())
}

fn expect_value(fd: &VcpuFd, vcpu: u8, wanted: &kvm_msr_entry) -> Result<(), KvmError> {
    let present = read(fd, vcpu, &[wanted.index])?;
    match present.first() {
        Some(present) if present.data == wanted.data => Ok(()),
        _ => Err(KvmError::Msr { vcpu, msr: wanted.index, value: wanted.data }),
    }
}
