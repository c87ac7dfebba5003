//! The simulator: years of failures on the decision code, and proof that it would find a mistake.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command::{cargo, output, run};

/// The profile in which the simulator is built: optimised, with every check on.
pub const PROFILE: &str = "sim";
/// Its program.
pub const PROGRAM: &str = "bellwether-simulate";

/// Builds the simulator and runs it with what was given; it explains itself.
pub fn sim(arguments: &[&str]) -> Result<()> {
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
