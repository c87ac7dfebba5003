//! What the guest sees of the processor, and whether another host can show the same.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};

use super::{KvmError, Vm, call};

/// The leaves whose bits are features that a restored guest relies on.
const FEATURE_LEAVES: [(u32, u32); 9] = [
    (0x1, 0),
    (0x7, 0),
    (0x7, 1),
    (0x7, 2),
    (0xd, 0),
    (0xd, 1),
    (0x8000_0001, 0),
    (0x8000_0007, 0),
    (0x8000_0008, 0),
];

const TOPOLOGY: u32 = 0xb;
const LEAF1_ECX_MONITOR: u32 = 1 << 3;
const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT_ECX_SVM: u32 = 1 << 2;
const POWER_EDX_INVARIANT_TSC: u32 = 1 << 8;
const LEAF7_EBX_SGX: u32 = 1 << 2;
const LEAF7_ECX_OSPKE: u32 = 1 << 4;

impl Vm {
    /// The CPUID of vCPU `id` out of `count`: what KVM supports, less what cannot be moved.
    pub fn guest_cpuid(&self, id: u8, count: u8) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        let mut entries = self.supported_cpuid()?;
        let has_topology = entries.first().is_some_and(|leaf0| leaf0.eax >= TOPOLOGY);
        entries.retain(|entry| is_offered(entry.function));
        for entry in &mut entries {
            filter(entry, id, count, self.caps.tsc_deadline_timer);
        }
        if has_topology {
            entries.extend((0..3).map(|level| topology(level, id, count)));
        }
        Ok(entries)
    }

    /// Everything that this host's KVM can show to a guest.
    pub fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        let supported = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("read the supported CPUID"))?;
        Ok(supported.as_slice().to_vec())
    }
}

/// Leaves that describe the host's package (we give our own topology), power and performance counters stay with the host.
fn is_offered(function: u32) -> bool {
    !matches!(function, 0x5 | 0x6 | 0xa | TOPOLOGY | 0x12 | 0x14 | 0x17 | 0x18 | 0x1f | 0x8000_000a)
}

