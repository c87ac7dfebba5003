//! Model-specific registers: which ones to save, and reading and writing them in chunks.
//!
//! The kernel stops at the first register that it cannot handle and returns how far it came; both
//! loops below look at that count, so that no register is lost silently.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{KvmError, Vm, call};

pub const MSR_IA32_TSC: u32 = 0x10;
pub const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
pub const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// One ioctl handles at most 256.
const CHUNK: usize = 256;

impl Vm {
    /// The registers that a complete vCPU state has, the TSC deadline last: it needs the TSC.
    pub fn msrs_to_save(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.kvm.get_msr_index_list().map_err(call("read the list of MSRs"))?;
        let mut indices = list.as_slice().to_vec();
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
