//! Calls from ring 3 into the ring-0 gates of `boot.s`.
//!
//! CPUID goes through ring 0, because where ring 3 runs without hardware virtualization it would show the
//! host's processor. RDTSC does not need to: such a KVM gives every guest the host's counter as it is, in
//! ring 0, too (writes of the counter are ignored there), and elsewhere the offset applies in every ring.

use core::arch::asm;

// The order of the table `gates` in boot.s.
const IDLE: u64 = 0;
const RDMSR: u64 = 1;
const WRMSR: u64 = 2;
const CPUID: u64 = 3;
const ENABLE_INTERRUPTS: u64 = 4;
const STOP: u64 = 5;
const FORGET_IDT: u64 = 6;

/// A call of a gate, with the registers that every gate destroys. It is repeated until ring 0 has been
/// reached: a breakpoint that is under way when the VM is saved may be lost with it, because KVM counts
/// on the instruction being executed again. Every gate bears being called twice.
macro_rules! gate {
    ($number:ident => $result:tt $(, $($operand:tt)+)?) => {
        asm!("2:", "xor r10d, r10d", "int3", "test r10d, r10d", "jz 2b",
             inlateout("rax") $number => $result, $($($operand)+,)?
             out("rcx") _, out("r10") _, options(nostack))
    };
}

pub fn rdtsc() -> u64 {
    // SAFETY: reading the counter has no effect, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Sleeps until the next interrupt, or returns at once if one has come since the last call.
pub fn idle() {
    // SAFETY: the gate changes no other register; memory may be changed by interrupts, hence no `nomem`.
    unsafe { gate!(IDLE => _) };
}

/// # Safety
/// The register must exist: a general protection fault is fatal.
pub unsafe fn rdmsr(register: u32) -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: the caller vouches for the register; the gate writes eax and edx only.
    unsafe { gate!(RDMSR => low, in("r8") u64::from(register), lateout("rdx") high) };
    (high << 32) | (low & 0xffff_ffff)
}

/// # Safety
/// The register must exist, and the value must not break what the guest relies on.
pub unsafe fn wrmsr(register: u32, value: u64) {
    // SAFETY: the caller vouches for register and value.
    unsafe {
        gate!(WRMSR => _, in("r8") u64::from(register), inlateout("r9") value => _, lateout("rdx") _)
    };
}

#[derive(Clone, Copy)]
pub struct Cpuid {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

pub fn cpuid(leaf: u32) -> Cpuid {
    let (eax, ebx, ecx, edx): (u64, u64, u64, u64);
    // SAFETY: rbx belongs to the compiler, so it is put back; the others are declared.
    unsafe {
        asm!("mov {ebx}, rbx", "2:", "xor r10d, r10d", "int3", "test r10d, r10d", "jz 2b",
             "xchg {ebx}, rbx", ebx = out(reg) ebx, out("r10") _,
             inout("rax") CPUID => eax, in("r8") u64::from(leaf), out("rcx") ecx, out("rdx") edx,
             options(nostack));
    };
    Cpuid { eax: eax as u32, ebx: ebx as u32, ecx: ecx as u32, edx: edx as u32 }
}

pub fn enable_interrupts() {
    // SAFETY: the gate sets IF in the returning flags; all vectors have handlers by now.
    unsafe { gate!(ENABLE_INTERRUPTS => _) };
}

/// Halts with interrupts off: the guest stays as it is, to be looked at.
pub fn stop() -> ! {
    // SAFETY: the gate never returns.
    unsafe { asm!("2:", "int3", "jmp 2b", in("rax") STOP, options(nostack, noreturn)) };
}

/// Takes the interrupt table away and faults: a triple fault, as a crashing kernel makes it.
pub fn triple_fault() -> ! {
    // SAFETY: nothing after this is meant to work.
    unsafe { asm!("int3", "ud2", in("rax") FORGET_IDT, options(nostack, noreturn)) };
}
