//! When to stop copying: a decision from what each round has measured. Pure: no I/O, no clock.
//!
//! ```text
//! after a round:  the residue fits the budget, and is small or no longer shrinks fast -> Converged
//!                 it has not shrunk, twice in a row;
//!                 or too many rounds, too much, too long                              -> Stuck
//!                 else                                                                -> GoOn
//! ```
//!
//! The budget is a bound, not an aim: while each round leaves much less than the one before, another
//! one costs the guest nothing and spares it an outage.

use std::time::Duration;

/// What a pre-copy may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long the guest may stand still.
    pub downtime: Duration,
    /// The most rounds after round 0.
    pub rounds_max: u32,
    /// Later rounds may append so many times the memory, and at any rate so many bytes.
    pub append_factor: u64,
    pub append_bytes_min: u64,
    /// The longest time for all rounds.
    pub time_max: Duration,
}

/// What one round has measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Round {
    /// What was written.
    pub bytes: u64,
    /// How long it took, waits for a rate limit included: in this time the residue came up.
    pub took: Duration,
    /// How long the threads were busy with it, on average.
    pub busy: Duration,
    /// What was dirty at its end.
    pub residue: u64,
    /// How long the data took to become durable.
    pub sync: Duration,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    GoOn,
    Converged,
    Stuck,
}

/// What the rounds so far tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Convergence {
    limits: Limits,
    bytes_max: u64,
    rounds: u32,
    bytes: u64,
    elapsed: Duration,
    /// Bytes a second that the storage takes.
    bandwidth: f64,
    /// Bytes a second that become dirty.
    dirty_rate: f64,
    sync: Duration,
    residue: u64,
    /// The residue of the round before.
    before: u64,
    /// Rounds in a row after which the residue was hardly smaller.
    stalled: u32,
}

/// What a stop costs besides writing and syncing: the vCPUs, the disks, the device state.
const STOP_COST: Duration = Duration::from_millis(5);
/// A seal syncs the data and then the header.
const SYNCS: u32 = 2;
/// A residue that is larger than this part of the one before is no progress.
const PROGRESS: f64 = 0.9;
/// Within the budget, a round that leaves more than this part of the one before is the last.
const WORTH_IT: f64 = 0.7;
/// A residue that is written in this time need not be smaller.
const SMALL: Duration = Duration::from_millis(4);
/// One round without progress can be chance.
const STALLED_MAX: u32 = 2;
/// Rounds smaller than this say more about latency than about bandwidth.
const TELLING_BYTES: u64 = 1 << 20;

impl Convergence {
    pub fn new(limits: Limits, memory_bytes: u64) -> Self {
        let bytes_max = memory_bytes.saturating_mul(limits.append_factor);
        Self {
            limits,
            bytes_max: bytes_max.max(limits.append_bytes_min),
            rounds: 0,
            bytes: 0,
            elapsed: Duration::ZERO,
            bandwidth: 0.0,
            dirty_rate: 0.0,
            sync: Duration::ZERO,
            residue: u64::MAX,
            before: u64::MAX,
            stalled: 0,
        }
    }

    /// Round 0 counts neither as a round nor for its bytes: it is the memory itself.
    pub fn after_round_zero(&mut self, round: &Round) -> Verdict {
        self.measure(round);
        self.verdict()
    }

    pub fn after_round(&mut self, round: &Round) -> Verdict {
        self.rounds += 1;
        self.bytes += round.bytes;
        self.measure(round);
        let is_stalled = self.residue as f64 > self.before as f64 * PROGRESS;
        self.stalled = if is_stalled { self.stalled + 1 } else { 0 };
        self.verdict()
    }

    fn measure(&mut self, round: &Round) {
        let rate = |bytes: u64, time: Duration| bytes as f64 / time.as_secs_f64().max(1e-6);
        if round.bytes >= TELLING_BYTES || self.bandwidth == 0.0 {
            self.bandwidth = rate(round.bytes.max(1), round.busy);
        }
        self.elapsed += round.took;
        self.dirty_rate = rate(round.residue, round.took);
        self.sync = round.sync;
        self.before = std::mem::replace(&mut self.residue, round.residue);
    }

    fn verdict(&self) -> Verdict {
        let Limits { downtime, rounds_max, time_max, .. } = self.limits;
        let fits = self.outage(self.residue) <= downtime;
        if fits
            && (self.is_small(self.residue) || self.residue as f64 > self.before as f64 * WORTH_IT)
        {
            return Verdict::Converged;
        }
        let is_over =
            self.rounds >= rounds_max || !self.has_room(self.residue) || self.elapsed >= time_max;
        match is_over || self.stalled >= STALLED_MAX {
            true if fits => Verdict::Converged,
            true => Verdict::Stuck,
            false => Verdict::GoOn,
        }
    }

    /// Whether so much is written in a moment.
    pub fn is_small(&self, residue: u64) -> bool {
        self.writing(residue) <= SMALL
    }

