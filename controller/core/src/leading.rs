//! What a leader has to know of itself: whether it stood still, and how long it has waited for an
//! answer. Pure; the shell gives it its own clock in milliseconds.

use crate::saga;
use crate::state::State;
use crate::task::{StepEvent, Task};

/// The least time between two stalls of its own that a leader excuses.
const EXCUSE_MS: u64 = 10_000;
/// A loop that comes round later than this was held up.
const STALL_MS: u64 = 500;
/// So long an order to a node that is online may stay without an answer. Then a step that cannot
/// have let a guest run is tried elsewhere, and one that can have is treated as a lost node: the
/// locks decide.
const PATIENCE_MS: u64 = 30_000;

/// When this leadership began to listen.
///
/// A leader that stood still has heard nobody meanwhile, and that is nobody's fault: silence is
/// counted anew. Not twice in a row, or a leader that is always slow would never see a loss.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attention {
    since: u64,
    last_round: u64,
    excused_at: u64,
}

impl Attention {
    pub fn new(since: u64) -> Self {
        Self { since, last_round: since, excused_at: 0 }
    }

    /// Silence is counted from here at the earliest.
    pub fn since(&self) -> u64 {
        self.since
    }

    /// The leader's loop has come round. Answers how long it stood still, if that is excused.
    pub fn round(&mut self, now: u64) -> Option<u64> {
        let stood_still = now.saturating_sub(self.last_round);
        self.last_round = now;
        let excused = stood_still > STALL_MS && now.saturating_sub(self.excused_at) > EXCUSE_MS;
        if excused {
            (self.since, self.excused_at) = (now, now);
        }
        excused.then_some(stood_still)
    }
}

/// How long one task has waited in a step, or its order has been without an answer. The leader's
/// memory holds it: the next one counts anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Patience {
    /// The step, and when it was noted first.
    noted: Option<(u32, u64)>,
}

impl Patience {
    /// Once more there was no answer. Says what to make of it when that has been so for too long.
    pub fn unanswered(
        &mut self,
        state: &State,
        task: &Task,
        error: String,
        now: u64,
    ) -> Option<StepEvent> {
        let is_over = self.waited_ms(task.step_no, now) > PATIENCE_MS;
        is_over.then(|| saga::given_up(state, task, error)).flatten()
    }

    /// Notes that this step waits, and for how long it has.
    pub fn waited_ms(&mut self, step_no: u32, now: u64) -> u64 {
        let (_, since) = *self.noted.insert(match self.noted {
            Some((step, since)) if step == step_no => (step, since),
            _ => (step_no, now),
        });
        now.saturating_sub(since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_excused_but_not_twice_in_a_row() {
        let mut attention = Attention::new(20_000);
        assert_eq!(attention.round(20_100), None);
        assert_eq!(attention.round(21_000), Some(900));
        assert_eq!(attention.since(), 21_000);
        assert_eq!(attention.round(22_000), None);
        assert_eq!(attention.since(), 21_000);
        assert_eq!(attention.round(32_000), Some(10_000));
    }
}
