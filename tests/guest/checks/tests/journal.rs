//! The journal: the format of a record, and the state machine against a model of a disk.

use bellwether_guest_checks::journal::{
    Config, Event, Journal, Operation, Request, SCAN_SECTORS, Scan,
};
use bellwether_guest_checks::journal_format::{BadRecord, Record, SECTOR_BYTES, checksum, decode};

const OK: u8 = 0;
const IOERR: u8 = 1;
const CONFIG: Config =
    Config { usable: 8, seed: 42, read_only: false, flush: true, interval_ns: 1000 };

fn record(seq: u64) -> Record {
    Record { seq, ns: 0, seed: 42, boot: 1, previous: 0 }
}

fn encode(seq: u64) -> [u8; SECTOR_BYTES] {
    bellwether_guest_checks::journal_format::encode(&record(seq))
}

/// A disk whose requests complete when the test says so.
struct Disk {
    sectors: Vec<[u8; SECTOR_BYTES]>,
}

impl Disk {
    fn blank(sectors: usize) -> Self {
        Self { sectors: vec![[0; SECTOR_BYTES]; sectors] }
    }

    fn with_records(sectors: usize, seqs: std::ops::RangeInclusive<u64>) -> Self {
        let mut disk = Self::blank(sectors);
        for seq in seqs {
            disk.sectors[seq as usize % sectors] = encode(seq);
        }
        disk
    }

    /// Executes a request without error and returns what it read.
    fn execute(&mut self, request: &Request) -> Vec<u8> {
        match *request {
            Request::Read { sector, sectors } => {
                self.sectors[sector as usize..][..sectors as usize].concat()
            }
            Request::Write { sector, data } => {
                self.sectors[sector as usize] = data;
                Vec::new()
            }
            Request::Flush => Vec::new(),
        }
    }

    /// Runs the scan and returns what it found.
    fn scan(&mut self, journal: &mut Journal) -> Scan {
        while let Some(request) = journal.next_request(0) {
            let data = self.execute(&request);
            if let Event::Scanned(scan) = journal.complete(OK, &data) {
                return scan;
            }
        }
        panic!("the scan stopped");
    }

    /// Runs one request and returns what it meant.
    fn step(&mut self, journal: &mut Journal, now: u64) -> Option<Event> {
        let request = journal.next_request(now)?;
        let data = self.execute(&request);
        Some(journal.complete(OK, &data))
    }
}

#[test]
fn a_record_comes_back() {
    assert_eq!(decode(&encode(7)), Ok(record(7)));
}

#[test]
fn the_format_is_what_the_table_says() {
    let record = Record { seq: 0x0102, ns: 3, seed: 4, boot: 5, previous: 6 };
    let sector = bellwether_guest_checks::journal_format::encode(&record);
    assert_eq!(&sector[..8], b"BWJRNL02");
    let words: Vec<u8> = (8..48).step_by(8).map(|at| sector[at]).collect();
    assert_eq!((words, sector[9]), (vec![2, 3, 4, 5, 6], 1));
    // Golden: disks written by an older guest must stay readable.
    assert_eq!(checksum(&sector), GOLDEN_CHECKSUM);
}

const GOLDEN_CHECKSUM: u64 = 0xe629_58f2_0a15_8de4;

#[test]
fn every_flipped_bit_is_noticed() {
    let good = encode(7);
    for bit in 0..SECTOR_BYTES * 8 {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&bad).is_err(), "bit {bit}");
    }
}

#[test]
fn blank_and_foreign_sectors_are_told_apart() {
    assert_eq!(decode(&[0; SECTOR_BYTES]), Err(BadRecord::Blank));
    assert_eq!(decode(&[1; SECTOR_BYTES]), Err(BadRecord::Magic));
}

#[test]
fn a_blank_disk_starts_at_one() {
    let (mut disk, mut journal) = (Disk::blank(8), Journal::new(CONFIG));
    assert_eq!(disk.scan(&mut journal), Scan { records: 0, last: None, bad: 0 });
    assert_eq!(disk.step(&mut journal, 0), Some(Event::Nothing));
    assert_eq!(disk.step(&mut journal, 0), Some(Event::Acknowledged { seq: 1 }));
    assert_eq!(decode(&disk.sectors[1]).map(|r| r.seq), Ok(1));
    assert_eq!(journal.due_ns(), Some(1000));
    assert_eq!(journal.next_request(999), None);
}

#[test]
fn the_journal_wraps_around_and_goes_on_after_a_reboot() {
    let mut disk = Disk::with_records(8, 1..=21);
    let mut journal = Journal::new(CONFIG);
    assert_eq!(disk.scan(&mut journal), Scan { records: 8, last: Some(21), bad: 0 });
    disk.step(&mut journal, 0);
    assert_eq!(disk.step(&mut journal, 0), Some(Event::Acknowledged { seq: 22 }));
    assert_eq!(decode(&disk.sectors[6]).map(|r| r.seq), Ok(22));
}

#[test]
fn only_a_flush_acknowledges() {
    let (mut disk, mut journal) = (Disk::blank(8), Journal::new(CONFIG));
    disk.scan(&mut journal);
    assert!(matches!(journal.next_request(0), Some(Request::Write { sector: 1, .. })));
    assert_eq!((journal.next_request(9999), journal.due_ns()), (None, None), "one at a time");
    assert_eq!(journal.complete(OK, &[]), Event::Nothing);
    assert_eq!(journal.next_request(0), Some(Request::Flush));
    assert_eq!(journal.complete(OK, &[]), Event::Acknowledged { seq: 1 });
}

