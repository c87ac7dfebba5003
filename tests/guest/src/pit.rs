//! The programmable interval timer, used once to measure the TSC where nothing tells its frequency.

use crate::gates;
use crate::ports::{inb, outb};

const PIT_HZ: u64 = 1_193_182;
const COUNT: u64 = 29_830; // 25 ms
const CHANNEL_2: u16 = 0x42;
const MODE: u16 = 0x43;
const GATE: u16 = 0x61;
const OUTPUT: u8 = 0x20;
const POLLS_MAX: u32 = 100_000_000;

/// The frequency of the TSC, or `None` without a PIT.
pub fn measure_tsc_hz() -> Option<u64> {
    // SAFETY: channel 2 drives only the speaker, which is disconnected here.
    unsafe {
        outb(GATE, inb(GATE) & !2 | 1);
        outb(MODE, 0xb0); // channel 2, both bytes, mode 0
        outb(CHANNEL_2, COUNT as u8);
        outb(CHANNEL_2, (COUNT >> 8) as u8);
    }
    let start = gates::rdtsc();
    // SAFETY: as above.
    let ended = (0..POLLS_MAX).any(|_| unsafe { inb(GATE) } & OUTPUT != 0);
    let ticks = gates::rdtsc() - start;
    ended.then(|| (u128::from(ticks) * u128::from(PIT_HZ) / u128::from(COUNT)) as u64)
}
