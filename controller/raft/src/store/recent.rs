//! The end of the log in memory: what is not on disk yet, and a little of what is.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::types::Entry;

/// How much of what is on disk stays in memory, for replication and for applying.
const KEPT_ENTRIES: usize = 2048;
const KEPT_BYTES: usize = 8 << 20;

/// Entries by index, without a hole, up to the last entry of the log.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    entries: BTreeMap<u64, (Entry, usize)>,
    bytes: usize,
    /// Entries below this index are on disk, so they may be forgotten.
    durable_end: u64,
}

impl Recent {
    pub fn push(&mut self, entry: Entry, size: usize) {
        self.bytes += size;
        if let Some((_, old)) = self.entries.insert(entry.log_id.index, (entry, size)) {
            self.bytes -= old;
        }
    }

    /// The entries up to `last` are on disk.
    pub fn mark_durable(&mut self, last: u64) {
        self.durable_end = self.durable_end.max(last + 1);
        while self.entries.len() > KEPT_ENTRIES || self.bytes > KEPT_BYTES {
            match self.entries.first_key_value() {
                Some((index, _)) if *index < self.durable_end => self.pop_first(),
                _ => break,
            }
        }
    }

    fn pop_first(&mut self) {
        if let Some((_, (_, size))) = self.entries.pop_first() {
            self.bytes -= size;
        }
    }

    /// Forgets the entries from `first` on, because the log no longer has them.
    pub fn truncate(&mut self, first: u64) {
        for (_, size) in self.entries.split_off(&first).into_values() {
            self.bytes -= size;
        }
        self.durable_end = self.durable_end.min(first);
    }

    /// Forgets the entries up to `last`, because the log no longer has them.
    pub fn purge(&mut self, last: u64) {
        while self.entries.first_key_value().is_some_and(|(index, _)| *index <= last) {
            self.pop_first();
        }
    }

    /// Where this memory begins; entries below are on disk alone.
    pub fn first(&self) -> Option<u64> {
        self.entries.first_key_value().map(|(index, _)| *index)
    }

    /// The entries of a range that are in memory.
    pub fn range(&self, range: Range<u64>) -> Vec<(Entry, usize)> {
        if range.is_empty() {
            return Vec::new();
        }
        self.entries.range(range).map(|(_, entry)| entry.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::blank;

    #[test]
    fn what_is_not_on_disk_is_never_forgotten() {
        let mut recent = Recent::default();
        let end = 3 * KEPT_ENTRIES as u64;
        for index in 0..end {
            recent.push(blank(1, index), 10);
        }
        assert_eq!(recent.first(), Some(0));
        recent.mark_durable(99);
        assert_eq!(recent.first(), Some(100));
        recent.mark_durable(end - 1);
        assert_eq!(recent.first(), Some(end - KEPT_ENTRIES as u64));
    }

    #[test]
    fn truncated_entries_are_not_durable_any_more() {
        let mut recent = Recent::default();
        for index in 0..10 {
            recent.push(blank(1, index), KEPT_BYTES / 4);
        }
        recent.mark_durable(9);
        recent.truncate(7);
        for index in 7..20 {
            recent.push(blank(2, index), KEPT_BYTES / 4);
        }
        recent.mark_durable(6);
        assert_eq!(recent.first(), Some(7));
    }
}
