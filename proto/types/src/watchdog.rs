//! How long to wait for a watchdog: the inequality on which the fence proof `watchdog` rests.
//!
//! ```text
//! node:        last grant's stamp t_s
//!               |<-- P -->|            the fencer pets for the last time, at the latest
//!               |         |<-- Twd (1+e) -->|<- reset ->|      the host is reset
//!               |<------ L ------>|<- stop ->|<- drain ->|     or its VMs have stopped by themselves
//! controller:   grant sent, or its election: whichever is later
//!               |<------------------- W ------------------->|  the proof exists
//! ```
//!
//! The node's clock may be slow by d and the controller's fast by d, hence the divisions by 1-d
//! and the factor 1+d.

use serde::{Deserialize, Serialize};

/// What the fencer of a node promises of an armed hardware watchdog, milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WatchdogBound {
    /// Twd, as it was read back.
    pub watchdog_ms: u64,
    /// P, as the fencer enforces it.
    pub pet_ms: u64,
    /// How long after its deadline a VMM that runs on is killed.
    pub stop_ms: u64,
}

/// Milliseconds, but for the two rates.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WatchdogTiming {
    /// W: how long the controller waits after the later of the last grant and its own election.
    pub wait_ms: u64,
    /// P: the longest age of a grant under which a fencer pets its watchdog.
    pub pet_ms: u64,
    /// Twd: the period that a watchdog has at most, as the fencer reads it back.
    pub watchdog_ms: u64,
    /// From the end of the period to the host's last write.
    pub reset_ms: u64,
    /// How long a write that left a host may be under way.
    pub net_ms: u64,
    /// How long a VMM may take to stop its guest at the deadline; afterwards the fencer kills it.
    pub stop_ms: u64,
    /// How long the I/O that a VMM had begun may take.
    pub drain_ms: u64,
    /// d: how much the rates of two clocks may differ, thousandths.
    pub drift_permille: u64,
    /// e: by how much a watchdog may be late, thousandths of its period.
    pub watchdog_error_permille: u64,
}

impl Default for WatchdogTiming {
    fn default() -> Self {
        Self {
            wait_ms: 10_000,
            pet_ms: 1_000,
            watchdog_ms: 5_000,
            reset_ms: 1_000,
            net_ms: 500,
            stop_ms: 1_000,
            drain_ms: 2_000,
            drift_permille: 100,
            watchdog_error_permille: 100,
        }
    }
}

/// Why a set of times is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WatchdogTimingError {
    #[error("watchdog: `{name}` is {value}; give {expected}")]
    Range { name: &'static str, value: u64, expected: &'static str },
    #[error(
        "watchdog: wait_ms (W) is {wait} and must be at least {least}: W >= (1+d) * max( P/(1-d) + \
         Twd*(1+e) + reset + net, L/(1-d) + stop + drain + net ), with {numbers}: the host is reset \
         after {reset_after} ms and its VMs have stopped after {stopped_after} ms. Raise wait_ms, \
         or shorten what is the longer of the two"
    )]
    TooShort { wait: u64, least: u64, reset_after: u64, stopped_after: u64, numbers: Numbers },
    #[error(
        "watchdog: watchdog_ms (Twd, {watchdog}) must be above lease_ms (L, {lease}) - pet_ms (P, \
         {pet}) + stop_ms ({stop}) = {unpetted}: for so long nobody pets while the VMs of a node \
         that lost its lease stop in time, and it would be reset for nothing"
    )]
    ResetsForNothing { watchdog: u64, lease: u64, pet: u64, stop: u64, unpetted: u64 },
    #[error(
        "watchdog: pet_ms (P, {pet}) must be at least a sixth of lease_ms (L, {lease}), the pace \
         of the renewals, and at most lease_ms"
    )]
    PetOutOfPace { pet: u64, lease: u64 },
}

/// The numbers of a refusal, as a person checks them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Numbers {
    pub timing: WatchdogTiming,
    pub lease_ms: u64,
}

impl std::fmt::Display for Numbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let WatchdogTiming { pet_ms, watchdog_ms, reset_ms, net_ms, stop_ms, drain_ms, .. } =
            self.timing;
        let rate = |permille: u64| format!("{}.{:03}", permille / 1000, permille % 1000);
        write!(
            f,
            "d={}, e={}, P={pet_ms}, Twd={watchdog_ms}, reset={reset_ms}, net={net_ms}, L={}, \
             stop={stop_ms}, drain={drain_ms}",
            rate(self.timing.drift_permille),
            rate(self.timing.watchdog_error_permille),
            self.lease_ms,
        )
    }
}

