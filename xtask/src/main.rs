//! `cargo xtask …`: everything that a person or CI runs.
#![forbid(unsafe_code)]
// A person reads what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod check_deps;
mod cluster;
mod command;
mod lab;
mod linux;
mod mutate;
mod package;
mod scale;
mod setup;
mod sim;
mod source;
mod verify;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
Everything that a person or CI runs.

Usage: cargo xtask <command> [options]

Commands:
  demo        Three nodes on this machine run, move and rescue a real VM
  test        Set up, build, and run all tests
  verify      What CI runs: formatting, lints, dependency rules, licences, then all tests
  bench       Measurements: `cargo xtask bench migrate`, `cargo xtask bench scale`
  torture     Faults at random moments of moves: `cargo xtask torture migrate`
  sim         Years of failures on the decision code, under seeds
  mutate-sim  Break the product on purpose: the simulator must notice
  lab         A cluster of real hosts under emulation: power cuts, frozen hosts, pulled cables
  linux-guest Debian's kernel under our VMM, on a host with a standard KVM
  package     Make the Debian packages that users install
  check-deps  Check which crate may use what, and where unsafe code may be
  setup       Install what is missing on this machine

Each command explains itself with --help.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let Some((command, rest)) = arguments.split_first() else {
        println!("{HELP}");
        bail!("no command was given");
    };
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    match command.as_str() {
        "demo" => cluster::demo(&rest),
        "bench" => cluster::bench(&rest),
        "test" => verify::test(&rest),
        "verify" => verify::verify(&rest),
        "torture" => cluster::torture(&rest),
        "sim" => sim::sim(&rest),
        "mutate-sim" => mutate::mutate(&rest),
        "check-deps" => check_deps::run(&rest),
        "lab" => lab::run_command(&rest),
        "linux-guest" => linux::run_command(&rest),
        "package" => package::run_command(&rest),
        "setup" => setup::run(&rest),
        "help" | "-h" | "--help" => {
            println!("{HELP}");
            Ok(())
        }
        other => bail!("there is no command `{other}`\n\n{HELP}"),
    }
}
