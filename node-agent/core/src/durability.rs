//! What has to be on the disk of this boot before something is done, told or asked for.
//!
//! | before | what |
//! |---|---|
//! | an order is looked at | its term, if it is the highest that this node heard of ([`Terms`]) |
//! | an order is carried out | the floor, if it has risen; a release makes it durable before it *answers* |
//! | anything is answered | the floor, the last release and the last seal ([`Saved`]) |
//! | a VMM hears of a start or a load | the incarnation's record ([`Action::needs_record`]) |
//!
//! Pure: these say what is due; the shell writes, and notes it here when it is safe.

use crate::machine::Durable;
use crate::order::Action;

/// What of one VM's machine is on the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Saved(Durable);

impl Saved {
    /// As the disk has it.
    pub fn new(on_disk: Durable) -> Self {
        Self(on_disk)
    }

    /// Whether there is something to write. A raised term alone is durable already, for the node.
    pub fn is_due(&self, durable: &Durable) -> bool {
        *durable != Durable { term: durable.term, ..self.0.clone() }
    }

    /// Whether that has to be done before the action begins. A release raises the floor too, but
    /// makes it durable only before it answers: somebody may be waiting for the locks that the VMM
    /// lets go, and the sync takes milliseconds.
    pub fn is_due_before(&self, durable: &Durable, action: &Action) -> bool {
        *action != Action::Release && self.is_due(durable)
    }

    /// It is on the disk now.
    pub fn note(&mut self, durable: &Durable) {
        self.0 = durable.clone();
    }
}

/// The highest term of a leader that this node has heard of, from orders about any VM and from
/// renewals. A leader of a lower term is deposed, and its orders, however late, are not obeyed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Terms {
    highest: u64,
    /// What of it is on the disk.
    saved: u64,
}

impl Terms {
    /// Goes on where an earlier agent ended.
    pub fn new(on_disk: u64) -> Self {
        Self { highest: on_disk, saved: on_disk }
    }

    /// Takes in a term. Answers what has to be written before it is acted upon; it counts at once.
    pub fn hear(&mut self, term: u64) -> Option<u64> {
        self.highest = self.highest.max(term);
        (self.highest > self.saved).then_some(self.highest)
    }

    /// It is on the disk now.
    pub fn note(&mut self, term: u64) {
        self.saved = self.saved.max(term);
    }

    pub fn highest(&self) -> u64 {
        self.highest
    }
}

impl Action {
    /// Whether a later agent must know of it, so that the VMM is asked only after the record is
    /// written: that the guest may have run, and which file may be loaded.
    pub fn needs_record(&self) -> bool {
        matches!(self, Self::Start | Self::ClaimBack | Self::Load)
    }
}

#[cfg(test)]
mod tests {
    use bellwether_types::Epoch;

    use super::*;

    #[test]
    fn a_floor_is_due_at_once_and_a_term_alone_is_not() {
        let mut saved = Saved::new(Durable::default());
        let term = Durable { term: 4, ..Durable::default() };
        assert!(!saved.is_due(&term));
        let floor = Durable { floor: Epoch(3), ..term };
        assert!(saved.is_due(&floor) && saved.is_due_before(&floor, &Action::Save));
        assert!(!saved.is_due_before(&floor, &Action::Release));
        saved.note(&floor);
        assert!(!saved.is_due(&floor));
    }

    #[test]
    fn a_term_is_due_until_it_is_written() {
        let mut terms = Terms::new(3);
        assert_eq!((terms.hear(2), terms.highest()), (None, 3));
        assert_eq!((terms.hear(5), terms.highest()), (Some(5), 5));
        assert_eq!(terms.hear(4), Some(5));
        terms.note(5);
        assert_eq!(terms.hear(5), None);
    }
}