/// No time in it is longer, so that no sum overflows.
const TIME_MS_MAX: u64 = 3_600_000;

impl WatchdogTiming {
    /// When, after a grant's stamp, the host is reset at the latest, by a clock that is right.
    pub fn reset_after_ms(&self) -> u64 {
        self.slow(self.pet_ms) + self.late(self.watchdog_ms) + self.reset_ms + self.net_ms
    }

    /// When, after a grant's stamp, its VMs have stopped by themselves or were killed.
    pub fn stopped_after_ms(&self, lease_ms: u64) -> u64 {
        self.slow(lease_ms) + self.stop_ms + self.drain_ms + self.net_ms
    }

    /// The shortest wait that proves anything.
    pub fn wait_ms_min(&self, lease_ms: u64) -> u64 {
        let longest = self.reset_after_ms().max(self.stopped_after_ms(lease_ms));
        (longest * (1000 + self.drift_permille)).div_ceil(1000)
    }

    /// Checks what must hold between the numbers; called at start-up.
    pub fn validate(&self, lease_ms: u64) -> Result<(), WatchdogTimingError> {
        self.check_ranges(lease_ms)?;
        let Self { wait_ms: wait, pet_ms: pet, watchdog_ms: watchdog, stop_ms: stop, .. } = *self;
        if pet * 6 < lease_ms || pet > lease_ms {
            return Err(WatchdogTimingError::PetOutOfPace { pet, lease: lease_ms });
        }
        let unpetted = lease_ms - pet + stop;
        if watchdog <= unpetted {
            let lease = lease_ms;
            return Err(WatchdogTimingError::ResetsForNothing {
                watchdog,
                lease,
                pet,
                stop,
                unpetted,
            });
        }
        let least = self.wait_ms_min(lease_ms);
        if wait < least {
            let (reset_after, stopped_after) =
                (self.reset_after_ms(), self.stopped_after_ms(lease_ms));
            let numbers = Numbers { timing: *self, lease_ms };
            return Err(WatchdogTimingError::TooShort {
                wait,
                least,
                reset_after,
                stopped_after,
                numbers,
            });
        }
        Ok(())
    }

    /// Whether W also covers this node: what its fencer has read back, and not what was asked for.
    pub fn validate_for(
        &self,
        lease_ms: u64,
        node: WatchdogBound,
    ) -> Result<(), WatchdogTimingError> {
        let WatchdogBound { watchdog_ms, pet_ms, stop_ms } = node;
        Self { watchdog_ms, pet_ms, stop_ms, ..*self }.validate(lease_ms)
    }

    fn check_ranges(&self, lease_ms: u64) -> Result<(), WatchdogTimingError> {
        let times = [
            ("wait_ms", self.wait_ms, 1),
            ("pet_ms", self.pet_ms, 1),
            ("watchdog_ms", self.watchdog_ms, 1000),
            ("reset_ms", self.reset_ms, 0),
            ("net_ms", self.net_ms, 0),
            ("stop_ms", self.stop_ms, 1),
            ("drain_ms", self.drain_ms, 0),
            ("lease_ms", lease_ms, 1),
        ];
        let bad = times.into_iter().find(|(_, ms, least)| !(*least..=TIME_MS_MAX).contains(ms));
        if let Some((name, value, _)) = bad {
            let expected = "milliseconds: at least 1 (watchdog_ms 1000; reset_ms, net_ms and \
                            drain_ms 0), at most an hour";
            return Err(WatchdogTimingError::Range { name, value, expected });
        }
        let rates = [
            ("drift_permille", self.drift_permille),
            ("watchdog_error_permille", self.watchdog_error_permille),
        ];
        match rates.into_iter().find(|(_, rate)| *rate > 500) {
            Some((name, value)) => {
                let expected = "thousandths, 0 to 500";
                Err(WatchdogTimingError::Range { name, value, expected })
            }
            None => Ok(()),
        }
    }

    /// A time by a clock that is slow by d.
    fn slow(&self, ms: u64) -> u64 {
        (ms * 1000).div_ceil(1000 - self.drift_permille)
    }

