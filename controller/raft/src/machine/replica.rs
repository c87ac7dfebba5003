//! The state, applied without copying it.
//!
//! A published state is shared with readers, so it cannot be changed in place, and copying the
//! state of a large cluster for every batch would cost more than applying the batch. Two copies
//! take turns: while one is published, the next batch is applied to the other, after the commands
//! that it missed. `apply` is deterministic, so both are always the same. A copy is made only when
//! a reader still holds the older one, or when it has missed too much.

use std::sync::Arc;

use bellwether_core::{Command, Outcome, State};

/// A copy that has missed more commands than this is dropped; cloning is cheaper then.
const MISSED_COMMANDS: usize = 4096;

#[derive(Default)]
pub(super) struct Replica {
    front: Arc<State>,
    back: Option<Arc<State>>,
    /// What `front` has applied and `back` has not.
    missed: Vec<Command>,
}

impl Replica {
    pub fn new(state: State) -> Self {
        Self { front: Arc::new(state), back: None, missed: Vec::new() }
    }

    /// The published state.
    pub fn front(&self) -> Arc<State> {
        Arc::clone(&self.front)
    }

    /// Applies a batch and publishes the result as the new front.
    pub fn apply(&mut self, commands: Vec<Command>) -> Vec<Outcome> {
        if commands.is_empty() {
            return Vec::new();
        }
        let mut next = self.take_back();
        // `take_back` hands out a copy that nobody else has, so this never clones.
        let state = Arc::make_mut(&mut next);
        let outcomes = commands.iter().map(|command| state.apply(command.clone())).collect();
        self.missed = commands;
        self.back = Some(std::mem::replace(&mut self.front, next));
        if self.missed.len() > MISSED_COMMANDS {
            self.back = None;
        }
        outcomes
    }

    /// An unshared state that equals the front.
    fn take_back(&mut self) -> Arc<State> {
        let missed = std::mem::take(&mut self.missed);
        if let Some(mut back) = self.back.take()
            && let Some(state) = Arc::get_mut(&mut back)
        {
            for command in missed {
                state.apply(command);
            }
            return back;
        }
        Arc::new(State::clone(&self.front))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::command;

    #[test]
    fn both_copies_stay_the_same_whether_or_not_readers_hold_one() {
        let mut replica = Replica::default();
        let mut plain = State::default();
        let mut held = Vec::new();
        for round in 0..40_u64 {
            let batch: Vec<_> = (0..round % 5).map(|n| command(round * 10 + n)).collect();
            let expected: Vec<_> = batch.iter().map(|c| plain.apply(c.clone())).collect();
            assert_eq!(replica.apply(batch), expected);
            assert_eq!(*replica.front(), plain);
            if round % 3 == 0 {
                held.push(replica.front());
            }
        }
    }

    #[test]
    fn without_readers_the_two_copies_take_turns() {
        let mut replica = Replica::default();
        replica.apply(vec![command(0)]);
        let first = Arc::as_ptr(&replica.front());
        replica.apply(vec![command(1)]);
        assert_ne!(Arc::as_ptr(&replica.front()), first);
        replica.apply(vec![command(2)]);
        assert_eq!(Arc::as_ptr(&replica.front()), first);
    }
}
