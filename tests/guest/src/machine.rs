//! The machine: boot, and the loop that ticks, works, listens and sleeps.

use crate::budget::Budget;
use crate::clock::Clock;
use crate::cmdline::{Params, Refused};
use crate::command::{Command, LineReader};
use crate::disk::Disk;
use crate::lapic::Lapic;
use crate::pattern::{Fill, Mismatch, Pattern, Verified};
use crate::power::PowerButton;
use crate::pvh::BootInfo;
use crate::ram::Ram;
use crate::stats::Stats;
use crate::{VERSION, console, fatal, gates, interrupts, paging, power, println};

const NS_PER_MS: u64 = 1_000_000;
const PAGES_PER_MIB: u64 = 256;
/// Between two looks at the clock.
const CHUNK_PAGES: usize = 16;
/// Rates are spread this finely even when ticks are rare.
const BEAT_NS_MAX: u64 = 10 * NS_PER_MS;
/// With unsent output the guest looks at the port this often.
const OUTPUT_RETRY_NS: u64 = NS_PER_MS;
/// A sleep shorter than this is not worth its interrupt.
const SLEEP_NS_MIN: u64 = 20_000;
/// Full passes over little memory would fill the log.
const PATTERN_LINE_NS_MIN: u64 = 100 * NS_PER_MS;
/// Bounds the commands that one tick takes.
const RECEIVE_BYTES_MAX: usize = 1024;

pub struct Machine {
    params: Params,
    clock: Clock,
    lapic: Lapic,
    pattern: Pattern,
    fill: Fill,
    dirty: Budget,
    verify: Budget,
    disk: Option<Disk>,
    input: LineReader,
    button: Option<PowerButton>,
    stats: Stats,
    next_tick_ns: u64,
    next_beat_ns: u64,
    last_beat_ns: u64,
    pattern_line_ns: u64,
    output_pending: bool,
}

impl Machine {
    pub fn boot() -> Self {
        paging::map_low();
        let mut clock = Clock::start();
        let info = BootInfo::read();
        paging::map_ram(info.ram());
        println!(
            "boot bellwether-guest {VERSION} mem_mib={} clock={} cmdline={}",
            info.ram_bytes() >> 20,
            clock.name(),
            info.cmdline()
        );
        let params = Params::parse(info.cmdline(), warn_refused);
        fatal::power_off_on_fatal(params.power_off_on_fatal);
        let mut ram = Ram::new(info.ram());
        let pattern = make_pattern(&mut ram, &params);
        let fill = make_fill(&mut ram, &params);
        console::drain();
        let lapic = Lapic::start(&mut clock);
        let disk = Disk::start(&params);
        Self {
            dirty: Budget::new(rate(&params, params.dirty_mib_s)),
            verify: Budget::new(rate(&params, params.verify_mib_s)),
            params,
            clock,
            lapic,
            pattern,
            fill,
            disk,
            input: LineReader::default(),
            button: PowerButton::find(),
            stats: Stats::default(),
            next_tick_ns: 0,
            next_beat_ns: 0,
            last_beat_ns: 0,
            pattern_line_ns: 0,
            output_pending: true,
        }
    }

    pub fn run(&mut self) -> ! {
        self.next_tick_ns = self.clock.now_ns();
        self.next_beat_ns = self.next_tick_ns;
        self.last_beat_ns = self.next_tick_ns;
        loop {
            let now = self.clock.now_ns();
            if now >= self.next_tick_ns {
                self.tick(now);
            }
            if now >= self.next_beat_ns {
                self.beat(now);
            }
            if let Some(disk) = &mut self.disk {
                disk.drive(now);
            }
            self.output_pending = !console::drain();
            if !self.work(now) {
                self.sleep();
            }
        }
    }

    fn tick(&mut self, now: u64) {
        let period = self.params.tick_ms * NS_PER_MS;
        let late = now - self.next_tick_ns;
        self.stats.ticks += 1;
        self.stats.missed += late / period;
        self.stats.late_ns_max = self.stats.late_ns_max.max(late);
        self.next_tick_ns += period * (1 + late / period);
        // A wrong byte stops the guest, so a tick that is printed at all has seen none.
        println!("tick {} {now} 1", self.stats.ticks);
        self.receive(now);
    }

