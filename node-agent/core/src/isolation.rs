//! What a node makes of it when no controller answers it: is there no quorum, or is it alone cut off?
//!
//! Every node writes a heartbeat onto the shared storage. It carries the last [`Pulse`] that the node
//! heard: the leader's stamp of a renewal that a quorum had confirmed. So a pulse that advances in
//! *somebody's* heartbeat proves that a quorum lives and talks to that node. Whoever hears no
//! controller and still sees pulses advance knows that it alone is cut off.
//!
//! ```text
//!            contact is older than the lease              a pulse advanced since
//!  InTouch ---------------------------------> NoQuorum ----------------------------> CutOff(since)
//!     ^                                          ^  none for STALE                        |
//!     |<-------- contact ------------------------+----------------------------------------+
//!                   storage does not answer: Blind, until it answers again
//! ```
//!
//! A node that is cut off for long enough hands its VMs over (docs/adr/0014). Nothing here makes that
//! safe: the seal, the claim's record and the claim's lock do. A wrong verdict costs an outage.

use serde::{Deserialize, Serialize};

use crate::lease::Stamp;

/// A pulse that has not advanced for so long is no sign of a living quorum, nanoseconds.
const STALE_NS: u64 = 15_000_000_000;

/// A leader's word that a quorum has just confirmed it. Of two the later one is greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct Pulse {
    pub term: u64,
    /// The leader's clock, milliseconds; it means something only beside others of its term.
    pub ms: u64,
}

/// What the node sees of the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// A controller has answered within the lease.
    InTouch,
    /// No controller answers, and the storage does not either.
    Blind,
    /// No controller answers, and nobody's heartbeat shows that one answers others.
    NoQuorum,
    /// No controller answers this node, but a quorum lives and answers others.
    CutOff { for_ns: u64 },
}

/// The judge. It is asked again and again, with what was last seen.
#[derive(Clone, Debug, Default)]
pub struct Isolation {
    /// The highest pulse in anybody else's heartbeat.
    seen: Option<Pulse>,
    /// When it advanced under our eyes: at first, and at last.
    advancing: Option<(Stamp, Stamp)>,
}

impl Isolation {
    /// `contact` is the last answer of a controller, `silent_ns` how old it may be. `pulse` is the
    /// highest in the heartbeats of the others; an error if the storage did not answer.
    pub fn look(
        &mut self,
        now: Stamp,
        contact: Option<Stamp>,
        silent_ns: u64,
        pulse: Result<Option<Pulse>, ()>,
    ) -> Verdict {
        if contact.is_some_and(|at| now.since(&at) < silent_ns) {
            *self = Self::default();
            return Verdict::InTouch;
        }
        let Ok(pulse) = pulse else {
            // What was not seen did not advance; and whoever cannot write cannot hand over.
            *self = Self::default();
            return Verdict::Blind;
        };
        if pulse > self.seen {
            // The first look only shows what there was before.
            if self.seen.is_some() {
                let first = self.advancing.map_or(now, |(first, _)| first);
                self.advancing = Some((first, now));
            }
            self.seen = pulse;
        }
        self.advancing = self.advancing.filter(|(_, last)| now.since(last) < STALE_NS);
        match self.advancing {
            Some((first, _)) => Verdict::CutOff { for_ns: now.since(&first) },
            None => Verdict::NoQuorum,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const SILENT: u64 = 3 * SECOND;

    fn at(seconds: u64) -> Stamp {
        Stamp { boot_ns: seconds * SECOND, raw_ns: seconds * SECOND }
    }

    fn pulse(term: u64, ms: u64) -> Result<Option<Pulse>, ()> {
        Ok(Some(Pulse { term, ms }))
    }

    #[test]
    fn only_a_pulse_that_advances_shows_a_quorum() {
        let mut isolation = Isolation::default();
        let mut look = |now, pulse| isolation.look(at(now), Some(at(0)), SILENT, pulse);
        assert_eq!(look(2, pulse(1, 1)), Verdict::InTouch);
        assert_eq!(look(3, pulse(1, 7)), Verdict::NoQuorum, "that may be from before");
        assert_eq!(look(4, pulse(1, 7)), Verdict::NoQuorum);
        assert_eq!(look(5, pulse(1, 8)), Verdict::CutOff { for_ns: 0 });
        assert_eq!(look(9, pulse(2, 1)), Verdict::CutOff { for_ns: 4 * SECOND }, "a later term");
        assert_eq!(look(10, pulse(1, 9)), Verdict::CutOff { for_ns: 5 * SECOND });
        assert_eq!(look(23, pulse(1, 99)), Verdict::CutOff { for_ns: 18 * SECOND });
        assert_eq!(look(24, pulse(2, 1)), Verdict::NoQuorum, "an older term is no news");
        assert_eq!(look(25, pulse(2, 2)), Verdict::CutOff { for_ns: 0 }, "it counts anew");
    }

    #[test]
    fn contact_and_silent_storage_begin_it_anew() {
        let mut isolation = Isolation::default();
        let look = |isolation: &mut Isolation, now, contact, pulse| {
            isolation.look(at(now), contact, SILENT, pulse)
        };
        look(&mut isolation, 3, None, pulse(1, 1));
        assert_eq!(look(&mut isolation, 4, None, pulse(1, 2)), Verdict::CutOff { for_ns: 0 });
        assert_eq!(look(&mut isolation, 5, None, Err(())), Verdict::Blind);
        assert_eq!(look(&mut isolation, 6, None, pulse(1, 3)), Verdict::NoQuorum);
        assert_eq!(look(&mut isolation, 7, None, pulse(1, 4)), Verdict::CutOff { for_ns: 0 });
        assert_eq!(look(&mut isolation, 8, Some(at(8)), pulse(1, 5)), Verdict::InTouch);
        assert_eq!(look(&mut isolation, 12, Some(at(8)), pulse(1, 6)), Verdict::NoQuorum);
        assert_eq!(look(&mut isolation, 13, Some(at(8)), Ok(None)), Verdict::NoQuorum);
    }
}
