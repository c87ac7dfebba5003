//! Runs seeds, prints what they met, and makes something of the first that fails.
#![forbid(unsafe_code)]
// A person reads what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod golden;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bellwether_simulation::search::{Report, Set, minimise, run_caught, run_set};
use bellwether_simulation::{Run, Scenario, Verdict};
use serde_json::json;

/// A set of at least so many seeds has to meet everything that is expected.
const STANDARD_SET: u64 = 1_000;

const HELP: &str = "\
Years of failures on the real decision code, under one seed.

Usage: cargo xtask sim [--seeds N] [--from N] [--seed N] [--minutes M] [--stop] [--json]
       cargo xtask sim --golden [FILE ...] [--json]
       cargo xtask sim --bless [FILE ...]
       cargo xtask sim --openraft [--minutes M] [--seed N]

A seed is a cluster of three or four nodes with its VMs, and a minute or two in which hosts lose
power, freeze and are cut off, processes are killed and stopped, the storage fails, and
administrators ask for things. The invariants of docs/simulation.md are checked at every event. Then
all faults end, and every VM must be where it is to be within four minutes of virtual time. The same
seed gives the same run, bit for bit.

Options:
  --seeds N    Run so many seeds (default 2000); from 1000 on, a row of the coverage table at zero
               is a failure
  --from N     The first of them (default 1)
  --seed N     Run one seed and print its decision log
  --minutes M  Run seeds for so many minutes instead of a number of them
  --threads N  Seeds at a time (default: one for each processor); the result is the same
  --stop       Stop at the first seed that fails
  --json       Print one JSON object on standard output
  --golden     Run the scenarios of tests/simulation/golden, or these files, and compare their logs
  --bless      Run them and write their logs anew, where all that a file expects is met. Read what
               git shows afterwards: each line is a decision that this change has changed
  --openraft   Instead of all this: openraft itself on our store, in a network of its own

Of the first seed that fails it prints what was broken, the line that replays it, the fewest events
that it needs, and the decision log.";

struct Options {
    set: Set,
    seed: Option<u64>,
    json: bool,
    /// Scenario files instead of seeds: which, and whether their logs are written anew.
    golden: Option<(Vec<String>, bool)>,
}

