//! The local APIC: one-shot timer and the enabling of interrupts.

use crate::clock::Clock;
use crate::gates;
use crate::interrupts::{VECTOR_SPURIOUS, VECTOR_TIMER};
use crate::ports::outb;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

const BASE: usize = 0xfee0_0000;
const SPURIOUS: usize = 0xf0;
const TASK_PRIORITY: usize = 0x80;
const ID: usize = 0x20;
const LVT_TIMER: usize = 0x320;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0xb;
const MSR_APIC_BASE: u32 = 0x1b;
const GLOBAL_ENABLE: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;
const CALIBRATION_NS: u64 = 2_000_000;

pub struct Lapic {
    hz: u64,
}

impl Lapic {
    /// Switches the APIC on, the legacy controllers off, measures the timer, and enables interrupts.
    pub fn start(clock: &mut Clock) -> Self {
        enable();
        mask_legacy_controllers();
        write(SPURIOUS, 0x100 | u32::from(VECTOR_SPURIOUS));
        write(TASK_PRIORITY, 0);
        write(LVT_LINT0, MASKED);
        write(LVT_LINT1, MASKED);
        write(DIVIDE, DIVIDE_BY_1);
        write(LVT_TIMER, MASKED);
        let hz = measure(clock);
        write(LVT_TIMER, u32::from(VECTOR_TIMER));
        gates::enable_interrupts();
        Self { hz }
    }

    pub fn hz(&self) -> u64 {
        self.hz
    }

    /// One interrupt, that many nanoseconds from now.
    pub fn arm(&self, ns: u64) {
        let count = u128::from(ns) * u128::from(self.hz) / 1_000_000_000;
        write(INITIAL_COUNT, count.clamp(1, u128::from(u32::MAX)) as u32);
    }
}

/// The id to which MSI-X messages are addressed.
pub fn id() -> u8 {
    (read(ID) >> 24) as u8
}

fn enable() {
    // SAFETY: every x86-64 processor has the register.
    let base = unsafe { gates::rdmsr(MSR_APIC_BASE) };
    if base & X2APIC != 0 || base & 0xf_ffff_f000 != BASE as u64 {
        crate::fatal!("lapic base={base:#x} is not an xAPIC at {BASE:#x}");
    }
    if base & GLOBAL_ENABLE == 0 {
        // SAFETY: only sets the enable bit.
        unsafe { gates::wrmsr(MSR_APIC_BASE, base | GLOBAL_ENABLE) };
    }
}

fn mask_legacy_controllers() {
    // SAFETY: the guest uses no interrupt of the two 8259.
    unsafe {
        outb(0x21, 0xff);
        outb(0xa1, 0xff);
    }
}

fn measure(clock: &mut Clock) -> u64 {
    write(INITIAL_COUNT, u32::MAX);
    let (start_ns, start_count) = sample(clock);
    while clock.now_ns() - start_ns < CALIBRATION_NS {}
    let (end_ns, end_count) = sample(clock);
    write(INITIAL_COUNT, 0);
    if end_count >= start_count {
        crate::fatal!("lapic timer does not count");
    }
    u64::from(start_count - end_count) * 1_000_000_000 / (end_ns - start_ns)
}

/// The count, and the middle of the time that it took to read it, which may be long under emulation.
fn sample(clock: &mut Clock) -> (u64, u32) {
    let before = clock.now_ns();
    let count = read(CURRENT_COUNT);
    ((before + clock.now_ns()) / 2, count)
}

fn read(register: usize) -> u32 {
    // SAFETY: the APIC's registers are mapped, and reading them has no effect.
    unsafe { with_exposed_provenance::<u32>(BASE + register).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: the APIC's registers are mapped and belong to this module.
    unsafe { with_exposed_provenance_mut::<u32>(BASE + register).write_volatile(value) };
}
