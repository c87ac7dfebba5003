//! `cargo xtask bench scale`: how memory and time of the controller's core grow with the cluster.
#![forbid(unsafe_code)]
// A person reads what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod cell;
mod cluster;
mod growth;
mod packing;

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Sizes as nodes and VMs: VMs grow on the same nodes, nodes under the same VMs, then both.
const SIZES: [(u64, u64); 10] = [
    (250, 12_500),
    (250, 25_000),
    (250, 50_000),
    (250, 75_000),
    (200, 20_000),
    (400, 20_000),
    (800, 20_000),
    (1_600, 20_000),
    (500, 50_000),
    (1_000, 100_000),
];
const QUICK: [(u64, u64); 6] =
    [(20, 500), (20, 1_000), (20, 2_000), (40, 1_000), (80, 1_000), (100, 10_000)];

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let ["cell", nodes, vms] = words[..] {
        println!("{}", cell::measure(nodes.parse()?, vms.parse()?)?);
        return Ok(());
    }
    if let Some(unknown) = words.iter().find(|word| !matches!(**word, "--json" | "--quick")) {
        bail!("unknown option `{unknown}`");
    }
    let sizes: &[(u64, u64)] = if words.contains(&"--quick") { &QUICK } else { &SIZES };
    let mut cells = Vec::new();
    for (nodes, vms) in sizes {
        eprintln!("{nodes} nodes, {vms} VMs");
        cells.push(in_own_process(*nodes, *vms)?);
    }
    let (growth, packing) = (growth::exponents(&cells), packing::measure()?);
    let result = json!({ "growth": growth, "packing": packing, "cells": cells });
    match words.contains(&"--json") {
        true => println!("{result}"),
        false => print!("{}", growth::table(&result)),
    }
    Ok(())
}

fn in_own_process(nodes: u64, vms: u64) -> Result<Value> {
    let own = std::env::current_exe().context("find this program")?;
    let arguments = ["cell".to_owned(), nodes.to_string(), vms.to_string()];
    let output = Command::new(own).args(arguments).output().context("start a measurement")?;
    if !output.status.success() {
        bail!("{nodes} nodes, {vms} VMs: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("read a measurement")
}
