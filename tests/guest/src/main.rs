//! The test guest: a small operating system whose only purpose is to notice when something is wrong.
//!
//! It rewrites and verifies patterned memory, keeps a journal on its disk, reads a paravirtual clock,
//! and says so on the first serial port. README.md has the lines it prints and what it obeys.
//!
//! Ring 0 is `boot.s`, a few instructions for each gate and interrupt; everything else runs in ring 3,
//! which is native speed on every KVM. Only the boot processor runs; another one would need its own
//! TSS, ring-0 stack and ring-3 stack (`boot.s`), and its own share of `Machine::work`.
#![no_std]
#![no_main]

mod boot;
mod budget;
mod clock;
mod cmdline;
mod command;
mod console;
mod disk;
mod fatal;
mod gates;
mod interrupts;
mod journal;
mod journal_format;
mod lapic;
mod machine;
mod mem;
mod page_stream;
mod pages;
mod paging;
mod pattern;
mod pci;
mod pit;
mod ports;
mod power;
mod pvclock;
mod pvh;
mod ram;
mod stats;
mod sync;
mod virtio;

pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Called from `boot.s` in ring 3, on the ring-3 stack, with `.bss` cleared.
#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    console::init();
    interrupts::init();
    machine::Machine::boot().run()
}
