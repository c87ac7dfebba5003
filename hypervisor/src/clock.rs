//! The clock of the VMM: CLOCK_BOOTTIME, which goes on while the host sleeps and never jumps. Only
//! the guest's own clock, which must go on from host to host, rests on the wall clock.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since the host booted.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Nanoseconds since 1970 by the host's wall clock.
pub fn wall_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Microseconds since `start_ns`, for timings in replies.
pub fn us_since(start_ns: u64) -> u64 {
    boottime_ns().saturating_sub(start_ns) / 1000
}
