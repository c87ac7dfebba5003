//! The complete state of one vCPU, in the order in which it is saved and restored.
//!
//! The order of restore matters: CPUID before MSRs; special before general registers; the local
//! APIC after the special registers and before the TSC deadline; the TSC before its deadline;
//! events last, after everything that could raise or clear them.

use std::io;

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use serde::{Deserialize, Serialize};

use super::{Capabilities, KvmError, Vcpu, cpuid, ioctl, msr};

/// One vCPU, stopped. Saved as kind `vcpu`, version 1.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuStateV1 {
    pub id: u8,
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub mp_state: kvm_mp_state,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    /// The PAE page-directory pointers, where the host reports them and the guest uses them.
    pub pdptrs: Option<[u64; 4]>,
    pub xsave: Vec<u8>,
    pub xcrs: kvm_xcrs,
    pub debug: kvm_debugregs,
    pub lapic: kvm_lapic_state,
    pub tsc_khz: Option<u32>,
    pub msrs: Vec<kvm_msr_entry>,
    pub events: kvm_vcpu_events,
}

impl Vcpu {
    fn named(&self, operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
        let vcpu = self.id;
        move |source| KvmError::Vcpu { vcpu, operation, source: source.into() }
    }

    fn named_io(&self, operation: &'static str) -> impl Fn(io::Error) -> KvmError {
        let vcpu = self.id;
        move |source| KvmError::Vcpu { vcpu, operation, source }
    }