    /// A period of a watchdog that is late by e.
    fn late(&self, ms: u64) -> u64 {
        (ms * (1000 + self.watchdog_error_permille)).div_ceil(1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LEASE_MS: u64 = 3_000;

    #[test]
    fn the_defaults_hold_and_are_about_ten_seconds() {
        let timing = WatchdogTiming::default();
        timing.validate(LEASE_MS).unwrap();
        // 1000/0.9 + 5000*1.1 + 1000 + 500, and 3000/0.9 + 1000 + 2000 + 500.
        assert_eq!(timing.reset_after_ms(), 1_112 + 5_500 + 1_500);
        assert_eq!(timing.stopped_after_ms(LEASE_MS), 3_334 + 3_500);
        assert_eq!(timing.wait_ms_min(LEASE_MS), 8_924);
    }

    #[test]
    fn a_refusal_shows_the_formula_and_the_numbers() {
        let timing = WatchdogTiming { wait_ms: 8_923, ..WatchdogTiming::default() };
        let refused = timing.validate(LEASE_MS).unwrap_err().to_string();
        for part in ["W >= (1+d) * max(", "is 8923", "least 8924", "d=0.100", "Twd=5000", "L=3000"]
        {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        assert!(WatchdogTiming { wait_ms: 8_924, ..timing }.validate(LEASE_MS).is_ok());
    }

    #[test]
    fn a_node_with_a_slower_watchdog_is_not_covered() {
        let timing = WatchdogTiming::default();
        let node = WatchdogBound { watchdog_ms: 5_000, pet_ms: 1_000, stop_ms: 1_000 };
        timing.validate_for(LEASE_MS, node).unwrap();
        let slow = WatchdogBound { watchdog_ms: 30_000, ..node };
        let refused = timing.validate_for(LEASE_MS, slow).unwrap_err();
        assert!(timing.validate_for(LEASE_MS, WatchdogBound { stop_ms: 4_000, ..node }).is_err());
        assert!(matches!(refused, WatchdogTimingError::TooShort { wait: 10_000, .. }), "{refused}");
    }

    #[test]
    fn a_watchdog_that_would_fire_before_vms_have_stopped_is_refused() {
        let timing = WatchdogTiming { watchdog_ms: 3_000, ..WatchdogTiming::default() };
        let refused = timing.validate(LEASE_MS).unwrap_err();
        assert!(
            matches!(refused, WatchdogTimingError::ResetsForNothing { unpetted: 3_000, .. }),
            "{refused}"
        );
        let early = WatchdogTiming { pet_ms: 499, ..WatchdogTiming::default() };
        let refused = early.validate(LEASE_MS).unwrap_err();
        assert!(matches!(refused, WatchdogTimingError::PetOutOfPace { pet: 499, .. }), "{refused}");
    }

    #[test]
    fn senseless_numbers_are_named() {
        let refused = |timing: WatchdogTiming| timing.validate(LEASE_MS).unwrap_err().to_string();
        let default = WatchdogTiming::default();
        assert!(refused(WatchdogTiming { drift_permille: 501, ..default }).contains("drift"));
        assert!(refused(WatchdogTiming { wait_ms: u64::MAX, ..default }).contains("wait_ms"));
        assert!(default.validate(0).unwrap_err().to_string().contains("lease_ms"));
    }

    proptest! {
        /// The reason for the formula: whatever two clocks do within the drift, the wait ends after
        /// the reset. Real time is in thousandths of a millisecond.
        #[test]
        fn no_pair_of_clocks_ends_the_wait_before_the_reset(
            pet_ms in 500u64..3_000, watchdog_ms in 4_000u64..60_000, drift in 0u64..=500,
            error in 0u64..=500, node_rate in 0u64..=1000, controller_rate in 0u64..=1000,
        ) {
            let timing = WatchdogTiming {
                pet_ms, watchdog_ms, drift_permille: drift, watchdog_error_permille: error,
                ..WatchdogTiming::default()
            };
            let wait_ms = timing.wait_ms_min(LEASE_MS);
            // Rates between 1-d and 1+d.
            let rate = |at: u64| 1000 - drift + 2 * drift * at / 1000;
            let real_us = |ms: u64, rate: u64| ms * 1_000_000 / rate;
            let reset_us = real_us(pet_ms, rate(node_rate))
                + watchdog_ms * (1000 + error) + (timing.reset_ms + timing.net_ms) * 1000;
            let waited_us = real_us(wait_ms, rate(controller_rate));
            prop_assert!(waited_us + 1 >= reset_us, "waited {waited_us}, reset {reset_us}");
        }
    }
}
