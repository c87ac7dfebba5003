//! Runs in a Linux guest and checks the machine under it, for ever. `check serve` and `check fetch HOST`
//! are the two ends of a connection whose bytes are known, `check disk DEVICE` works on a disk and
//! `check disk-image FILE` looks at it afterwards; without a word it is the machine itself:
//!
//! One thread for each processor works on memory of its own, and on registers: what it computes is
//! known beforehand. All of them watch the clocks. Whatever is wrong is one line `FATAL …`, and the
//! end. Each 100 ms there is a line `tick N mono_ms=… wall_s=… rounds=…`; its number never jumps.
#![forbid(unsafe_code)]
// Its output is what it is for.
#![allow(clippy::print_stdout)]
// The machine's clock is what is being checked.
#![allow(clippy::disallowed_methods)]

mod disk;
mod float;
mod memory;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const TICK: Duration = Duration::from_millis(100);
const WORDS_PER_THREAD: usize = 1 << 20;

/// The latest time that anybody has seen, in nanoseconds since `start`.
struct Clock {
    start: Instant,
    latest: AtomicU64,
}

impl Clock {
    /// Reads the clock; no thread ever sees a time before one that another has seen already.
    fn read(&self) -> u64 {
        let before = self.latest.load(Ordering::SeqCst);
        let now = self.start.elapsed().as_nanos() as u64;
        if now < before {
            fatal(&format!("the monotonic clock went back from {before} to {now} ns"));
        }
        self.latest.fetch_max(now, Ordering::SeqCst);
        now
    }
}

fn fatal(what: &str) -> ! {
    println!("FATAL {what}");
    std::process::exit(1);
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        [] => {
            check_machine();
            Ok(())
        }
        ["serve"] => stream::serve(),
        ["fetch", host] => stream::fetch(host),
        ["disk", device] => disk::load(device),
        ["disk-image", file] => disk::verify(file),
        _ => Err("usage: check [serve | fetch HOST | disk DEVICE | disk-image FILE]".to_owned()),
    };
    if let Err(wrong) = outcome {
        fatal(&wrong);
    }
}

fn check_machine() {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let clock = Arc::new(Clock { start: Instant::now(), latest: AtomicU64::new(0) });
    let rounds = Arc::new(AtomicU64::new(0));
    for seed in 1..=threads as u64 {
        let (clock, rounds) = (Arc::clone(&clock), Arc::clone(&rounds));
        thread::spawn(move || work(seed, &clock, &rounds));
    }
    println!("check: {threads} threads");
    for tick in 1_u64.. {
        let before = clock.read();
        thread::sleep(TICK);
        let slept = Duration::from_nanos(clock.read() - before);
        if slept < TICK {
            fatal(&format!("a sleep of {TICK:?} took {slept:?}"));
        }
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (mono, rounds) = (clock.read() / 1_000_000, rounds.load(Ordering::SeqCst));
        println!("tick {tick} mono_ms={mono} wall_s={wall} rounds={rounds}");
    }
}

/// Memory and registers, again and again.
fn work(seed: u64, clock: &Clock, rounds: &AtomicU64) {
    let mut memory = memory::Pattern::new(seed, WORDS_PER_THREAD);
    loop {
        if let Err(wrong) = memory.check_and_advance() {
            fatal(&format!("thread {seed}: {wrong}"));
        }
        if let Err(wrong) = float::check(seed) {
            fatal(&format!("thread {seed}: {wrong}"));
        }
        clock.read();
        rounds.fetch_add(1, Ordering::SeqCst);
    }
}