    /// For registers whose values decide whether a host takes them.
    fn refused<'a>(
        &self,
        registers: impl Fn() -> String + 'a,
    ) -> impl Fn(io::Error) -> KvmError + 'a {
        let vcpu = self.id;
        move |source| KvmError::Registers { vcpu, registers: registers(), source }
    }

    /// Reads the whole state; the vCPU is outside `KVM_RUN` with no access pending.
    pub fn save(&self, caps: &Capabilities, msrs: &[u32]) -> Result<VcpuStateV1, KvmError> {
        let fd = &self.fd;
        Ok(VcpuStateV1 {
            id: self.id,
            cpuid: self.cpuid.clone(),
            mp_state: fd.get_mp_state().map_err(self.named("read MP_STATE"))?,
            regs: fd.get_regs().map_err(self.named("read REGS"))?,
            sregs: fd.get_sregs().map_err(self.named("read SREGS"))?,
            pdptrs: self.read_pdptrs(caps)?,
            xsave: self.read_xsave(caps)?,
            xcrs: fd.get_xcrs().map_err(self.named("read XCRS"))?,
            debug: fd.get_debug_regs().map_err(self.named("read DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(self.named("read LAPIC"))?,
            tsc_khz: caps.get_tsc_khz.then(|| fd.get_tsc_khz().ok()).flatten(),
            msrs: msr::read(fd, self.id, msrs)?,
            events: fd.get_vcpu_events().map_err(self.named("read VCPU_EVENTS"))?,
        })
    }

    /// Sets the whole state on a vCPU that has not run.
    pub fn restore(&mut self, state: &VcpuStateV1, caps: &Capabilities) -> Result<(), KvmError> {
        self.set_cpuid(state.cpuid.clone())?;
        let fd = &self.fd;
        self.set_tsc_khz(state.tsc_khz, caps);
        let mp_state = state.mp_state.mp_state;
        let refused = self.refused(|| format!("MP_STATE {mp_state}"));
        fd.set_mp_state(state.mp_state).map_err(|error| refused(error.into()))?;
        self.write_sregs(state)?;
        fd.set_regs(&state.regs).map_err(self.named("set REGS"))?;
        // A host without XSAVE has none, and refuses even to set none.
        if state.xcrs.nr_xcrs > 0 {
            let refused = self.refused(|| name_xcrs(&state.xcrs));
            fd.set_xcrs(&state.xcrs).map_err(|error| refused(error.into()))?;
        }
        self.write_xsave(&state.xsave)?;
        fd.set_debug_regs(&state.debug).map_err(self.named("set DEBUGREGS"))?;
        fd.set_lapic(&state.lapic).map_err(self.named("set LAPIC"))?;
        msr::write(fd, self.id, &state.msrs)?;
        fd.set_vcpu_events(&state.events).map_err(self.named("set VCPU_EVENTS"))
    }

    /// Gives the vCPU its processor identity; before any MSR.
    ///
    /// What was set is kept for the saved state. KVM_GET_CPUID2 would add what follows from other
    /// registers, and on some hosts whatever the guest sees without asking KVM.
    pub fn set_cpuid(&mut self, entries: Vec<kvm_cpuid_entry2>) -> Result<(), KvmError> {
        self.fd.set_cpuid2(&cpuid::to_table(&entries)?).map_err(self.named("set CPUID"))?;
        self.cpuid = entries;
        Ok(())
    }

    fn read_pdptrs(&self, caps: &Capabilities) -> Result<Option<[u64; 4]>, KvmError> {
        if !caps.sregs2 {
            return Ok(None);
        }
        let sregs = ioctl::get_sregs2(&self.fd).map_err(self.named_io("read SREGS2"))?;
        let valid = sregs.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
        Ok(valid.then_some(sregs.pdptrs))
    }

    fn write_sregs(&self, state: &VcpuStateV1) -> Result<(), KvmError> {
        let refused = self.refused(|| name_sregs(&state.sregs));
        let Some(pdptrs) = state.pdptrs else {
            return self.fd.set_sregs(&state.sregs).map_err(|error| refused(error.into()));
        };
        // A pending interrupt, which SREGS2 lacks, is in the events as well.
        let sregs = with_pdptrs(&state.sregs, pdptrs);
        ioctl::set_sregs2(&self.fd, &sregs).map_err(refused)
    }

    fn read_xsave(&self, caps: &Capabilities) -> Result<Vec<u8>, KvmError> {
        let plain = size_of::<kvm_xsave>();
        let extra = (caps.xsave_bytes as usize).saturating_sub(plain).div_ceil(4);
        let mut xsave = Xsave::new(extra)
            .map_err(|_| KvmError::TooMany { what: "XSAVE words", count: extra })?;
        if extra == 0 {
            let state = self.fd.get_xsave().map_err(self.named("read XSAVE"))?;
            return Ok(words_to_bytes(&state.region));
        }
        // SAFETY: the buffer has as many bytes as KVM_CAP_XSAVE2 says that the kernel writes.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(self.named("read XSAVE2"))?;
        let mut bytes = words_to_bytes(&xsave.as_fam_struct_ref().xsave.region);
        bytes.extend(words_to_bytes(xsave.as_slice()));
        Ok(bytes)
    }

    fn write_xsave(&self, bytes: &[u8]) -> Result<(), KvmError> {
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        // The kernel reads as much as *this* host's XSAVE area has, so the buffer is never smaller.
        let host = self.fd_xsave_words();
        let plain = size_of::<kvm_xsave>() / 4;
        let extra = words.len().max(host).saturating_sub(plain);
        let mut xsave = Xsave::new(extra)
            .map_err(|_| KvmError::TooMany { what: "XSAVE words", count: extra })?;
        let head = words.len().min(plain);
        // SAFETY: only the register area is written; the length field stays as `new` set it.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region[..head].copy_from_slice(&words[..head]);
        if let Some(tail) = words.get(plain..) {
            xsave.as_mut_slice()[..tail.len()].copy_from_slice(tail);
        }
        let refused = self.refused(|| name_xsave(&words));
        // SAFETY: the buffer is at least as large as this host's XSAVE area.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(|error| refused(error.into()))
    }

    /// A host that can scale does; on the others the guest's kvm-clock learns the new frequency.
    fn set_tsc_khz(&self, saved: Option<u32>, caps: &Capabilities) {
        let Some(saved) = saved.filter(|&khz| khz != 0) else { return };
        let Ok(host) = self.fd.get_tsc_khz() else { return };
        if host == saved {
            return;
        }
        if !caps.tsc_control || self.fd.set_tsc_khz(saved).is_err() {
            tracing::warn!(
                vcpu = self.id,
                saved,
                host,
                "TSC frequency differs and cannot be scaled"
            );
        }
    }
}

fn name_sregs(sregs: &kvm_sregs) -> String {
    let kvm_sregs { cr0, cr3, cr4, efer, apic_base, .. } = sregs;
    format!("CR0 {cr0:#x}, CR3 {cr3:#x}, CR4 {cr4:#x}, EFER {efer:#x}, APIC base {apic_base:#x}")
}

fn name_xcrs(xcrs: &kvm_xcrs) -> String {
    let named = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
    let named = named.map(|register| format!("XCR{} {:#x}", register.xcr, register.value));
    named.collect::<Vec<_>>().join(", ")
}

/// MXCSR, and the components that are in the area (Intel SDM 1, 13.4).
fn name_xsave(words: &[u32]) -> String {
    let word = |index: usize| words.get(index).copied().unwrap_or(0);
    let components = u64::from(word(129)) << 32 | u64::from(word(128));
    format!("XSAVE with MXCSR {:#x} and components {components:#x}", word(6))
}

fn words_to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn with_pdptrs(sregs: &kvm_sregs, pdptrs: [u64; 4]) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        flags: u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID),
        pdptrs,
    }
}
