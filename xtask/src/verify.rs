//! The tests, and everything that CI checks besides.

use std::time::Instant;

use anyhow::Result;

use crate::command::{cargo, guest_cargo, is_installed, options, root, run};
use crate::{check_deps, cluster, lab, setup, sim};

const TEST_HELP: &str = "\
Set up, build, and run all tests.

Usage: cargo xtask test

Unit and property tests of all crates, the test guest's own, clusters of real processes on
/dev/kvm, 2000 seeds of the simulator, and the lab's standard scenarios on hosts under emulation.
Installs missing packages first. Runs cargo-nextest if it is there, else `cargo test`.";

const VERIFY_HELP: &str = "\
What CI runs, read-only: formatting, lints, dependency rules, licences, then all tests.

Usage: cargo xtask verify [--static]

Options:
  --static  Leave the tests out";

pub fn test(arguments: &[&str]) -> Result<()> {
    if !options(arguments, &[], TEST_HELP)? {
        return Ok(());
    }
    setup::ensure_test_packages()?;
    setup::check_kvm()?;
    run_tests()
}

pub fn verify(arguments: &[&str]) -> Result<()> {
    if !options(arguments, &["--static"], VERIFY_HELP)? {
        return Ok(());
    }
    setup::ensure_test_packages()?;
    setup::ensure_components();
    let started = Instant::now();
    check_statically()?;
    eprintln!("static checks: {} s", started.elapsed().as_secs());
    if arguments.contains(&"--static") {
        return Ok(());
    }
    setup::check_kvm()?;
    run_tests()
}

fn check_statically() -> Result<()> {
    run(&mut cargo(&["fmt", "--all", "--check"]))?;
    run(&mut guest_cargo(&["fmt", "--all", "--check"]))?;
    check_deps::run(&[])?;
    run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    run(&mut guest_cargo(&["clippy", "--workspace", "--release", "--", "-D", "warnings"]))?;
    match is_installed("cargo-deny") {
        true => run(&mut cargo(&["deny", "check"])),
        false => {
            eprintln!(
                "cargo-deny is not installed (`cargo xtask setup --tools`): licences and advisories are not checked"
            );
            Ok(())
        }
    }
}

fn run_tests() -> Result<()> {
    let started = Instant::now();
    cluster::build_guest()?;
    run(&mut guest_cargo(&["test", "-p", "bellwether-guest-checks"]))?;
    // Programs, tests and the examples that tests start, in one go: built one after the other
    // their dependencies would differ in features and be compiled twice.
    run(&mut cargo(&["build", "--workspace", "--bins", "--tests", "--examples"]))?;
    eprintln!("build: {} s", started.elapsed().as_secs());
    run(&mut cargo(&["test", "--quiet", "--workspace", "--doc"]))?;
    match is_installed("cargo-nextest") {
        true => run_nextest(),
        false => run_cargo_test(),
    }?;
    sim::standard_set()?;
    let lab = Instant::now();
    lab::standard_set()?;
    eprintln!("lab: {} s", lab.elapsed().as_secs());
    eprintln!("all tests passed in {} s, the build included", started.elapsed().as_secs());
    Ok(())
}

fn run_nextest() -> Result<()> {
    let config = root().join("xtask/nextest.toml");
    let config = config.to_string_lossy();
    run(&mut cargo(&[
        "nextest",
        "run",
        "--workspace",
        "--bins",
        "--lib",
        "--tests",
        "--config-file",
        &config,
    ]))
}

/// Clusters at the same time would only slow each other down, so their tests come one by one.
fn run_cargo_test() -> Result<()> {
    eprintln!("cargo-nextest is not installed (`cargo xtask setup --tools`): using `cargo test`");
    let clusters = "bellwether-cluster-tests";
    run(&mut cargo(&[
        "test",
        "--workspace",
        "--bins",
        "--lib",
        "--tests",
        "--exclude",
        clusters,
        "--no-fail-fast",
    ]))?;
    run(&mut cargo(&[
        "test",
        "-p",
        clusters,
        "--bins",
        "--lib",
        "--tests",
        "--no-fail-fast",
        "--",
        "--test-threads=1",
    ]))
}
