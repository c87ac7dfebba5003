//! What an agent's error means for the task on whose behalf it was asked. Pure: the shell reads the
//! [`Kind`] off the status of the answer.

use crate::task::{Retry, StepEvent};

/// What an error says about the order that it answers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// Nothing: it may have been carried out, or may still be.
    Silent,
    /// The guest has not run under the order's epoch, and never will.
    NeverRan,
    /// What was asked for is at fault, whichever node is asked.
    Unfit,
    /// This node did not do it.
    Refused,
}

/// Why an order has no result that moves the task on by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// It was not carried out.
    Refused { error: String, retry: Retry },
    /// It may have been carried out; it has to be given again.
    Unknown(String),
}

/// After an order that lets no guest run.
pub fn failure(kind: Kind, error: String) -> Failure {
    match kind {
        Kind::Silent => Failure::Unknown(error),
        Kind::Unfit => Failure::Refused { error, retry: Retry::Never },
        Kind::NeverRan | Kind::Refused => Failure::Refused { error, retry: Retry::OtherNode },
    }
}

/// After an order that lets the guest run, only one error says that it has not run.
pub fn uncertain(kind: Kind, error: String) -> Result<StepEvent, Failure> {
    match kind {
        Kind::NeverRan => Err(Failure::Refused { error, retry: Retry::OtherNode }),
        Kind::Silent => Err(failure(kind, error)),
        Kind::Unfit | Kind::Refused => Ok(StepEvent::TimedOut),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_never_a_failure() {
        assert_eq!(failure(Kind::Silent, "e".into()), Failure::Unknown("e".into()));
        assert_eq!(uncertain(Kind::Silent, "e".into()), Err(Failure::Unknown("e".into())));
    }

    #[test]
    fn only_never_ran_says_that_a_guest_has_not_run() {
        assert!(matches!(uncertain(Kind::NeverRan, String::new()), Err(Failure::Refused { .. })));
        for kind in [Kind::Unfit, Kind::Refused] {
            assert_eq!(uncertain(kind, String::new()), Ok(StepEvent::TimedOut));
        }
    }
}
