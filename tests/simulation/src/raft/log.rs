//! The log in a controller's memory: what is where, what fits, what a snapshot stands for.

use std::rc::Rc;

use bellwether_core::State;

use super::{Core, Entry, Role, SNAPSHOT_ENTRIES, Snapshot};

/// Entries for a follower, and what they are to follow.
pub(super) struct Batch {
    pub previous: (u64, u64),
    pub entries: Vec<Entry>,
    pub commit: u64,
    pub round: u64,
}

impl Core {
    pub(super) fn is(&self, role: Role, term: u64) -> bool {
        self.role == role && self.image.term == term
    }

    pub(super) fn base(&self) -> (u64, u64) {
        self.image.snapshot.as_ref().map_or((0, 0), |snapshot| (snapshot.index, snapshot.term))
    }

    /// Index and term of the last entry.
    pub(super) fn last(&self) -> (u64, u64) {
        let (base, base_term) = self.base();
        let term = self.image.log.last().map_or(base_term, |entry| entry.term);
        (base + self.image.log.len() as u64, term)
    }

    pub(super) fn place(&self, index: u64) -> Option<usize> {
        usize::try_from(index.checked_sub(self.base().0 + 1)?).ok()
    }

    pub(super) fn entry(&self, index: u64) -> Option<&Entry> {
        self.image.log.get(self.place(index)?)
    }

    pub(super) fn term_at(&self, index: u64) -> Option<u64> {
        let (base, term) = self.base();
        match index == base {
            true => Some(term),
            false => self.entry(index).map(|entry| entry.term),
        }
    }

    pub(super) fn entries_from(&self, index: u64) -> Vec<Entry> {
        let from = self.place(index).unwrap_or(0).min(self.image.log.len());
        self.image.log[from..].to_vec()
    }

    /// Takes entries in. Answers up to where the log now agrees, and whether it changed; nothing if
    /// it does not fit to what is here.
    pub(super) fn take(&mut self, batch: &Batch) -> Option<(u64, bool)> {
        let (previous, term) = batch.previous;
        let base = self.base().0;
        // What a snapshot covers is committed, so it agrees.
        if previous >= base && self.term_at(previous) != Some(term) {
            return None;
        }
        let mut changed = false;
        for (index, entry) in (previous + 1..).zip(&batch.entries) {
            if index <= base {
                continue;
            }
            match self.term_at(index) {
                Some(term) if term == entry.term => {}
                known => {
                    if known.is_some() {
                        let keep = self.place(index).unwrap_or(0);
                        self.image.log.truncate(keep);
                    }
                    self.image.log.push(entry.clone());
                    changed = true;
                }
            }
        }
        Some(((previous + batch.entries.len() as u64).max(base), changed))
    }

    /// Replaces a long log by the state that it led to.
    pub(super) fn compact(&mut self) -> bool {
        let base = self.base().0;
        let covered = usize::try_from(self.applied - base).unwrap_or(0);
        let term = self.term_at(self.applied).filter(|_| covered >= SNAPSHOT_ENTRIES);
        let Some(term) = term else { return false };
        let image: Rc<[u8]> = encode(&self.state).into();
        debug_assert_eq!(decode(&image), *self.state, "a snapshot must be the state");
        self.image.log.drain(..covered);
        self.image.snapshot = Some(Snapshot { index: self.applied, term, image });
        true
    }
}

fn encode(state: &State) -> Vec<u8> {
    match postcard::to_allocvec(state) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("a state that cannot be encoded: {error}"),
    }
}

pub(super) fn decode(bytes: &[u8]) -> State {
    match postcard::from_bytes(bytes) {
        Ok(state) => state,
        Err(error) => unreachable!("a snapshot that cannot be read: {error}"),
    }
}
