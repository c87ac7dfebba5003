//! The journal on a guest's disk, as the storage host has it: is every acknowledged record there,
//! and did nobody write who was no longer allowed to?
//!
//! Each record names the one before it by its checksum (`tests/guest/src/journal_format.rs`). A
//! guest that writes although a newer one has begun overwrites a record that the newer one's
//! next record names, so the chain is broken there. What the chain cannot show is a write over
//! the newest record; the count of acknowledged records does, unless both are of one number.

use std::collections::BTreeMap;
use std::fmt;

/// The guest's own source: the two can never disagree about the format.
#[path = "../../guest/src/journal_format.rs"]
#[allow(dead_code, reason = "the guest encodes, this side only decodes")]
mod journal_format;

use journal_format::{BadRecord, Record, SECTOR_BYTES, checksum, decode};

/// What a scan found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Journal {
    pub records: u64,
    pub last: u64,
    /// Boots of the guest that wrote what is there.
    pub boots: u64,
    pub faults: Vec<Fault>,
}

/// What must not be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// A sector that holds neither zeros nor the record that belongs there.
    Bad {
        sector: u64,
    },
    Missing {
        seq: u64,
    },
    /// This record names another one before it than the one that is there.
    Broken {
        seq: u64,
        boot: u64,
        boot_before: u64,
    },
    /// A record of an older boot follows one of a newer boot.
    Older {
        seq: u64,
        boot: u64,
        boot_before: u64,
    },
    /// The guest was told that this record is durable.
    Lost {
        acknowledged: u64,
        last: u64,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bad { sector } => write!(f, "sector {sector} holds no record"),
            Self::Missing { seq } => write!(f, "record {seq} is missing"),
            Self::Broken { seq, boot, boot_before } => write!(
                f,
                "record {seq} (boot {boot}) was not written after the record {} (boot {boot_before}) that is there: \
                 two wrote",
                seq - 1
            ),
            Self::Older { seq, boot, boot_before } => {
                write!(
                    f,
                    "record {seq} is of boot {boot}, and the one before of boot {boot_before}"
                )
            }
            Self::Lost { acknowledged, last } => {
                write!(f, "record {acknowledged} was acknowledged, and the last one is {last}")
            }
        }
    }
}

impl Journal {
    /// Judges the first sectors of a disk; `acknowledged` is the newest record that the guest
    /// printed as durable.
    pub fn judge(sectors: &[u8], acknowledged: u64) -> Self {
        let (sectors, _) = sectors.as_chunks::<SECTOR_BYTES>();
        let mut found = BTreeMap::new();
        let mut journal = Self::default();
        for (at, bytes) in (0..).zip(sectors) {
            match decode(bytes) {
                Ok(record) if record.seq % sectors.len() as u64 == at => {
                    found.insert(record.seq, (record, checksum(bytes)));
                }
                Err(BadRecord::Blank) => {}
                _ => journal.faults.push(Fault::Bad { sector: at }),
            }
        }
        journal.records = found.len() as u64;
        journal.judge_records(&found, sectors.len() as u64);
        if acknowledged > journal.last {
            journal.faults.push(Fault::Lost { acknowledged, last: journal.last });
        }
        journal
    }

    fn judge_records(&mut self, found: &BTreeMap<u64, (Record, u64)>, usable: u64) {
        let Some((&last, (newest, _))) = found.last_key_value() else { return };
        self.last = last;
        self.boots = newest.boot;
        let first = last.saturating_sub(usable.saturating_sub(1)).max(1);
        for seq in first..=last {
            let Some((record, _)) = found.get(&seq) else {
                self.faults.push(Fault::Missing { seq });
                continue;
            };
            let Some((before, sum)) = found.get(&(seq - 1)) else { continue };
            let (boot, boot_before) = (record.boot, before.boot);
            if record.previous != *sum {
                self.faults.push(Fault::Broken { seq, boot, boot_before });
            }
            if boot < boot_before {
                self.faults.push(Fault::Older { seq, boot, boot_before });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USABLE: u64 = 16;

    #[derive(Clone)]
    struct Disk(Vec<u8>);

    impl Disk {
        fn with(records: std::ops::RangeInclusive<u64>, boot: u64) -> Self {
            let mut disk = Self(vec![0; USABLE as usize * SECTOR_BYTES]);
            disk.append(records, boot);
            disk
        }

        fn sector(&mut self, seq: u64) -> &mut [u8; SECTOR_BYTES] {
            &mut self.0.as_chunks_mut::<SECTOR_BYTES>().0[(seq % USABLE) as usize]
        }

        fn append(&mut self, records: std::ops::RangeInclusive<u64>, boot: u64) {
            for seq in records {
                let before = *self.sector(seq.wrapping_sub(1));
                let previous = if seq == 1 { 0 } else { checksum(&before) };
                let record = Record { seq, ns: seq * 10 + boot, seed: 1, boot, previous };
                *self.sector(seq) = journal_format::encode(&record);
            }
        }
    }

    #[test]
    fn a_chain_over_two_boots_and_the_end_of_the_journal_is_good() {
        let mut disk = Disk::with(1..=10, 1);
        disk.append(11..=20, 2);
        let journal = Journal::judge(&disk.0, 20);
        assert_eq!((journal.records, journal.last, journal.boots), (16, 20, 2));
        assert_eq!(journal.faults, []);
    }

    #[test]
    fn an_old_guest_that_wrote_once_more_is_found() {
        let mut disk = Disk::with(1..=5, 1);
        let mut old = disk.clone();
        disk.append(6..=9, 2);
        // The old one thaws and writes its next record, over the first one of the new guest.
        old.append(6..=6, 1);
        *disk.sector(6) = *old.sector(6);
        let journal = Journal::judge(&disk.0, 9);
        assert_eq!(journal.faults, [Fault::Broken { seq: 7, boot: 2, boot_before: 1 }]);
    }

    #[test]
    fn an_old_guest_that_went_on_and_on_is_found() {
        let mut disk = Disk::with(1..=5, 1);
        let mut old = disk.clone();
        disk.append(6..=7, 2);
        old.append(6..=9, 1);
        for seq in 8..=9 {
            *disk.sector(seq) = *old.sector(seq);
        }
        let journal = Journal::judge(&disk.0, 7);
        let broken = Fault::Broken { seq: 8, boot: 1, boot_before: 2 };
        let older = Fault::Older { seq: 8, boot: 1, boot_before: 2 };
        assert_eq!(journal.faults, [broken, older]);
    }

    #[test]
    fn what_is_lost_or_damaged_is_found() {
        let mut disk = Disk::with(1..=5, 1);
        disk.sector(3)[100] ^= 1;
        let journal = Journal::judge(&disk.0, 7);
        let expected = [
            Fault::Bad { sector: 3 },
            Fault::Missing { seq: 3 },
            Fault::Lost { acknowledged: 7, last: 5 },
        ];
        assert_eq!(journal.faults, expected);
    }
}
