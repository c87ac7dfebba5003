//! How long orders take: what this cluster has measured itself, or else a guess for a host of today.

use crate::state::State;
use crate::task::Task;

/// Durations in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// A VMM is made: process, memory, devices, disks opened.
    pub prepare_ms: u64,
    /// A new runner gets the locks of a node that is off.
    pub take_over_ms: u64,
    /// Stopping a guest and writing its state, without its memory.
    pub seal_ms: u64,
    /// Memory that is written in a millisecond, MiB.
    pub seal_mib_per_ms: u64,
    pub load_ms: u64,
    /// From the locks to the first instruction.
    pub activate_ms: u64,
    pub release_ms: u64,
    /// How long a guest takes to shut down.
    pub shutdown_ms: u64,
    /// The commit that each step ends with.
    pub commit_ms: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            prepare_ms: 100,
            take_over_ms: 20,
            seal_ms: 20,
            seal_mib_per_ms: 1,
            load_ms: 10,
            activate_ms: 20,
            release_ms: 50,
            shutdown_ms: 5_000,
            commit_ms: 5,
        }
    }
}

impl Pace {
    /// The medians of what ended tasks have measured, where there are any.
    pub fn measured(state: &State) -> Self {
        let guess = Self::default();
        let parts = |names: &'static [&'static str]| median(state, move |task| sum(task, names));
        let speed = median(state, |task| {
            let speed = |bytes: &str, us: &str| {
                let mib = task.measures.get(bytes)? >> 20;
                Some((mib * 1_000 / task.measures.get(us)?.max(&1)).max(1))
            };
            speed("precopy_bytes", "precopy_us").or_else(|| speed("memory_bytes", "save_us"))
        });
        Self {
            seal_ms: parts(&["stop_us", "seal_us"]).map_or(guess.seal_ms, ms),
            seal_mib_per_ms: speed.unwrap_or(guess.seal_mib_per_ms),
            load_ms: parts(&["load_us"]).map_or(guess.load_ms, ms),
            activate_ms: parts(&["lock_us", "resume_us"]).map_or(guess.activate_ms, ms),
            commit_ms: parts(&["commit_us"]).map_or(guess.commit_ms, ms),
            ..guess
        }
    }
}

/// Microseconds as milliseconds, rounded up: nothing takes no time.
fn ms(us: u64) -> u64 {
    us.div_ceil(1_000).max(1)
}

/// The sum of some measures, if a task has all of them.
fn sum(task: &Task, names: &[&str]) -> Option<u64> {
    names.iter().map(|name| task.measures.get(*name).copied()).sum()
}

fn median(state: &State, value: impl Fn(&Task) -> Option<u64>) -> Option<u64> {
    let ended = state.tasks.values().filter(|task| task.outcome == Some(Ok(())));
    let mut values: Vec<u64> = ended.filter_map(value).collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}
