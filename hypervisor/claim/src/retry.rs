//! Waiting for a lock, with a bound.
//!
//! The kernel's own wait (`F_OFD_SETLKW`) cannot be given a deadline, and cannot be called off from
//! another thread without a signal; and over NFS it is a retry loop itself. So we ask every
//! millisecond at first, which is as good as at once for a failover, and every 10 ms after a second.

use std::time::{Duration, Instant};

use rustix::event::{Timespec, poll};

const PACE: Duration = Duration::from_millis(1);
const PACE_LATER: Duration = Duration::from_millis(10);
const EAGER: Duration = Duration::from_secs(1);

/// Repeats `attempt` while its outcome is busy, until the deadline. The last outcome counts.
pub(crate) fn until<T, E>(
    deadline: Instant,
    busy: impl Fn(&E) -> bool,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let started = Instant::now();
    loop {
        let outcome = attempt();
        let now = Instant::now();
        match &outcome {
            Err(error) if busy(error) && now < deadline => {
                let pace = if now - started < EAGER { PACE } else { PACE_LATER };
                wait(pace.min(deadline - now));
            }
            _ => return outcome,
        }
    }
}

/// Waits on nothing but the clock. A signal ends it early, which only means an early attempt.
fn wait(longest: Duration) {
    if let Ok(timeout) = Timespec::try_from(longest) {
        let _interrupted = poll(&mut [], Some(&timeout));
    }
}
