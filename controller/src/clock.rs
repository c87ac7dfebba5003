//! The controller's clock: milliseconds since 1970 as they were at start-up, carried on by the
//! monotonic clock, so that a wall clock that jumps moves no decision.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

#[derive(Clone, Copy, Debug)]
pub struct Clock {
    base_ms: u64,
    started: Instant,
}

impl Clock {
    /// Reads the wall clock once.
    #[allow(clippy::disallowed_methods)]
    pub fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let base_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX / 2);
        Self { base_ms, started: Instant::now() }
    }

    /// Milliseconds since 1970; never goes back in one process.
    pub fn now_ms(&self) -> u64 {
        self.base_ms + u64::try_from(self.started.elapsed().as_millis()).unwrap_or(0)
    }

    /// Microseconds by the same clock: for measuring, as differences.
    pub fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(0)
    }
}
