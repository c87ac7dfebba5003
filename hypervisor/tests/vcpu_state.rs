//! The state of a vCPU: what was restored is what is there, and what a host does not take has a name.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use bellwether_memory::GuestRam;
use bellwether_vmm::kvm::msr::{MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE};
use bellwether_vmm::kvm::vcpu_state::VcpuStateV1;
use bellwether_vmm::kvm::{Vcpu, Vm};
use kvm_bindings::{KVM_MP_STATE_HALTED, kvm_msr_entry};

const VCPUS: u8 = 2;
/// x87 and SSE registers in an XSAVE area.
const XMM_END: usize = 416;

struct Processors {
    vm: Vm,
    vcpus: Vec<Vcpu>,
    msrs: Vec<u32>,
}

impl Processors {
    fn new() -> Self {
        let vm = Vm::new(&Arc::new(GuestRam::new(2 << 20).unwrap())).unwrap();
        let vcpu = |id| {
            let mut vcpu = vm.create_vcpu(id).unwrap();
            vcpu.set_cpuid(vm.guest_cpuid(id, VCPUS).unwrap()).unwrap();
            vcpu
        };
        let vcpus = (0..VCPUS).map(vcpu).collect();
        let msrs = vm.msrs_to_save().unwrap();
        Self { vm, vcpus, msrs }
    }

    fn save(&self) -> Vec<VcpuStateV1> {
        self.vcpus.iter().map(|vcpu| vcpu.save(&self.vm.caps, &self.msrs).unwrap()).collect()
    }

    fn restore(&mut self, states: &[VcpuStateV1]) -> Result<(), String> {
        let caps = &self.vm.caps;
        let mut both = self.vcpus.iter_mut().zip(states);
        both.try_for_each(|(vcpu, state)| vcpu.restore(state, caps).map_err(|e| e.to_string()))
    }
}

/// Registers that count by themselves.
fn stands(msr: &&kvm_msr_entry) -> bool {
    ![MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE].contains(&msr.index)
}

#[test]
fn every_register_that_can_be_read_can_be_written_and_read_again() {
    let mut states = Processors::new().save();
    states[0].regs.rbx = 0x1234_5678_9abc_def0;
    states[0].debug.db[0] = 0x1000;
    states[0].sregs.cr2 = 0x7000;
    // XMM0, and that x87 and SSE are in the area (Intel SDM 1, 13.4).
    states[0].xsave[160..168].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    states[0].xsave[512] |= 3;
    // The second one waits in HLT, as the other processors of a system that idles.
    states[1].mp_state.mp_state = KVM_MP_STATE_HALTED;
    let mut other = Processors::new();
    other.restore(&states).unwrap();
    for (before, after) in states.iter().zip(other.save()) {
        assert_eq!(after.regs, before.regs);
        assert_eq!(after.sregs, before.sregs);
        assert_eq!(after.mp_state, before.mp_state);
        assert_eq!(after.debug.db, before.debug.db);
        assert_eq!(after.xcrs.nr_xcrs, before.xcrs.nr_xcrs);
        // What follows depends on the host.
        assert_eq!(after.xsave[..XMM_END], before.xsave[..XMM_END]);
        assert!(after.lapic == before.lapic, "vCPU {}: LAPIC differs", before.id);
        let msrs = |state: &VcpuStateV1| {
            let msrs = state.msrs.iter().filter(stands);
            msrs.map(|msr| (msr.index, msr.data)).collect::<Vec<_>>()
        };
        assert_eq!(msrs(&after), msrs(before));
        assert!(msrs(before).len() > 30);
    }
}

#[test]
fn a_register_that_a_host_does_not_take_is_named_with_its_value() {
    let good = Processors::new().save();
    let refused = |change: &dyn Fn(&mut VcpuStateV1), words: &[&str]| {
        let mut states = good.clone();
        change(&mut states[1]);
        let error = Processors::new().restore(&states).unwrap_err();
        for word in [&["vCPU 1"], words].concat() {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
    };
    refused(
        &|state| {
            let (index, data) = (0x1234_5678, 0x77);
            state.msrs.insert(5, kvm_msr_entry { index, data, ..Default::default() });
        },
        &["MSR 0x12345678", "0x77"],
    );
    refused(&|state| state.sregs.cr4 |= 1 << 40, &["CR4 0x10000000", "CR0 ", "EFER "]);
    refused(&|state| state.mp_state.mp_state = 77, &["MP_STATE 77"]);
    refused(
        &|state| {
            state.xcrs.nr_xcrs = 1;
            state.xcrs.xcrs[0].value = 1 << 62;
        },
        &["XCR0 0x4000000000000000"],
    );
    Processors::new().restore(&good).unwrap();
}
