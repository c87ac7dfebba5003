//! The one place of the agent that reads clocks.

use bellwether_agent_core::Stamp;
use rustix::time::{ClockId, clock_gettime};

/// Both clocks of the lease, now.
pub fn now() -> Stamp {
    Stamp { boot_ns: read(ClockId::Boottime), raw_ns: read(ClockId::MonotonicRaw) }
}

fn read(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}