fn filter(entry: &mut kvm_cpuid_entry2, id: u8, count: u8, tsc_deadline: bool) {
    match (entry.function, entry.index) {
        (0x1, _) => filter_leaf1(entry, id, count, tsc_deadline),
        // Cores share no cache in what the guest is told, so that nothing depends on the host.
        (0x4, _) => entry.eax &= 0x3fff,
        (0x7, 0) => {
            entry.ebx &= !LEAF7_EBX_SGX;
            entry.ecx &= !LEAF7_ECX_OSPKE;
        }
        (0x8000_0001, _) => entry.ecx &= !EXT_ECX_SVM,
        // No invariant TSC: a guest would then prefer the TSC to kvm-clock, and neither does the TSC
        // count the time of a move (ADR 0011), nor need the next host's run at the same rate.
        (0x8000_0007, _) => entry.edx &= !POWER_EDX_INVARIANT_TSC,
        // One thread a core, and as many cores as vCPUs.
        (0x8000_0008, _) => {
            entry.ecx =
                (entry.ecx & !0xf0ff) | (u32::from(count) - 1) | (topology_shift(count) << 12);
        }
        (0x8000_001e, _) => {
            entry.eax = u32::from(id);
            entry.ebx = u32::from(id);
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn filter_leaf1(entry: &mut kvm_cpuid_entry2, id: u8, count: u8, tsc_deadline: bool) {
    entry.ebx = (entry.ebx & 0xff00) | (u32::from(id) << 24) | (u32::from(count) << 16);
    entry.ecx &= !(LEAF1_ECX_MONITOR | LEAF1_ECX_VMX | LEAF1_ECX_OSXSAVE);
    entry.ecx |= LEAF1_ECX_HYPERVISOR;
    if tsc_deadline {
        entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
    }
    if count > 1 {
        entry.edx |= LEAF1_EDX_HTT;
    } else {
        entry.edx &= !LEAF1_EDX_HTT;
    }
}

fn topology_shift(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

/// Leaf 0xb: level 0 is threads (one), level 1 is cores (all vCPUs), level 2 ends the list.
fn topology(level: u32, id: u8, count: u8) -> kvm_cpuid_entry2 {
    let (eax, ebx, ecx) = match level {
        0 => (0, 1, 0x100),
        1 => (topology_shift(count), u32::from(count), 0x201),
        _ => (0, 0, level),
    };
    kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx: u32::from(id),
        ..Default::default()
    }
}

/// The table in the form that the ioctl takes.
pub(super) fn to_table(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, KvmError> {
    CpuId::from_entries(entries)
        .map_err(|_| KvmError::TooMany { what: "CPUID entries", count: entries.len() })
}

/// The features in `wanted` that `offered` lacks, in words, or an empty list.
pub fn missing_features(wanted: &[kvm_cpuid_entry2], offered: &[kvm_cpuid_entry2]) -> Vec<String> {
    let find = |set: &[kvm_cpuid_entry2], (function, index)| {
        set.iter().find(|entry| entry.function == function && entry.index == index).copied()
    };
    let mut missing = Vec::new();
    for leaf in FEATURE_LEAVES {
        let Some(want) = find(wanted, leaf) else { continue };
        let have = find(offered, leaf).unwrap_or_default();
        for (register, want, have) in feature_words(leaf, &want, &have) {
            let lacking = want & !have;
            if lacking != 0 {
                missing
                    .push(format!("leaf {:#x}.{} {register} bits {lacking:#010x}", leaf.0, leaf.1));
            }
        }
    }
    missing
}

/// Only the words of a leaf that are feature bits, without those that we set ourselves.
fn feature_words(
    leaf: (u32, u32),
    want: &kvm_cpuid_entry2,
    have: &kvm_cpuid_entry2,
) -> Vec<(&'static str, u32, u32)> {
    let own_ecx = LEAF1_ECX_HYPERVISOR | LEAF1_ECX_TSC_DEADLINE;
    match leaf {
        (0x1, _) => vec![
            ("ecx", want.ecx & !own_ecx, have.ecx),
            ("edx", want.edx & !LEAF1_EDX_HTT, have.edx),
        ],
        (0x8000_0001, _) => vec![("ecx", want.ecx, have.ecx), ("edx", want.edx, have.edx)],
        (0x8000_0007, _) => vec![("edx", want.edx, have.edx)],
        (0x8000_0008, _) => vec![("ebx", want.ebx, have.ebx)],
        (0xd, _) => vec![("eax", want.eax, have.eax)],
        // EAX of leaf 7.0 is the number of the last subleaf.
        (0x7, 0) => vec![
            ("ebx", want.ebx, have.ebx),
            ("ecx", want.ecx, have.ecx),
            ("edx", want.edx, have.edx),
        ],
        _ => vec![("eax", want.eax, have.eax), ("edx", want.edx, have.edx)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, ..Default::default() }
    }

    #[test]
    fn a_host_that_lacks_a_feature_is_named() {
        let wanted = [leaf(1, 1 << 20 | LEAF1_ECX_HYPERVISOR)];
        assert!(missing_features(&wanted, &[leaf(1, 1 << 20)]).is_empty());
        let missing = missing_features(&wanted, &[leaf(1, 0)]);
        assert_eq!(missing, ["leaf 0x1.0 ecx bits 0x00100000"]);
        assert_eq!(missing_features(&wanted, &[]).len(), 1);
    }

    #[test]
    fn a_guest_is_not_promised_an_invariant_tsc() {
        let mut entry = kvm_cpuid_entry2 { edx: 1 << 8 | 1 << 3, ..leaf(0x8000_0007, 0) };
        filter(&mut entry, 0, 1, true);
        assert_eq!(entry.edx, 1 << 3);
    }

    #[test]
    fn topology_gives_each_vcpu_its_own_id() {
        let mut entry = leaf(1, 0);
        filter(&mut entry, 3, 4, true);
        assert_eq!(entry.ebx >> 24, 3);
        assert_eq!(entry.ebx >> 16 & 0xff, 4);
        assert_ne!(entry.ecx & LEAF1_ECX_HYPERVISOR, 0);
        let cores = topology(1, 3, 4);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 4, 3));
    }
}
