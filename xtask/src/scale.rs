//! `cargo xtask bench scale`: the core's growth, without clusters of processes.

use anyhow::Result;

use crate::command::{cargo, options, run, target_dir};

const HELP: &str = "\
How the controller's core grows with nodes and VMs.

Usage: cargo xtask bench scale [--json] [--quick]

Ten clusters in memory, up to 1,000 nodes with 100,000 VMs, each in a process of its own: memory
of the state, commands per second, size of a snapshot and the time to write and to read it, the time in
which a restarted controller recovers (a snapshot and the 5,000 commands that may stand behind it), a
round of planning when nothing is to be done, the first round of draining a tenth of the nodes, and
all planning when a tenth of the nodes fails at once. Then random clusters are packed until nothing fits
any more, which must use 95 percent of them: no plan can use more than all.
Times are CPU time of one core. For each measure the exponent of its growth is fitted, over VMs on
the same nodes and over nodes with the same VMs: 1 is linear.

Options:
  --json   Print the result as one JSON object on standard output
  --quick  Small clusters: only to see that it works";

pub fn bench(arguments: &[&str]) -> Result<()> {
    if !options(arguments, &["--json", "--quick"], HELP)? {
        return Ok(());
    }
    run(&mut cargo(&["build", "--release", "-p", "bellwether-scale"]))?;
    let program = target_dir(false).join("bellwether-bench-scale");
    run(std::process::Command::new(program).args(arguments))
}
