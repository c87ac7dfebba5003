//! The registers with which a cold boot begins.

use kvm_bindings::{kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};

use super::msr::{self, MSR_IA32_MISC_ENABLE, MSR_MTRR_DEF_TYPE};
use super::{KvmError, Vcpu, call};

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
/// A busy 32- or 64-bit task.
const TYPE_TASK: u8 = 0xb;

/// A start in long mode, with everything that the guest finds in its memory for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongMode {
    pub address: u64,
    /// What RSI holds: the boot parameters.
    pub argument: u64,
    pub page_tables: u64,
    /// Code has the selector 0x10, data 0x18, the task 0x20.
    pub gdt: u64,
    pub gdt_limit: u16,
}

impl Vcpu {
    /// The state of PVH's boot processor: 32-bit protected mode without paging, flat segments.
    ///
    /// (Xen: docs/misc/pvh.pandoc; the start info's address is in EBX.)
    pub fn set_pvh_entry(&self, entry: u32, start_info: u32) -> Result<(), KvmError> {
        let mut sregs = self.read_sregs()?;
        set_flat(&mut sregs, segment(0x8, TYPE_CODE), 0x10, 0x18);
        sregs.gdt.limit = 0;
        sregs.cr0 = CR0_PROTECTED;
        sregs.cr4 = 0;
        sregs.efer = 0;
        let (rip, rbx) = (u64::from(entry), u64::from(start_info));
        self.begin(&sregs, kvm_regs { rip, rbx, ..Default::default() })
    }

    /// The state of the boot processor at a 64-bit entry point.
    ///
    /// (Linux: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol".)
    pub fn set_long_mode_entry(&self, entry: &LongMode) -> Result<(), KvmError> {
        let mut sregs = self.read_sregs()?;
        let code = kvm_segment { l: 1, db: 0, ..segment(0x10, TYPE_CODE) };
        set_flat(&mut sregs, code, 0x18, 0x20);
        sregs.gdt.base = entry.gdt;
        sregs.gdt.limit = entry.gdt_limit;
        sregs.cr0 = CR0_PROTECTED | CR0_PAGING;
        sregs.cr3 = entry.page_tables;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LONG_MODE;
        let (rip, rsi) = (entry.address, entry.argument);
        self.begin(&sregs, kvm_regs { rip, rsi, ..Default::default() })
    }

    /// Makes all memory cacheable, as firmware would on every processor; a kernel that finds the
    /// memory type registers switched off does without its page attributes as well.
    pub fn set_memory_types(&self) -> Result<(), KvmError> {
        const ENABLED: u64 = 1 << 11;
        const WRITE_BACK: u64 = 6;
        let data = ENABLED | WRITE_BACK;
        let types = kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data, ..Default::default() };
        msr::write(&self.fd, self.id, &[types])
    }

    fn read_sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().map_err(call("read SREGS"))
    }

    fn begin(&self, sregs: &kvm_sregs, regs: kvm_regs) -> Result<(), KvmError> {
        const RFLAGS_RESERVED: u64 = 2;
        self.fd.set_sregs(sregs).map_err(call("set SREGS"))?;
        let regs = kvm_regs { rflags: RFLAGS_RESERVED, ..regs };
        self.fd.set_regs(&regs).map_err(call("set REGS"))?;
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
        self.fd.set_fpu(&fpu).map_err(call("set FPU"))?;
        // Fast string operations, as firmware would have left them.
        let misc = kvm_msr_entry { index: MSR_IA32_MISC_ENABLE, data: 1, ..Default::default() };
        msr::write(&self.fd, self.id, &[misc])
    }
}

fn set_flat(sregs: &mut kvm_sregs, code: kvm_segment, data: u16, task: u16) {
    let data = segment(data, TYPE_DATA);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, s: 0, g: 0, db: 0, ..segment(task, TYPE_TASK) };
    sregs.idt.limit = 0;
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
