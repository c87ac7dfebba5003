//! What callers were told, held against what the log turned out to be.
//!
//! Each command carries its number as its time, and the state keeps the times of its last commands as
//! events in the order of the log. So every state that is looked at shows the one order, and a write
//! or a read that does not fit into it in real time is found.

use std::collections::BTreeMap;

use crate::StateView;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Told {
    Nothing,
    /// It was acknowledged; the clock of that moment.
    Done(u64),
    /// It was refused, and nothing was done.
    Refused,
}

struct Write {
    called: u64,
    told: Told,
}

/// Times here are a counter that grows with every call and every answer.
#[derive(Default)]
pub struct History {
    clock: u64,
    writes: BTreeMap<u64, Write>,
    /// Who confirmed a leadership, by its term.
    leaders: BTreeMap<u64, u64>,
    /// The state as of each entry, by the first view of it.
    states: BTreeMap<u64, u64>,
    pub acknowledged: u64,
    pub unknown: u64,
    pub refused: u64,
    pub reads: u64,
}

impl History {
    pub fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write begins; its number.
    pub fn called(&mut self) -> u64 {
        let (called, number) = (self.now(), self.writes.len() as u64 + 1);
        self.writes.insert(number, Write { called, told: Told::Nothing });
        number
    }

    pub fn done(&mut self, number: u64) {
        let now = self.now();
        self.acknowledged += 1;
        self.writes.get_mut(&number).unwrap().told = Told::Done(now);
    }

    pub fn nothing_done(&mut self, number: u64) {
        self.refused += 1;
        self.writes.get_mut(&number).unwrap().told = Told::Refused;
    }

    /// A quorum confirmed a leadership to this controller.
    pub fn led(&mut self, term: u64, controller: u64) {
        let first = *self.leaders.entry(term).or_insert(controller);
        assert_eq!(first, controller, "two controllers lead in term {term}");
    }

    /// A read that was asked at this time has seen a view.
    pub fn read(&mut self, asked: u64, view: &StateView) {
        self.reads += 1;
        self.look(view);
        let order = order(view);
        for (number, write) in &self.writes {
            if let Told::Done(at) = write.told
                && at < asked
            {
                let there = order.contains_key(number);
                assert!(
                    there,
                    "a read does not see write {number}, acknowledged before it was asked"
                );
            }
        }
    }

    /// Whatever a controller shows, stale or not, is a state that the log had.
    pub fn look(&mut self, view: &StateView) {
        let order = order(view);
        let digest = order.keys().chain(order.values()).fold(7, |digest: u64, number| {
            (digest ^ number).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(17)
        });
        let index = view.last_applied.map_or(0, |at| at.index);
        let known = *self.states.entry(index).or_insert(digest);
        assert_eq!(known, digest, "two controllers have different states as of entry {index}");
        for number in order.keys() {
            let told = self.writes[number].told;
            assert_ne!(told, Told::Refused, "write {number} was told not to be done, and was");
        }
    }

    /// The last view of all: everything acknowledged is in it, in an order that agrees with time.
    pub fn finish(&mut self, view: &StateView) {
        let asked = self.now();
        self.read(asked, view);
        let by_place: BTreeMap<u64, u64> =
            order(view).into_iter().map(|(number, place)| (place, number)).collect();
        // No write may stand before one that had been acknowledged when it was called.
        let mut called_last = 0;
        for number in by_place.values() {
            let write = &self.writes[number];
            if let Told::Done(at) = write.told {
                assert!(at > called_last, "write {number} stands behind one that was called later");
            }
            called_last = called_last.max(write.called);
        }
    }
}

/// The numbers that a state has applied, each with its place in the log's order.
fn order(view: &StateView) -> BTreeMap<u64, u64> {
    let events = view.state.events.iter();
    let order: BTreeMap<u64, u64> = events.map(|event| (event.at, event.seq)).collect();
    assert_eq!(order.len(), view.state.events.len(), "a write was applied twice");
    order
}
