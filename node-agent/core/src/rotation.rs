//! Which controller to ask next, and how long to wait before.

use std::time::Duration;

/// The first pause after a whole round of controllers has failed.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Pauses double up to this: short, because a new leader is elected within a second or two.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Goes round the known controllers. It stays with one that answers; after a failure it takes the
/// next at once, and pauses only when all of them have failed in a row.
#[derive(Clone, Debug)]
pub struct Rotation<T> {
    controllers: Vec<T>,
    next: usize,
    failures: u32,
}

impl<T: PartialEq> Rotation<T> {
    pub fn new(controllers: Vec<T>) -> Self {
        Self { controllers, next: 0, failures: 0 }
    }

    /// The controller to ask now, or none when none is known.
    pub fn current(&self) -> Option<&T> {
        self.controllers.get(self.next)
    }

    /// Replaces the known controllers. An empty list is never believed: it would leave the node
    /// with nobody to ask.
    pub fn learn(&mut self, controllers: Vec<T>) {
        if controllers.is_empty() || controllers == self.controllers {
            return;
        }
        let kept = self.current().and_then(|now| controllers.iter().position(|c| c == now));
        self.next = kept.unwrap_or(0);
        self.controllers = controllers;
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// The current controller failed; the answer is how long to wait before the next is asked.
    pub fn failed(&mut self) -> Duration {
        let count = self.controllers.len().max(1);
        self.next = (self.next + 1) % count;
        self.failures = self.failures.saturating_add(1);
        let rounds = self.failures as usize / count;
        if !(self.failures as usize).is_multiple_of(count) {
            return Duration::ZERO;
        }
        let doublings = u32::try_from(rounds.saturating_sub(1).min(8)).unwrap_or(8);
        (BACKOFF_MIN * 2_u32.pow(doublings)).min(BACKOFF_MAX)
    }

    pub fn controllers(&self) -> &[T] {
        &self.controllers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_controller_is_asked_before_the_first_pause() {
        let mut rotation = Rotation::new(vec!["a", "b", "c"]);
        assert_eq!(rotation.failed(), Duration::ZERO);
        assert_eq!(rotation.failed(), Duration::ZERO);
        assert_eq!(rotation.failed(), BACKOFF_MIN);
        assert_eq!(rotation.current(), Some(&"a"));
    }

    #[test]
    fn pauses_are_bounded_and_forgotten_on_success() {
        let mut rotation = Rotation::new(vec!["a"]);
        for _ in 0..100 {
            assert!(rotation.failed() <= BACKOFF_MAX);
        }
        assert_eq!(rotation.failed(), BACKOFF_MAX);
        rotation.succeeded();
        assert_eq!(rotation.failed(), BACKOFF_MIN);
    }

    #[test]
    fn an_empty_list_is_not_believed() {
        let mut rotation = Rotation::new(vec!["a", "b"]);
        rotation.failed();
        rotation.learn(vec![]);
        assert_eq!(rotation.current(), Some(&"b"));
        rotation.learn(vec!["b", "c"]);
        assert_eq!(rotation.current(), Some(&"b"));
    }
}
