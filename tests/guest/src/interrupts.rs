//! The interrupt descriptor table, filled from ring 3 because address arithmetic is cheap here.

use crate::boot;
use core::fmt::{self, Display, Formatter};
use core::sync::atomic::Ordering::Relaxed;

const VECTOR_BREAKPOINT: u8 = 3;
pub const VECTOR_TIMER: u8 = 0x40;
pub const VECTOR_CONFIG: u8 = 0x41;
pub const VECTOR_DISK: u8 = 0x42;
pub const VECTOR_SPURIOUS: u8 = 0xff;

const RING_0_CODE: u64 = 0x18;
const INTERRUPT_GATE: u64 = 0x8e;
const RING_3_MAY_CALL: u64 = 0x60;

/// Fills the table that `boot.s` loaded empty. Interrupts stay off.
pub fn init() {
    // SAFETY: the table is a constant of `boot.s`, never written.
    let exceptions = unsafe { &boot::exception_table };
    for (vector, &handler) in (0u8..).zip(exceptions) {
        set(vector, handler, 0);
    }
    let gate: unsafe extern "C" fn() = boot::gate;
    set(VECTOR_BREAKPOINT, gate as usize as u64, RING_3_MAY_CALL);
    let interrupts: [(u8, unsafe extern "C" fn()); 4] = [
        (VECTOR_TIMER, boot::interrupt_timer),
        (VECTOR_CONFIG, boot::interrupt_config),
        (VECTOR_DISK, boot::interrupt_disk),
        (VECTOR_SPURIOUS, boot::interrupt_spurious),
    ];
    for (vector, handler) in interrupts {
        set(vector, handler as usize as u64, 0);
    }
}

fn set(vector: u8, handler: u64, extra: u64) {
    let low = (handler & 0xffff)
        | (RING_0_CODE << 16)
        | ((INTERRUPT_GATE | extra) << 40)
        | ((handler >> 16 & 0xffff) << 48);
    // SAFETY: the table lives as long as the guest, and its words are atomics.
    let entry = unsafe { &boot::idt[usize::from(vector)] };
    entry[1].store(handler >> 32, Relaxed);
    entry[0].store(low, Relaxed);
}

/// How often each interrupt has come.
pub struct Counts {
    pub timer: u32,
    pub disk: u32,
    pub config: u32,
    pub spurious: u32,
}

pub fn counts() -> Counts {
    // SAFETY: the handlers only increment these atomics.
    unsafe {
        Counts {
            timer: boot::count_timer.load(Relaxed),
            disk: boot::count_disk.load(Relaxed),
            config: boot::count_config.load(Relaxed),
            spurious: boot::count_spurious.load(Relaxed),
        }
    }
}

struct Exception {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    cr2: u64,
}

impl Display for Exception {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let Self { vector, error, rip, cs, cr2 } = self;
        write!(f, "exception vector={vector} error={error:#x} rip={rip:#x} cs={cs:#x} cr2={cr2:#x}")
    }
}

/// Where `boot.s` sends every exception: in ring 3, on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn exception_report() -> ! {
    // SAFETY: the stub filled the record before it came here, and nothing else writes it.
    let record = unsafe { &boot::exception_record };
    let [vector, error, rip, cs, cr2] = [0, 1, 2, 3, 4].map(|i: usize| record[i].load(Relaxed));
    crate::fatal!("{}", Exception { vector, error, rip, cs, cr2 })
}