    /// Gives the rates their share of the time that has passed.
    fn beat(&mut self, now: u64) {
        let elapsed = now - self.last_beat_ns;
        self.last_beat_ns = now;
        // On the same grid as the ticks where that is possible, so that one wake-up serves both.
        let period = BEAT_NS_MAX.min(self.params.tick_ms * NS_PER_MS);
        self.next_beat_ns += period * (1 + (now - self.next_beat_ns) / period);
        self.dirty.accrue(elapsed);
        self.verify.accrue(elapsed);
    }

    /// A chunk of each kind of work. Returns true while there is more to do now.
    fn work(&mut self, now: u64) -> bool {
        match self.work_chunk(now) {
            Ok(more) => more,
            Err(wrong) => die_of(wrong),
        }
    }

    fn work_chunk(&mut self, now: u64) -> Result<bool, Mismatch> {
        if self.pattern.is_blank() {
            (0..CHUNK_PAGES).try_for_each(|_| self.pattern.rewrite_next())?;
            return Ok(true);
        }
        for _ in 0..CHUNK_PAGES {
            if self.fill.is_writing() && self.fill.write_next() {
                println!("filled {}", self.fill.mib());
            }
            if self.fill.is_verifying() && self.fill.verify_next()? {
                println!("verified fill_mib={}", self.fill.mib());
            }
            if self.dirty.take_page() {
                self.pattern.rewrite_next()?;
            }
            if self.verify.take_page()
                && let Verified::Pass = self.pattern.verify_next()?
            {
                self.passed(now);
            }
        }
        let filling = self.fill.is_writing() || self.fill.is_verifying();
        Ok(filling || self.dirty.has_page() || self.verify.has_page())
    }

    fn passed(&mut self, now: u64) {
        self.stats.passes += 1;
        if now >= self.pattern_line_ns {
            self.pattern_line_ns = now + PATTERN_LINE_NS_MIN;
            println!(
                "pattern pages={} generation={} verified={}",
                self.pattern.pages(),
                self.pattern.generation_max(),
                self.pattern.verified()
            );
        }
    }

    fn sleep(&mut self) {
        let now = self.clock.now_ns();
        let until = self.wake_ns(now);
        if until < now + SLEEP_NS_MIN {
            return;
        }
        self.lapic.arm(until - now);
        gates::idle();
        self.stats.sleeps += 1;
        self.stats.idle_ns += self.clock.now_ns() - now;
    }

    /// The next time at which something is to be done.
    fn wake_ns(&self, now: u64) -> u64 {
        let working = self.dirty.mib_s() > 0 || self.verify.mib_s() > 0;
        let beat = working.then_some(self.next_beat_ns);
        let disk = self.disk.as_ref().and_then(|disk| disk.due_ns(now));
        let output = self.output_pending.then_some(now + OUTPUT_RETRY_NS);
        [beat, disk, output].into_iter().flatten().fold(self.next_tick_ns, u64::min)
    }

    fn receive(&mut self, now: u64) {
        if self.button.as_mut().is_some_and(|button| button.is_pressed(now)) {
            power::off("button");
        }
        let mut input = core::mem::take(&mut self.input);
        for byte in core::iter::from_fn(console::receive).take(RECEIVE_BYTES_MAX) {
            input.push(byte, |line| self.obey(Command::parse(line), now));
        }
        self.input = input;
    }

    fn obey(&mut self, command: Command, now: u64) {
        match command {
            Command::Ping => println!("pong"),
            Command::Stats => self.print_stats(now),
            Command::Rate(rate) => self.change(rate, now),
            Command::VerifyFill => self.fill.start_verifying(),
            Command::Crash => power::crash(),
            Command::Reset => power::reset(),
            Command::PowerOff => power::off("poweroff"),
            Command::Unknown(line) => println!("warn unknown command {line}"),
        }
    }

