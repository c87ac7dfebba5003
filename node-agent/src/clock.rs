//! The one place of the agent that reads clocks.

use std::time::{SystemTime, UNIX_EPOCH};

use bellwether_agent_core::Stamp;
use rustix::time::{ClockId, clock_gettime};

/// Both clocks of the lease, now.
pub fn now() -> Stamp {
    Stamp { boot_ns: read(ClockId::Boottime), raw_ns: read(ClockId::MonotonicRaw) }
}

/// The wall clock, milliseconds since 1970: to be compared with those of other hosts, and nothing else.
pub fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn read(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}
