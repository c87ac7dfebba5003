//! The times on which decisions rest. Correctness never does: epochs and locks carry it.

use serde::{Deserialize, Serialize};

/// Times in milliseconds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timing {
    /// L of protocol 1: how long a grant lets a node run VMs whose arbiter is the lease.
    pub lease_ms: u64,
    /// Silence after which a node is called unknown. Early is harmless where the storage
    /// arbitrates: the lock cannot be taken from a runner that lives.
    pub suspect_after_ms: u64,
    /// How long a guest may take to shut down when asked to.
    pub shutdown_ms: u64,
    /// How long a new runner waits for the locks of the old one.
    pub lock_wait_ms: u64,
    /// How many VMs of one draining node move at the same time.
    pub drain_parallel: usize,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease_ms: 3_000,
            suspect_after_ms: 1_500,
            shutdown_ms: 60_000,
            lock_wait_ms: 2_000,
            drain_parallel: 2,
        }
    }
}

/// Why a set of times is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TimingError {
    #[error("timing: `{0}` must not be 0")]
    Zero(&'static str),
    #[error(
        "timing: suspect_after_ms ({suspect}) must be at least half of lease_ms ({lease}), three \
         times the pace at which agents renew, or healthy nodes are suspected"
    )]
    SuspectTooEarly { suspect: u64, lease: u64 },
}

impl Timing {
    /// Checks what must hold between the numbers; called at start-up.
    pub fn validate(&self) -> Result<(), TimingError> {
        let positive = [
            ("lease_ms", self.lease_ms),
            ("suspect_after_ms", self.suspect_after_ms),
            ("shutdown_ms", self.shutdown_ms),
            ("lock_wait_ms", self.lock_wait_ms),
            ("drain_parallel", self.drain_parallel as u64),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(TimingError::Zero(name));
        }
        if self.suspect_after_ms < self.lease_ms / 2 {
            return Err(TimingError::SuspectTooEarly {
                suspect: self.suspect_after_ms,
                lease: self.lease_ms,
            });
        }
        Ok(())
    }
}