fn main() -> ExitCode {
    // What panics is a finding: it is told with its seed, and not in the middle of everything.
    std::panic::set_hook(Box::new(|_| {}));
    match options().and_then(|options| options.map_or(Ok(true), |options| execute(&options))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Option<Options>> {
    let threads = std::thread::available_parallelism().map_or(1, |it| it.get() as u64);
    let set = Set { first: 1, count: 2_000, threads, seconds_max: None, stop: false };
    let mut options = Options { set, seed: None, json: false, golden: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || -> Result<u64> {
            let text = arguments.next().with_context(|| format!("{argument} needs a number"))?;
            text.parse().with_context(|| format!("{argument}: `{text}` is not a number"))
        };
        match argument.as_str() {
            "--seeds" => options.set.count = number()?,
            "--from" => options.set.first = number()?,
            "--seed" => options.seed = Some(number()?),
            "--threads" => options.set.threads = number()?.max(1),
            "--minutes" => {
                options.set.seconds_max = Some(number()? * 60);
                options.set.count = u64::MAX;
            }
            "--stop" => options.set.stop = true,
            "--json" => options.json = true,
            "--golden" => options.golden = Some((Vec::new(), false)),
            "--bless" => options.golden = Some((Vec::new(), true)),
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(None);
            }
            other => match &mut options.golden {
                Some((files, _)) if !other.starts_with('-') => files.push(other.to_owned()),
                _ => bail!("unknown option `{other}`\n\n{HELP}"),
            },
        }
    }
    Ok(Some(options))
}

fn execute(options: &Options) -> Result<bool> {
    if let Some((files, bless)) = &options.golden {
        return golden::run(files, *bless, options.json);
    }
    match options.seed {
        Some(seed) => one(seed, options.json),
        None => many(options),
    }
}

/// One seed, twice.
fn one(seed: u64, json: bool) -> Result<bool> {
    let scenario = Scenario::random(seed);
    let (first, again) = (run_caught(&scenario), run_caught(&scenario));
    if first.trace_hash != again.trace_hash {
        bail!(
            "seed {seed} gave two different runs: {:x}, {:x}",
            first.trace_hash,
            again.trace_hash
        );
    }
    let held = first.verdict == Verdict::Held;
    if json {
        println!("{}", describe(seed, &first));
        return Ok(held);
    }
    first.log.iter().for_each(|line| println!("{line}"));
    println!(
        "\nseed {seed}: {} events in {} s of virtual time, trace {:016x}",
        first.events,
        first.virtual_ms / 1_000,
        first.trace_hash
    );
    match held {
        true => println!("everything held"),
        false => explain(seed),
    }
    Ok(held)
}

fn describe(seed: u64, result: &Run) -> serde_json::Value {
    let (held, broken) = match &result.verdict {
        Verdict::Held => (true, None),
        Verdict::Broken { at_ms, what } => (false, Some(json!({ "at_ms": at_ms, "what": what }))),
    };
    json!({
        "seed": seed,
        "held": held,
        "broken": broken,
        "trace": format!("{:016x}", result.trace_hash),
        "events": result.events,
        "virtual_ms": result.virtual_ms,
    })
}

fn many(options: &Options) -> Result<bool> {
    let report = run_set(&options.set);
    let holes = match report.seeds >= STANDARD_SET {
        true => report.coverage.holes(),
        false => Vec::new(),
    };
    let held = report.failures.is_empty() && holes.is_empty();
    if options.json {
        println!("{}", summary(&report, &holes));
        return Ok(held);
    }
    println!("{:<10} {:<28} {:>12}", "group", "met", "times");
    for (group, name, count) in report.coverage.rows() {
        println!("{group:<10} {name:<28} {count:>12}");
    }
    println!(
        "\n{} seeds, {} events, {:.1} hours of virtual time in {:.1} s: {:.2} hours per second; trace {:016x}",
        report.seeds,
        report.events,
        report.virtual_hours_per_second() * report.seconds,
        report.seconds,
        report.virtual_hours_per_second(),
        report.trace_hash
    );
    for hole in &holes {
        println!("never met: {hole}");
    }
    for (seed, what) in &report.failures {
        println!("seed {seed} fails: {what}");
    }
    match report.failures.first() {
        Some((seed, _)) => explain(*seed),
        None if held => println!("everything held"),
        None => {}
    }
    Ok(held)
}

fn summary(report: &Report, holes: &[String]) -> serde_json::Value {
    let failures: Vec<_> =
        report.failures.iter().map(|(seed, what)| json!({ "seed": seed, "what": what })).collect();
    let coverage: Vec<_> = report
        .coverage
        .rows()
        .into_iter()
        .map(|(group, name, count)| json!({ "group": group, "name": name, "count": count }))
        .collect();
    json!({
        "seeds": report.seeds,
        "events": report.events,
        "virtual_hours": report.virtual_hours_per_second() * report.seconds,
        "seconds": report.seconds,
        "virtual_hours_per_second": report.virtual_hours_per_second(),
        "trace": format!("{:016x}", report.trace_hash),
        "failures": failures,
        "holes": holes,
        "coverage": coverage,
    })
}

/// The fewest events that the failure needs, and what the cluster did then.
fn explain(seed: u64) {
    let small = minimise(&Scenario::random(seed));
    let result = run_caught(&small);
    println!("\nseed {seed}, with the fewest events that still fail:");
    println!("  cluster: {:?}", small.cluster);
    small.events.iter().for_each(|timed| println!("  {timed}"));
    println!("  all faults end after {} ms", small.heal_at_ms);
    println!("\nwhat happened:");
    result.log.iter().for_each(|line| println!("  {line}"));
    if let Verdict::Broken { at_ms, what } = &result.verdict {
        println!("  {:>4}.{:03}  BROKEN   {what}", at_ms / 1_000, at_ms % 1_000);
    }
    println!("\nreplay: cargo xtask sim --seed {seed}");
}
