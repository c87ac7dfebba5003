//! `cargo xtask bench scale`: how the controllers grow, in memory and as processes under load.

use anyhow::Result;

use crate::command::{cargo, options, run, target_dir};

const HELP: &str = "\
How the controllers grow with nodes and VMs.

Usage: cargo xtask bench scale [--json] [--quick] [--only PART] [--grpc NODESxVMS,..]

core: ten clusters in memory, up to 1,000 nodes with 100,000 VMs, each in a process of its own: memory
of the state, commands per second, size of a snapshot and the time to write and to read it, the time in
which a restarted controller recovers (a snapshot and the 5,000 commands that may stand behind it), a
round of planning when nothing is to be done, the first round of draining a tenth of the nodes, and
all planning when a tenth of the nodes fails at once. Times are CPU time of one core.

packing: random clusters are packed until nothing fits any more, which must use 95 percent of them:
no plan can use more than all.

grpc: three real controllers with mutual TLS and their logs on the disk of /tmp, and one process of
simulated hosts, which join, register, renew and report as agents do, and answer orders as if their
VMMs had carried them out. They are a load for the controllers and no test of agents. Of each size:
joining; creating VMs and starting all of them, 32 requests at a time; CPU and memory at rest; the
snapshot of a controller that was killed, made again by a process of its own; its restart until it
is as far as the others; a tenth of the hosts losing power, until all their VMs run elsewhere. CPU
time is that of the controllers alone; wall time is that of all of it on this machine.

For each measure the exponent of its growth is fitted, over VMs on the same nodes and over nodes with
the same VMs: 1 is linear.

Options:
  --json              Print the result as one JSON object on standard output: growth, cells, packing,
                      grpc (with growth and cells of its own). Progress goes to standard error
  --quick             Small clusters: only to see that it works; a minute or two
  --only PART         Measure core, packing or grpc alone
  --grpc 50x1000,..   Other sizes of the clusters with real controllers: nodes and VMs";

/// What a group of controllers consists of, besides the benchmark itself.
const PROGRAM_PACKAGES: [&str; 4] =
    ["bellwether-scale", "bellwether-controller", "bell", "bellwether-cluster-tests"];

pub fn bench(arguments: &[&str]) -> Result<()> {
    let is_option = |word: &&&str| word.starts_with('-');
    let words: Vec<&str> = arguments.iter().filter(is_option).copied().collect();
    if !options(&words, &["--json", "--quick", "--only", "--grpc"], HELP)? {
        return Ok(());
    }
    let mut build = vec!["build", "--release", "--bins"];
    build.extend(PROGRAM_PACKAGES.iter().flat_map(|package| ["-p", package]));
    run(&mut cargo(&build))?;
    let program = target_dir(false).join("bellwether-bench-scale");
    run(std::process::Command::new(program).args(arguments))
}