    /// Changes a parameter that can be changed while running.
    fn change(&mut self, word: &str, now: u64) {
        let mut params = self.params;
        if let Err(why) = params.set(word) {
            return warn_refused(word, why);
        }
        let fixed = |p: Params| (p.mem_mib, p.journal_sectors, p.seed, p.fill, p.cpus);
        if fixed(params) != fixed(self.params) {
            return println!("warn fixed parameter {word}");
        }
        self.params = params;
        self.dirty.set_mib_s(rate(&params, params.dirty_mib_s));
        self.verify.set_mib_s(rate(&params, params.verify_mib_s));
        fatal::power_off_on_fatal(params.power_off_on_fatal);
        if let Some(disk) = &mut self.disk {
            disk.set_journal_ms(params.journal_ms, now);
        }
        self.next_tick_ns = self.next_tick_ns.min(now + params.tick_ms * NS_PER_MS);
        println!("rate {word}");
    }

    fn print_stats(&self, now: u64) {
        let Stats { ticks, missed, late_ns_max, passes, sleeps, idle_ns } = self.stats;
        let disk = self.disk.as_ref();
        let irqs = interrupts::counts();
        println!(
            "stats ns={now} ticks={ticks} missed={missed} late_ns_max={late_ns_max} written={} verified={} \
             passes={passes} journal={} ioerrors={} disk_ns_max={} inflight_ns={} sleeps={sleeps} \
             idle_ns={idle_ns} irq_timer={} irq_disk={} irq_config={} irq_spurious={} dropped={} \
             clock_back={} clock_back_ns_max={} lapic_hz={} dirty_mib_s={} verify_mib_s={}",
            self.pattern.written(),
            self.pattern.verified(),
            disk.map_or(0, Disk::journal_last),
            disk.map_or(0, |d| d.io_errors),
            disk.map_or(0, |d| d.latency_ns_max),
            disk.map_or(0, |d| d.in_flight_ns(now)),
            irqs.timer,
            irqs.disk,
            irqs.config,
            irqs.spurious,
            console::dropped(),
            self.clock.stepped_back,
            self.clock.stepped_back_ns_max,
            self.lapic.hz(),
            self.dirty.mib_s(),
            self.verify.mib_s(),
        );
    }
}

fn warn_refused(word: &str, why: Refused) {
    match why {
        Refused::Unknown => println!("warn unknown parameter {word}"),
        Refused::Value => println!("warn bad value {word}"),
    }
}

/// Without memory there is nothing to work on at any rate.
fn rate(params: &Params, mib_s: u64) -> u64 {
    if params.mem_mib == 0 { 0 } else { mib_s }
}

fn make_pattern(ram: &mut Ram, params: &Params) -> Pattern {
    let pages = params.mem_mib * PAGES_PER_MIB;
    let table_pages = (pages * 4).div_ceil(4096);
    let free_mib = ram.free_pages() / PAGES_PER_MIB;
    let (table, set) = match (ram.take_contiguous(table_pages), ram.take_scattered(pages)) {
        (Some(table), Some(set)) => (table, set),
        _ => crate::fatal!("memory mem_mib={} free_mib={free_mib}", params.mem_mib),
    };
    let table = core::ptr::with_exposed_provenance_mut::<u32>(table as usize);
    // SAFETY: the pages were just taken, are mapped, and hold any bit pattern.
    let generations = unsafe { core::slice::from_raw_parts_mut(table, pages as usize) };
    // SAFETY: the pages were just taken and are mapped.
    unsafe { Pattern::new(params.seed, set, generations) }
}

fn make_fill(ram: &mut Ram, params: &Params) -> Fill {
    let pages = ram.free_pages() * params.fill / 100;
    let set = ram.take_scattered(pages).unwrap_or_default();
    // SAFETY: the pages were just taken and are mapped.
    unsafe { Fill::new(params.seed, set) }
}

fn die_of(wrong: Mismatch) -> ! {
    let Mismatch { address, expected, found, key, found_generation, found_page } = wrong;
    crate::fatal!(
        "memory address={address:#x} expected={expected:#04x} found={found:#04x} page={} generation={} \
         found_page={found_page} found_generation={found_generation}",
        key.page,
        key.generation
    )
}
