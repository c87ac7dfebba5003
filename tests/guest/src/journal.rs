//! The journal on the guest's disk: what to submit next, and what a completion means. No I/O happens here.
//!
//! # Where records are
//!
//! The journal takes the first `usable` sectors of the disk, `usable = min(journal_sectors, capacity)`.
//! Record `seq` (from 1, each one more than the last) is sector `seq mod usable`, so the journal wraps around
//! and holds the last `usable` records. A sector holds one record (see `journal_format`) or zeros.
//! A valid record on another record's sector is a bad one.
//!
//! # What the guest promises
//!
//! - `journal <seq>` is printed only after the write of the record and a flush after it were both completed
//!   without error. (A device without the flush feature is write-through, so there the write is enough.)
//! - Record `seq + 1` is not submitted before `seq` was acknowledged. So at any instant at most one record on
//!   the disk is newer than the last `journal` line.
//! - A record that failed is submitted again as it was, at the next interval: what became of the first
//!   attempt is unknown, and both have the same bytes.
//! - At boot the guest reads the journal and goes on after the newest record that it finds, with a boot
//!   number above all that it finds. A guest that is moved or restored is the same boot.
//!
//! # States
//!
//! ```text
//! Scanning --all read--> Idle --interval--> Writing --done--> Flushing --done--> Idle (acknowledged)
//!     \                   ^                    |                  |
//!      `--read-only--> Closed      `-----error-+---------error----'  (the same record again)
//! ```
//!
//! The machine's loop owns the journal. It lives in memory only: after a crash the scan rebuilds it.

use crate::journal_format::{BadRecord, Record, SECTOR_BYTES, checksum, decode, encode};

/// How much one read of the scan covers.
pub const SCAN_SECTORS: u64 = 512;

/// There is no heap to put the record on, and one request exists at a time.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Read { sector: u64, sectors: u64 },
    Write { sector: u64, data: [u8; SECTOR_BYTES] },
    Flush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Flush,
}

/// What the caller should report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Nothing,
    Scanned(Scan),
    Acknowledged { seq: u64 },
    Failed { operation: Operation, sector: u64, status: u8 },
}

/// What was found on the disk at boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    pub records: u64,
    pub last: Option<u64>,
    pub bad: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// `single_until`: up to here sectors are read one by one, because a larger read failed.
    Scanning {
        next: u64,
        single_until: u64,
        scan: Scan,
    },
    Idle,
    Writing,
    Flushing,
    Closed,
}

#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub usable: u64,
    pub seed: u64,
    pub read_only: bool,
    pub flush: bool,
    /// 0: no records are written.
    pub interval_ns: u64,
}

pub struct Journal {
    config: Config,
    state: State,
    in_flight: bool,
    /// The newest acknowledged (or found) record, and its checksum.
    last: u64,
    previous: u64,
    /// The highest that was found; above it once the scan is done.
    boot: u64,
    /// The record that is being written, kept as it is until it is acknowledged.
    pending: Option<[u8; SECTOR_BYTES]>,
    due_ns: u64,
}

impl Journal {
    pub fn new(config: Config) -> Self {
        let state = match config.usable {
            0 => State::Closed,
            _ => State::Scanning { next: 0, single_until: 0, scan: Scan::default() },
        };
        Self {
            config,
            state,
            in_flight: false,
            last: 0,
            previous: 0,
            boot: 0,
            pending: None,
            due_ns: 0,
        }
    }

    pub fn last(&self) -> u64 {
        self.last
    }

    pub fn set_interval_ns(&mut self, interval_ns: u64, now_ns: u64) {
        self.config.interval_ns = interval_ns;
        self.due_ns = now_ns;
    }

    /// When `next_request` will have something to say; `None` while a request is in flight or nothing is to be done.
    pub fn due_ns(&self) -> Option<u64> {
        let off = self.config.interval_ns == 0;
        match self.state {
            _ if self.in_flight => None,
            State::Idle if off => None,
            State::Closed => None,
            State::Idle => Some(self.due_ns),
            _ => Some(0),
        }
    }

