//! The simulator: years of failures on the decision code, and proof that it would find a mistake.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{cargo, options, output, run};

/// The profile in which the simulator is built: optimised, with every check on.
pub const PROFILE: &str = "sim";
/// Its program.
pub const PROGRAM: &str = "bellwether-simulate";

const OPENRAFT_HELP: &str = "\
openraft itself on our store and our network, while nearly everything goes wrong.

Usage: cargo xtask sim --openraft [--minutes N] [--seed N]

Controllers in one thread, under a paused clock, on disks in memory that lose what was not flushed.
Each seed is a minute of virtual time; every acknowledged write has to be there, every read and
write has to fit into the one order that the log is. openraft draws its election timeouts itself, so
that a seed is one schedule of faults, not one run bit for bit.

Options:
  --minutes N  Run for so many minutes (default 5)
  --seed N     Begin with this seed (default 1)";

/// Runs the long form of a test of the Raft crate.
fn openraft(arguments: &[&str]) -> Result<()> {
    let (mut minutes, mut seed) = (5_u64, 1_u64);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut number = || -> Result<u64> {
            let text = rest.next().with_context(|| format!("{argument} needs a number"))?;
            text.parse().with_context(|| format!("{argument}: `{text}` is not a number"))
        };
        match *argument {
            "--openraft" => {}
            "--minutes" => minutes = number()?,
            "--seed" => seed = number()?,
            other => return options(&[other], &[], OPENRAFT_HELP).map(drop),
        }
    }
    let test = "tests::chaos::seed_after_seed";
    let mut command = cargo(&["test", "--quiet", "-p", "bellwether-raft", "--lib", "--"]);
    command.args(["--ignored", "--exact", test, "--nocapture"]);
    command.env("BELLWETHER_CHAOS_SECONDS", (minutes * 60).to_string());
    run(command.env("BELLWETHER_CHAOS_SEED", seed.to_string()))
}

/// What CI runs: the scenario files, and seeds, which are checked to replay bit for bit, in under
/// five minutes.
pub fn standard_set() -> Result<()> {
    sim(&["--golden"])?;
    sim(&["--seeds", "2000"])
}

/// Builds the simulator and runs it with what was given; it explains itself.
pub fn sim(arguments: &[&str]) -> Result<()> {
    if arguments.contains(&"--openraft") {
        return openraft(arguments);
    }
    run(&mut cargo(&["build", "--quiet", "--profile", PROFILE, "-p", "bellwether-simulation"]))?;
    let mut program = Command::new(target()?.join(PROFILE).join(PROGRAM));
    let status = program.args(arguments).status()?;
    match status.success() {
        true => Ok(()),
        false => bail!("the simulation found something, or not enough; see above"),
    }
}

/// Where cargo builds to.
pub fn target() -> Result<PathBuf> {
    let text = output(&mut cargo(&["metadata", "--format-version", "1", "--no-deps", "--locked"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    match metadata["target_directory"].as_str() {
        Some(directory) => Ok(directory.into()),
        None => bail!("cargo's metadata names no target directory"),
    }
}
