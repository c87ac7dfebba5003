//! The assembly half of the guest, and the symbols that it and the linker script define.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64};

global_asm!(include_str!("boot.s"));

unsafe extern "C" {
    pub static start_info_address: AtomicU64;
    pub static exception_record: [AtomicU64; 5];
    pub static exception_table: [u64; 22];
    pub static idt: [[AtomicU64; 2]; 256];
    pub static pml4: [AtomicU64; 512];
    pub static count_timer: AtomicU32;
    pub static count_disk: AtomicU32;
    pub static count_config: AtomicU32;
    pub static count_spurious: AtomicU32;
    static __image_end: u8;

    pub fn gate();
    pub fn interrupt_timer();
    pub fn interrupt_disk();
    pub fn interrupt_config();
    pub fn interrupt_spurious();
}

/// The first address past the guest's own image.
pub fn image_end() -> u64 {
    (&raw const __image_end).addr() as u64
}
