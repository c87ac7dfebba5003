//! The journal on the virtio disk: the shell around the two, which prints what happens.

use crate::cmdline::Params;
use crate::journal::{Config, Event, Journal, Operation};
use crate::println;
use crate::virtio::blk::Blk;

const NS_PER_MS: u64 = 1_000_000;
/// How often a device without interrupts is looked at.
const POLL_NS: u64 = NS_PER_MS;

pub struct Disk {
    blk: Blk,
    journal: Journal,
    submitted_ns: u64,
    pub latency_ns_max: u64,
    pub io_errors: u64,
}

impl Disk {
    /// Finds the disk. Says so if there is none, or none that works.
    pub fn start(params: &Params) -> Option<Self> {
        match Blk::find() {
            Some(Ok(blk)) => Some(Self::new(blk, params)),
            Some(Err(reason)) => {
                println!("warn disk {reason}");
                println!("disk none");
                None
            }
            None => {
                println!("disk none");
                None
            }
        }
    }

    fn new(blk: Blk, params: &Params) -> Self {
        if !blk.interrupts {
            println!("warn disk without MSI-X is polled");
        }
        let journal = Journal::new(Config {
            usable: params.journal_sectors.min(blk.sectors),
            seed: params.seed,
            read_only: blk.read_only,
            flush: blk.flush,
            interval_ns: params.journal_ms * NS_PER_MS,
        });
        Self { blk, journal, submitted_ns: 0, latency_ns_max: 0, io_errors: 0 }
    }

    pub fn journal_last(&self) -> u64 {
        self.journal.last()
    }

    pub fn set_journal_ms(&mut self, journal_ms: u64, now_ns: u64) {
        self.journal.set_interval_ns(journal_ms * NS_PER_MS, now_ns);
    }

    /// How long the request in flight has been under way.
    pub fn in_flight_ns(&self, now_ns: u64) -> u64 {
        if self.blk.is_in_flight() { now_ns - self.submitted_ns } else { 0 }
    }

    /// When the disk needs attention, as far as no interrupt will tell.
    pub fn due_ns(&self, now_ns: u64) -> Option<u64> {
        let polled = self.blk.is_in_flight() && !self.blk.interrupts;
        if polled { Some(now_ns + POLL_NS) } else { self.journal.due_ns() }
    }

    /// Takes a completion, if there is one, and submits what is due. Never waits.
    pub fn drive(&mut self, now_ns: u64) {
        if let Some((status, data)) = self.blk.take_completion() {
            let event = self.journal.complete(status, data);
            self.latency_ns_max = self.latency_ns_max.max(now_ns - self.submitted_ns);
            self.report(event);
        }
        if let Some(request) = self.journal.next_request(now_ns) {
            self.submitted_ns = now_ns;
            self.blk.submit(&request);
        }
    }

    fn report(&mut self, event: Event) {
        match event {
            Event::Nothing => {}
            Event::Acknowledged { seq } => println!("journal {seq}"),
            Event::Failed { operation, sector, status } => {
                self.io_errors += 1;
                println!("ioerror {} sector={sector} status={status}", name(operation));
            }
            Event::Scanned(scan) => {
                let (sectors, ro) = (self.blk.sectors, u8::from(self.blk.read_only));
                let (records, bad) = (scan.records, scan.bad);
                match scan.last {
                    Some(last) => println!(
                        "disk sectors={sectors} ro={ro} records={records} last={last} bad={bad}"
                    ),
                    None => println!(
                        "disk sectors={sectors} ro={ro} records={records} last=none bad={bad}"
                    ),
                }
            }
        }
    }
}

fn name(operation: Operation) -> &'static str {
    match operation {
        Operation::Read => "read",
        Operation::Write => "write",
        Operation::Flush => "flush",
    }
}