    /// Whether a waiting pre-copy may append so much more.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.bytes.saturating_add(bytes) <= self.bytes_max
    }

    /// How long the guest would stand still if it stopped now with so much to write.
    pub fn outage(&self, residue: u64) -> Duration {
        STOP_COST + self.sync * SYNCS + self.writing(residue)
    }

    fn writing(&self, bytes: u64) -> Duration {
        let writing = Duration::try_from_secs_f64(bytes as f64 / self.bandwidth.max(1.0));
        writing.unwrap_or(Duration::MAX / 2)
    }

    pub fn bandwidth(&self) -> u64 {
        self.bandwidth as u64
    }

    pub fn dirty_rate(&self) -> u64 {
        self.dirty_rate as u64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const MS: Duration = Duration::from_millis(1);

    fn limits() -> Limits {
        Limits {
            downtime: 50 * MS,
            rounds_max: 30,
            append_factor: 4,
            append_bytes_min: 10_000 * MIB,
            time_max: Duration::from_secs(300),
        }
    }

    /// Runs rounds against a guest that dirties at `dirty` bytes/s within `set` bytes; gives the
    /// rounds that were needed, the verdict and the prediction.
    fn simulate(limits: Limits, memory: u64, dirty: u64, set: u64, disk: u64) -> (u32, Verdict) {
        let mut convergence = Convergence::new(limits, memory);
        let (mut bytes, mut rounds) = (memory, 0);
        loop {
            let took = Duration::from_secs_f64(bytes as f64 / disk as f64);
            let residue = ((took.as_secs_f64() * dirty as f64) as u64).min(set);
            let round = Round { bytes, took, busy: took, residue, sync: 4 * MS };
            let verdict = match rounds {
                0 => convergence.after_round_zero(&round),
                _ => convergence.after_round(&round),
            };
            if verdict != Verdict::GoOn {
                return (rounds, verdict);
            }
            (bytes, rounds) = (residue, rounds + 1);
        }
    }

    #[test]
    fn half_the_bandwidth_converges_in_a_few_rounds_whatever_the_size() {
        for memory in [256, 4096, 65536] {
            let (rounds, verdict) =
                simulate(limits(), memory * MIB, 500 * MIB, memory * MIB, 1000 * MIB);
            assert_eq!(verdict, Verdict::Converged);
            assert!(rounds <= 15, "{rounds} rounds for {memory} MiB");
        }
    }

    #[test]
    fn more_than_the_bandwidth_is_stuck_soon_unless_the_working_set_is_small() {
        let (rounds, verdict) = simulate(limits(), 1024 * MIB, 2000 * MIB, 800 * MIB, 1000 * MIB);
        assert_eq!(verdict, Verdict::Stuck);
        assert!(rounds <= 3, "{rounds}");
        let (_, verdict) = simulate(limits(), 1024 * MIB, 2000 * MIB, 16 * MIB, 1000 * MIB);
        assert_eq!(verdict, Verdict::Converged);
    }

    #[test]
    fn the_limits_end_what_converges_too_slowly() {
        let slow = |limits| simulate(limits, 4096 * MIB, 850 * MIB, 4096 * MIB, 1000 * MIB);
        assert_eq!(slow(Limits { rounds_max: 4, ..limits() }), (4, Verdict::Stuck));
        assert_eq!(
            slow(Limits { append_factor: 0, append_bytes_min: 5000 * MIB, ..limits() }).1,
            Verdict::Stuck
        );
        let hurried = Limits { time_max: Duration::from_secs(6), ..limits() };
        assert_eq!(slow(hurried).1, Verdict::Stuck);
    }

    #[test]
    fn the_prediction_is_the_sum_of_its_parts() {
        let mut convergence = Convergence::new(limits(), 100 * MIB);
        let round = Round {
            bytes: 100 * MIB,
            took: 400 * MS,
            busy: 100 * MS,
            residue: 20 * MIB,
            sync: 4 * MS,
        };
        assert_eq!(convergence.after_round_zero(&round), Verdict::GoOn);
        assert_eq!(convergence.outage(20 * MIB), 5 * MS + 8 * MS + 20 * MS);
        assert_eq!((convergence.bandwidth(), convergence.dirty_rate()), (1000 * MIB, 50 * MIB));
        // It fits, and the next round makes it small, or shows that it does not get smaller.
        let next = |residue| {
            let mut next = convergence;
            next.after_round(&Round { residue, ..round })
        };
        assert_eq!(next(4 * MIB), Verdict::Converged);
        assert_eq!(next(10 * MIB), Verdict::GoOn);
        assert_eq!(next(16 * MIB), Verdict::Converged);
    }

    proptest! {
        #[test]
        fn it_always_ends(
            memory in 1u64..1 << 42, dirty in 0u64..1 << 36, set in 0u64..1 << 42, disk in 1u64..1 << 34,
        ) {
            let (rounds, verdict) = simulate(limits(), memory, dirty, set, disk);
            prop_assert!(rounds <= 30 && verdict != Verdict::GoOn);
        }
    }
}
