//! The journal on the guest's disk, read from outside: is every acknowledged record there?

use std::path::Path;

use anyhow::{Context, Result};

/// The guest's own source: the two can never disagree about the format.
#[path = "../../guest/src/journal_format.rs"]
#[allow(dead_code, reason = "the guest encodes, this side only decodes")]
mod journal_format;

use journal_format::{BadRecord, Record, SECTOR_BYTES, decode};

/// The guest's default for `journal_sectors`.
const JOURNAL_SECTORS: u64 = 8192;

/// What a scan of the raw disk found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Journal {
    pub records: u64,
    pub last: u64,
    /// Sectors that hold neither zeros nor the record that belongs there.
    pub bad: u64,
    /// Numbers of records that must be there and are not.
    pub holes: Vec<u64>,
    /// The numbers of the records that are there.
    seqs: std::collections::BTreeSet<u64>,
}

impl Journal {
    /// Scans a raw disk. A running guest may write meanwhile: then the newest record may be torn.
    pub fn scan(disk: &Path) -> Result<Self> {
        let bytes = std::fs::read(disk).with_context(|| format!("read disk {}", disk.display()))?;
        let (sectors, _) = bytes.as_chunks::<SECTOR_BYTES>();
        let usable = JOURNAL_SECTORS.min(sectors.len() as u64);
        let mut journal = Self::default();
        for (sector, bytes) in (0..usable).zip(sectors) {
            journal.take(sector, usable, decode(bytes));
        }
        let first = journal.last.saturating_sub(usable.saturating_sub(1)).max(1);
        journal.holes = (first..=journal.last).filter(|seq| !journal.seqs.contains(seq)).collect();
        Ok(journal)
    }

    fn take(&mut self, sector: u64, usable: u64, record: Result<Record, BadRecord>) {
        match record {
            Ok(record) if record.seq % usable == sector => {
                self.records += 1;
                self.last = self.last.max(record.seq);
                self.seqs.insert(record.seq);
            }
            Err(BadRecord::Blank) => {}
            _ => self.bad += 1,
        }
    }

    /// How many of the records up to `acknowledged` are not on the disk.
    pub fn lost(&self, acknowledged: u64) -> u64 {
        let holes = self.holes.iter().filter(|seq| **seq <= acknowledged).count() as u64;
        holes + acknowledged.saturating_sub(self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(seqs: &[u64], sectors: u64) -> (tempfile_path::TempPath, Journal) {
        let path = tempfile_path::TempPath::new();
        let mut bytes = vec![0; sectors as usize * SECTOR_BYTES];
        for &seq in seqs {
            let at = (seq % sectors) as usize * SECTOR_BYTES;
            let record = Record { seq, ns: 1, seed: 1, boot: 1, previous: 0 };
            bytes[at..at + SECTOR_BYTES].copy_from_slice(&journal_format::encode(&record));
        }
        std::fs::write(&path.0, bytes).unwrap();
        let journal = Journal::scan(&path.0).unwrap();
        (path, journal)
    }

    /// A file name in the temporary directory that is removed at the end.
    mod tempfile_path {
        pub struct TempPath(pub std::path::PathBuf);

        impl TempPath {
            pub fn new() -> Self {
                let name = format!("bw-journal-{}", uuid::Uuid::new_v4());
                Self(std::env::temp_dir().join(name))
            }
        }

        impl Drop for TempPath {
            fn drop(&mut self) {
                let _ = std::fs::remove_file(&self.0);
            }
        }
    }

    #[test]
    fn lost_records_are_counted() {
        let (_path, journal) = disk(&[1, 2, 4, 5], 16);
        assert_eq!((journal.records, journal.last, journal.bad), (4, 5, 0));
        assert_eq!(journal.holes, [3]);
        assert_eq!(journal.lost(2), 0);
        assert_eq!(journal.lost(5), 1);
        assert_eq!(journal.lost(7), 3);
    }

    #[test]
    fn a_journal_that_wrapped_around_has_no_holes() {
        let seqs: Vec<u64> = (5..=20).collect();
        let (_path, journal) = disk(&seqs, 16);
        assert_eq!((journal.records, journal.last), (16, 20));
        assert_eq!(journal.lost(20), 0);
    }
}
