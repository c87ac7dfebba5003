//! What is known about a call that did not succeed: was it carried out?
//!
//! ```text
//!  connect --no--> NotConnected, ServerRefused     nothing was sent
//!     |
//!  send ---no--> ClientRefused (TLS)               nothing was read
//!     |
//!  answer --no--> Lost                             unknown
//!     |
//!  a status: marked "not started" -> NotStarted    the peer says that it did nothing
//!            any other            -> Answered      its code says what it did
//! ```

use std::error::Error;

use bellwether_pki::refusal_by_peer;
use tonic::metadata::MetadataValue;
use tonic::{Code, ConnectError, Status};

/// The metadata by which a controller vouches that it has not begun to do what was asked.
const OUTCOME: &str = "bellwether-outcome";
const NOT_STARTED: &str = "not-started";

/// The answer of a controller that cannot do this now and has not begun: another may be asked.
///
/// A bare UNAVAILABLE does not say that. A controller that forwarded a request and lost the answer
/// has one in its hands too, and whoever repeats on it may do a thing twice.
pub fn not_started(reason: impl Into<String>) -> Status {
    let mut status = Status::unavailable(reason);
    status.metadata_mut().insert(OUTCOME, MetadataValue::from_static(NOT_STARTED));
    status
}

/// How far a failed call came.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CallFailure {
    /// There was no connection, so nothing was sent.
    NotConnected(String),
    /// We refused the server's certificate, so nothing was sent.
    ServerRefused(String),
    /// The server refused our certificate, so it read nothing.
    ClientRefused(String),
    /// The peer says that it has not begun.
    NotStarted(String),
    /// The status is the peer's own answer; its code says what it did.
    Answered,
    /// The connection broke after the request was sent: the outcome is unknown.
    Lost(String),
}

impl CallFailure {
    /// Reads it from the status of a call over [`bellwether_pki::connect_channel`].
    pub fn of(status: &Status) -> Self {
        // A status that came over the wire has no source; one that was made here has.
        let Some(cause) = status.source() else { return Self::of_answer(status) };
        let unconnected = chain(cause).any(|error| error.is::<ConnectError>());
        let innermost = || chain(cause).last().map(ToString::to_string).unwrap_or_default();
        match (unconnected, refusal_by_peer(cause)) {
            (true, Some(reason)) => Self::ServerRefused(reason),
            (true, None) => Self::NotConnected(innermost()),
            (false, Some(reason)) => Self::ClientRefused(reason),
            (false, None) => Self::Lost(innermost()),
        }
    }

    fn of_answer(status: &Status) -> Self {
        let marked = status.metadata().get(OUTCOME).is_some_and(|word| word == NOT_STARTED);
        match marked && status.code() == Code::Unavailable {
            true => Self::NotStarted(status.message().to_owned()),
            false => Self::Answered,
        }
    }
}

fn chain<'a>(first: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(first), |error| (**error).source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_marked_status_says_that_nothing_was_done() {
        let marked = not_started("no leader");
        assert_eq!(CallFailure::of(&marked), CallFailure::NotStarted("no leader".into()));
        assert_eq!(CallFailure::of(&Status::unavailable("no leader")), CallFailure::Answered);
    }
}
