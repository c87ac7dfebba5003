//! Programs that run whole clusters: the demonstration and the benchmarks.

use anyhow::{Result, bail};

use crate::command::{cargo, guest_cargo, options, run, target_dir};
use crate::{lab, scale, setup};

const DEMO_HELP: &str = "\
Three nodes on this machine run, move and rescue a real VM.

Usage: cargo xtask demo [--json] [--keep] [--debug]

Builds what is needed, starts a cluster of three nodes (each with a controller and an agent of its
own, mutual TLS between all of them, a shared directory as storage), and then creates a VM, moves
it, kills its node, kills the leader, brings the node back, and saves and restores the VM. Each
claim is checked; the exit status is 0 only if all of them hold. It leaves nothing behind.
Where this machine offers no KVM, the same is done on emulated hosts (`cargo xtask lab`).

Options:
  --json   Print the measurements as one JSON object on standard output
  --keep   Leave the cluster running at the end, and print how to talk to it
  --debug  Use the debug build, which is quicker to make and slower to run";

const BENCH_HELP: &str = "\
Measurements.

Usage: cargo xtask bench migrate [--json] [--quick] [--debug]
       cargo xtask bench scale --help

migrate: how long a guest stands still when it is moved. 30 moves each with 256 MiB, 1 GiB and
4 GiB of filled memory, rewritten at 0, 10, 50 and 90 % of what the same storage gives to a plain
direct writer in the same run; a quarter as many without pre-copy; saves and restores.

Options:
  --json   Print the result as one JSON object on standard output
  --quick  4 moves each with 128 MiB and 256 MiB: only to see that it works
  --debug  Use the debug build: only to see that it works";

const TORTURE_HELP: &str = "\
Faults at random moments of moves and saves.

Usage: cargo xtask torture migrate [--minutes N] [--seed N] [--debug]

Each round begins a move or a save of a busy VM, kills or stops somebody, fills the storage, tears
the file or takes its directory away after a random while, heals, and checks: one VMM runs the
guest, its memory and its journal are whole, a new attempt succeeds, no file is left over. The first
failure ends it and prints the seed and the round.

Options:
  --minutes N  How long to go on (10)
  --seed N     Chooses the faults and their moments (from the time of day)
  --debug      Use the debug build, which is quicker to make and slower to run";

pub fn torture(arguments: &[&str]) -> Result<()> {
    let Some(("migrate", rest)) = arguments.split_first().map(|(name, rest)| (*name, rest)) else {
        println!("{TORTURE_HELP}");
        let asked = arguments.iter().any(|word| matches!(*word, "-h" | "--help"));
        return if asked { Ok(()) } else { bail!("say what is to be tortured: migrate") };
    };
    let is_option = |word: &&&str| word.parse::<u64>().is_err();
    let words: Vec<&str> = rest.iter().filter(is_option).copied().collect();
    match options(&words, &["--minutes", "--seed", "--debug"], TORTURE_HELP)? {
        true => launch("bellwether-torture-migrate", rest),
        false => Ok(()),
    }
}

pub fn demo(arguments: &[&str]) -> Result<()> {
    if !options(arguments, &["--json", "--keep", "--debug"], DEMO_HELP)? {
        return Ok(());
    }
    if let Err(error) = setup::check_kvm() {
        println!(
            "{error:#}\n\nSo the demonstration runs on emulated hosts, whose processors have AMD-V: it takes \
             minutes, and its times mean nothing. docs/lab.md tells more.\n"
        );
        return demo_in_lab(arguments);
    }
    launch("bellwether-demo", arguments)
}

/// The same on hosts of the lab; they need no KVM of this machine.
fn demo_in_lab(arguments: &[&str]) -> Result<()> {
    if arguments.contains(&"--keep") {
        return lab::run_command(&["up", "--keep"]);
    }
    let mut words = vec!["run", "demo"];
    words.extend(arguments.iter().filter(|word| **word == "--json"));
    lab::run_command(&words)
}

pub fn bench(arguments: &[&str]) -> Result<()> {
    let (name, rest) = match arguments.split_first() {
        Some((name, rest)) if !name.starts_with('-') => (*name, rest),
        _ => ("", arguments),
    };
    if name == "scale" {
        return scale::bench(rest);
    }
    if !options(rest, &["--json", "--quick", "--debug"], BENCH_HELP)? {
        return Ok(());
    }
    match name {
        "migrate" => launch("bellwether-bench-migrate", rest),
        "" => bail!("which benchmark?\n\n{BENCH_HELP}"),
        other => bail!("there is no benchmark `{other}`\n\n{BENCH_HELP}"),
    }
}

fn launch(program: &str, arguments: &[&str]) -> Result<()> {
    setup::ensure_packages()?;
    setup::check_kvm()?;
    build_guest()?;
    let debug = arguments.contains(&"--debug");
    let mut words = vec!["build", "--bins"];
    for package in PROGRAM_PACKAGES {
        words.extend(["-p", package]);
    }
    if !debug {
        words.push("--release");
    }
    run(&mut cargo(&words))?;
    let rest: Vec<&str> = arguments.iter().copied().filter(|word| *word != "--debug").collect();
    run(std::process::Command::new(target_dir(debug).join(program)).args(rest))
}

/// The packages whose programs a cluster consists of.
const PROGRAM_PACKAGES: [&str; 5] = [
    "bellwether-controller",
    "bellwether-agent",
    "bellwether-vmm",
    "bell",
    "bellwether-cluster-tests",
];

pub fn build_guest() -> Result<()> {
    run(&mut guest_cargo(&["build", "--release", "--bin", "bellwether-guest"]))
}