    /// The next request for the device, at most one at a time.
    pub fn next_request(&mut self, now_ns: u64) -> Option<Request> {
        if self.due_ns()? > now_ns {
            return None;
        }
        let request = match self.state {
            State::Scanning { next, single_until, .. } => self.scan_request(next, single_until),
            State::Idle => self.write_request(now_ns),
            State::Flushing => Request::Flush,
            State::Writing | State::Closed => return None,
        };
        self.in_flight = true;
        Some(request)
    }

    /// The device completed the request; `data` is what a read returned.
    pub fn complete(&mut self, status: u8, data: &[u8]) -> Event {
        self.in_flight = false;
        match self.state {
            State::Scanning { next, single_until, scan } => {
                self.scan_completed(next, single_until, scan, status, data)
            }
            State::Writing if status != 0 => self.failed(Operation::Write, status),
            State::Flushing if status != 0 => self.failed(Operation::Flush, status),
            State::Writing if self.config.flush => {
                self.state = State::Flushing;
                Event::Nothing
            }
            State::Writing | State::Flushing => self.acknowledged(),
            State::Idle | State::Closed => Event::Nothing,
        }
    }

    fn scan_sectors(&self, next: u64, single_until: u64) -> u64 {
        let most = if next < single_until { 1 } else { SCAN_SECTORS };
        most.min(self.config.usable - next)
    }

    fn scan_request(&self, next: u64, single_until: u64) -> Request {
        Request::Read { sector: next, sectors: self.scan_sectors(next, single_until) }
    }

    fn scan_completed(
        &mut self,
        next: u64,
        single: u64,
        mut scan: Scan,
        status: u8,
        data: &[u8],
    ) -> Event {
        let sectors = self.scan_sectors(next, single);
        if status != 0 && sectors > 1 {
            self.state = State::Scanning { next, single_until: next + sectors, scan };
            return Event::Failed { operation: Operation::Read, sector: next, status };
        }
        if status != 0 {
            scan.bad += 1;
        } else {
            self.scan_data(next, data, &mut scan);
        }
        let next = next + sectors;
        if next < self.config.usable {
            self.state = State::Scanning { next, single_until: single, scan };
            return Event::Nothing;
        }
        self.last = scan.last.unwrap_or(0);
        self.boot += 1;
        self.state = if self.config.read_only { State::Closed } else { State::Idle };
        Event::Scanned(scan)
    }

    fn scan_data(&mut self, first: u64, data: &[u8], scan: &mut Scan) {
        let (sectors, _) = data.as_chunks::<SECTOR_BYTES>();
        for (sector, bytes) in (first..).zip(sectors) {
            match decode(bytes) {
                Ok(record) if record.seq % self.config.usable == sector => {
                    scan.records += 1;
                    self.boot = self.boot.max(record.boot);
                    if Some(record.seq) > scan.last {
                        scan.last = Some(record.seq);
                        self.previous = checksum(bytes);
                    }
                }
                Err(BadRecord::Blank) => {}
                _ => scan.bad += 1,
            }
        }
    }

    fn write_request(&mut self, now_ns: u64) -> Request {
        let record = Record {
            seq: self.last + 1,
            ns: now_ns,
            seed: self.config.seed,
            boot: self.boot,
            previous: self.previous,
        };
        let data = self.pending.unwrap_or_else(|| encode(&record));
        self.pending = Some(data);
        self.due_ns = now_ns + self.config.interval_ns;
        self.state = State::Writing;
        Request::Write { sector: self.pending_sector(), data }
    }

    fn pending_sector(&self) -> u64 {
        (self.last + 1) % self.config.usable
    }

    fn failed(&mut self, operation: Operation, status: u8) -> Event {
        self.state = State::Idle;
        Event::Failed { operation, sector: self.pending_sector(), status }
    }

    fn acknowledged(&mut self) -> Event {
        self.state = State::Idle;
        self.previous = self.pending.take().map_or(self.previous, |data| checksum(&data));
        self.last += 1;
        Event::Acknowledged { seq: self.last }
    }
}
