//! A rate that an administrator set, and a stop that does not wait for it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Ends what several threads do, also while they wait.
#[derive(Debug, Default)]
pub struct StopSignal {
    set: Mutex<bool>,
    changed: Condvar,
}

impl StopSignal {
    pub fn set(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    pub fn is_set(&self) -> bool {
        *self.lock()
    }

    /// Waits at most this long; true if it was set.
    pub fn wait(&self, longest: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), longest, |set| !*set);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// So many bytes a second, shared by several threads. What was not used is not saved up for longer
/// than [`BURST`].
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_s: u64,
    /// When what was taken so far is paid.
    paid: Mutex<Instant>,
}

/// How far behind its rate a stream may catch up.
const BURST: Duration = Duration::from_millis(20);

impl RateLimit {
    /// The rate, at least a byte a second; the clock starts now.
    pub fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), paid: Mutex::new(Instant::now()) }
    }

    /// Takes leave for so many bytes, and waits until the rate allows them; false if stopped.
    pub fn take(&self, bytes: u64, stop: &StopSignal) -> bool {
        let now = Instant::now();
        let price = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        let wait = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let from = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
            *paid = from + price;
            from.saturating_duration_since(now)
        };
        if wait.is_zero() { !stop.is_set() } else { !stop.wait(wait) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_several_pieces() {
        let stop = StopSignal::default();
        let begun = Instant::now();
        let rate = RateLimit::new(10_000);
        // The last piece waits for the ones before it, less what may be caught up.
        assert!((0..6).all(|_| rate.take(200, &stop)));
        assert!(begun.elapsed() >= Duration::from_millis(80), "{:?}", begun.elapsed());
    }

    #[test]
    fn a_stop_ends_the_waiting() {
        let stop = StopSignal::default();
        let rate = RateLimit::new(1);
        assert!(rate.take(1 << 40, &stop));
        stop.set();
        assert!(!rate.take(1, &stop));
        assert!(stop.wait(Duration::MAX));
    }
}
