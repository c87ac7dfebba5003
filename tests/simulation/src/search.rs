//! Sets of seeds, and what is made of the first that fails: fewer events, and a line that replays it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::coverage::Coverage;
use crate::run::{Run, Verdict, run};
use crate::scenario::{Scenario, Timed};

/// How many runs a minimisation may take.
const MINIMISE_RUNS_MAX: u32 = 400;
/// So many seeds of a set are run a second time, to compare.
const TWICE: u64 = 16;

/// A run; what panics is broken.
pub fn run_caught(scenario: &Scenario) -> Run {
    catch_unwind(AssertUnwindSafe(|| run(scenario))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|it| (*it).to_owned()));
        let what = format!("panic: {}", text.unwrap_or_default());
        Run {
            verdict: Verdict::Broken { at_ms: 0, what },
            log: Vec::new(),
            trace_hash: 0,
            coverage: Coverage::default(),
            events: 0,
            virtual_ms: 0,
            timeline: Default::default(),
        }
    })
}

/// The invariant that a verdict names: what comes before the first colon.
fn class(verdict: &Verdict) -> Option<&str> {
    match verdict {
        Verdict::Held => None,
        Verdict::Broken { what, .. } => what.split(':').next(),
    }
}

/// Takes events out of a failing scenario for as long as it goes on failing in the same way (Zeller
/// and Hildebrandt's ddmin). Everything that is left is needed.
pub fn minimise(scenario: &Scenario) -> Scenario {
    let failing = run_caught(scenario);
    let Some(wanted) = class(&failing.verdict).map(str::to_owned) else { return scenario.clone() };
    let mut runs = 0;
    let mut fails = |events: &[Timed]| {
        runs += 1;
        let smaller = Scenario { events: events.to_vec(), ..scenario.clone() };
        let still = class(&run_caught(&smaller).verdict).is_some_and(|it| it == wanted);
        (still, runs < MINIMISE_RUNS_MAX)
    };
    let mut events = scenario.events.clone();
    let mut chunk = events.len().div_ceil(2).max(1);
    loop {
        let mut at = 0;
        let mut removed = false;
        while at < events.len() {
            let mut fewer = events.clone();
            fewer.drain(at..(at + chunk).min(fewer.len()));
            let (still, go_on) = fails(&fewer);
            match still {
                true => (events, removed) = (fewer, true),
                false => at += chunk,
            }
            if !go_on {
                return Scenario { events, ..scenario.clone() };
            }
        }
        match (chunk, removed) {
            (1, false) => return Scenario { events, ..scenario.clone() },
            (1, true) => {}
            _ => chunk = chunk.div_ceil(2),
        }
    }
}

/// Which seeds are run.
#[derive(Clone, Copy, Debug)]
pub struct Set {
    pub first: u64,
    pub count: u64,
    pub threads: u64,
    /// No more seeds are begun after this many seconds.
    pub seconds_max: Option<u64>,
    /// Stop at the first failure.
    pub stop: bool,
}

/// What a set of seeds gave.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub seeds: u64,
    pub virtual_ms: u64,
    pub events: u64,
    pub seconds: f64,
    pub coverage: Coverage,
    /// Seeds that failed, in their order, each with what was broken.
    pub failures: Vec<(u64, String)>,
    /// Mixed from the hashes of all runs, whichever thread ran them.
    pub trace_hash: u64,
}

impl Report {
    fn take(&mut self, seed: u64, result: &Run) {
        self.seeds += 1;
        self.virtual_ms += result.virtual_ms;
        self.events += result.events;
        self.trace_hash ^= result.trace_hash.rotate_left(u32::try_from(seed % 64).unwrap_or(0));
        self.coverage.merge(&result.coverage);
        if let Verdict::Broken { what, .. } = &result.verdict {
            self.failures.push((seed, what.clone()));
        }
    }

    fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.virtual_ms += other.virtual_ms;
        self.events += other.events;
        self.trace_hash ^= other.trace_hash;
        self.coverage.merge(&other.coverage);
        self.failures.extend(other.failures);
    }

    pub fn virtual_hours_per_second(&self) -> f64 {
        #[allow(clippy::cast_precision_loss)]
        let hours = self.virtual_ms as f64 / 3_600_000.0;
        hours / self.seconds.max(0.001)
    }
}

/// Runs a set: each seed is a run of its own on one thread, so threads change nothing but the time.
#[allow(clippy::disallowed_methods)]
pub fn run_set(set: &Set) -> Report {
    let begun = Instant::now();
    let stop = AtomicBool::new(false);
    let work = |thread: u64| {
        let mut report = Report::default();
        let seeds = set.first..set.first.saturating_add(set.count);
        for seed in seeds.skip(usize::try_from(thread).unwrap_or(0)).step_by(step(set)) {
            let late = set.seconds_max.is_some_and(|max| begun.elapsed().as_secs() >= max);
            if late || stop.load(Ordering::Relaxed) {
                break;
            }
            let scenario = Scenario::random(seed);
            let mut result = run_caught(&scenario);
            if seed < set.first + TWICE && run_caught(&scenario).trace_hash != result.trace_hash {
                let what = "determinism: the same seed gave two different runs".to_owned();
                result.verdict = Verdict::Broken { at_ms: 0, what };
            }
            report.take(seed, &result);
            if set.stop && !report.failures.is_empty() {
                stop.store(true, Ordering::Relaxed);
            }
        }
        report
    };
    let mut report = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..set.threads).map(|thread| scope.spawn(move || work(thread))).collect();
        let mut all = Report::default();
        threads.into_iter().filter_map(|thread| thread.join().ok()).for_each(|it| all.merge(it));
        all
    });
    report.failures.sort();
    report.seconds = begun.elapsed().as_secs_f64();
    report
}

fn step(set: &Set) -> usize {
    usize::try_from(set.threads.max(1)).unwrap_or(1)
}