#[test]
fn without_flush_the_write_acknowledges() {
    let mut disk = Disk::blank(8);
    let mut journal = Journal::new(Config { flush: false, ..CONFIG });
    disk.scan(&mut journal);
    assert_eq!(disk.step(&mut journal, 0), Some(Event::Acknowledged { seq: 1 }));
}

#[test]
fn a_failed_record_is_written_again_as_it_was() {
    let (mut disk, mut journal) = (Disk::blank(8), Journal::new(CONFIG));
    disk.scan(&mut journal);
    let first = journal.next_request(10);
    let failed = |operation| Event::Failed { operation, sector: 1, status: IOERR };
    assert_eq!(journal.complete(IOERR, &[]), failed(Operation::Write));
    assert_eq!(journal.next_request(1009), None, "not before the next interval");
    assert_eq!(journal.next_request(1010), first);
    journal.complete(OK, &[]);
    assert_eq!(journal.next_request(1010), Some(Request::Flush));
    assert_eq!(journal.complete(IOERR, &[]), failed(Operation::Flush));
    assert_eq!(journal.last(), 0);
    assert_eq!(journal.next_request(2010), first, "a failed flush leaves the record unknown");
}

#[test]
fn the_scan_counts_what_is_bad() {
    let mut disk = Disk::with_records(8, 1..=5);
    disk.sectors[2][100] ^= 1;
    disk.sectors[7] = encode(6); // a good record in the wrong place
    let mut journal = Journal::new(CONFIG);
    assert_eq!(disk.scan(&mut journal), Scan { records: 4, last: Some(5), bad: 2 });
}

#[test]
fn the_scan_reads_in_large_pieces_and_one_by_one_after_an_error() {
    let usable = SCAN_SECTORS + 3;
    let mut disk = Disk::with_records(usable as usize, 1..=usable - 1);
    let mut journal = Journal::new(Config { usable, ..CONFIG });
    let all = Request::Read { sector: 0, sectors: SCAN_SECTORS };
    assert_eq!(journal.next_request(0), Some(all));
    let failed = Event::Failed { operation: Operation::Read, sector: 0, status: IOERR };
    assert_eq!(journal.complete(IOERR, &[]), failed);
    for sector in 0..SCAN_SECTORS {
        let request = Request::Read { sector, sectors: 1 };
        assert_eq!(journal.next_request(0), Some(request));
        let status = if sector == 9 { IOERR } else { OK };
        assert_eq!(journal.complete(status, &disk.execute(&request)), Event::Nothing);
    }
    let expected = Scan { records: usable - 2, last: Some(usable - 1), bad: 1 };
    assert_eq!(disk.scan(&mut journal), expected);
}

#[test]
fn a_read_only_disk_is_only_scanned() {
    let mut disk = Disk::with_records(8, 1..=3);
    let mut journal = Journal::new(Config { read_only: true, ..CONFIG });
    assert_eq!(disk.scan(&mut journal).last, Some(3));
    assert_eq!((journal.next_request(u64::MAX), journal.due_ns()), (None, None));
}

#[test]
fn an_interval_of_zero_switches_the_journal_off_until_it_is_changed() {
    let mut disk = Disk::blank(8);
    let mut journal = Journal::new(Config { interval_ns: 0, ..CONFIG });
    disk.scan(&mut journal);
    assert_eq!((journal.next_request(u64::MAX), journal.due_ns()), (None, None));
    journal.set_interval_ns(50, 7);
    assert_eq!(journal.due_ns(), Some(7));
    assert!(journal.next_request(7).is_some());
}

#[test]
fn a_disk_of_one_sector_and_one_of_none_work() {
    let (mut disk, mut journal) = (Disk::blank(1), Journal::new(Config { usable: 1, ..CONFIG }));
    disk.scan(&mut journal);
    disk.step(&mut journal, 0);
    assert_eq!(disk.step(&mut journal, 0), Some(Event::Acknowledged { seq: 1 }));
    assert_eq!(Journal::new(Config { usable: 0, ..CONFIG }).next_request(0), Some(None).flatten());
}

/// Runs until so many more records are acknowledged.
fn acknowledge(disk: &mut Disk, journal: &mut Journal, mut records: u64) {
    while records > 0 {
        if let Some(Event::Acknowledged { .. }) = disk.step(journal, journal.due_ns().unwrap()) {
            records -= 1;
        }
    }
}

fn read(disk: &Disk, seq: u64) -> Record {
    decode(&disk.sectors[seq as usize % disk.sectors.len()]).unwrap()
}

#[test]
fn records_are_a_chain_that_goes_on_after_a_reboot_with_the_next_boot_number() {
    let mut disk = Disk::blank(8);
    let config = Config { interval_ns: 1, ..CONFIG };
    for boot in 1..=2 {
        let mut journal = Journal::new(config);
        disk.scan(&mut journal);
        acknowledge(&mut disk, &mut journal, 5);
        assert_eq!(read(&disk, boot * 5).boot, boot);
    }
    for seq in 4..=10 {
        let before = checksum(&disk.sectors[(seq - 1) as usize % 8]);
        assert_eq!(read(&disk, seq).previous, before, "record {seq}");
    }
}

#[test]
fn an_old_guest_that_writes_once_more_breaks_the_chain() {
    let mut disk = Disk::blank(8);
    let config = Config { interval_ns: 1, ..CONFIG };
    let mut old = Journal::new(config);
    disk.scan(&mut old);
    acknowledge(&mut disk, &mut old, 2);
    let mut new = Journal::new(config);
    disk.scan(&mut new);
    acknowledge(&mut disk, &mut new, 3);
    assert_eq!(read(&disk, 4).previous, checksum(&disk.sectors[3]));
    acknowledge(&mut disk, &mut old, 1);
    assert_ne!(read(&disk, 4).previous, checksum(&disk.sectors[3]));
}
