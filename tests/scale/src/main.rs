//! `cargo xtask bench scale`: how memory and time of the controllers grow with the cluster.
#![forbid(unsafe_code)]
// A person reads what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod cell;
mod cluster;
mod growth;
mod grpc;
mod packing;

use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};

/// How the controllers grow with nodes and VMs.
///
/// Clusters in memory, random clusters that are packed, and a real controller group under the load of
/// simulated hosts.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    /// Print the result as one JSON object on standard output
    #[arg(long)]
    json: bool,
    /// Small clusters: only to see that it works
    #[arg(long)]
    quick: bool,
    /// Measure this part alone
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
    /// Sizes of the clusters with real controllers, like 50x1000
    #[arg(long, value_name = "NODESxVMS,..", value_delimiter = ',')]
    grpc: Vec<Size>,
    #[command(subcommand)]
    piece: Option<Piece>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Core,
    Packing,
    Grpc,
}

/// What this program does in processes of its own, so that memory and CPU time are those of one thing.
#[derive(Subcommand)]
#[command(hide = true)]
enum Piece {
    /// One cluster in memory.
    Core { nodes: u64, vms: u64 },
    /// One group of real controllers, watched at rest for so many seconds.
    Grpc { nodes: usize, vms: usize, rest_s: u64 },
    /// The database of a controller that does not run any more.
    Snapshot { directory: PathBuf, controller: u64 },
}

/// Nodes and VMs.
#[derive(Clone, Copy)]
struct Size(u64, u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (nodes, vms) = text.split_once('x').ok_or("give nodes and VMs like 50x1000")?;
        let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is not a number"));
        Ok(Self(number(nodes)?, number(vms)?))
    }
}

/// VMs grow on the same nodes, nodes under the same VMs, then both.
const CORE: [Size; 10] = [
    Size(250, 12_500),
    Size(250, 25_000),
    Size(250, 50_000),
    Size(250, 75_000),
    Size(200, 20_000),
    Size(400, 20_000),
    Size(800, 20_000),
    Size(1_600, 20_000),
    Size(500, 50_000),
    Size(1_000, 100_000),
];
const CORE_QUICK: [Size; 6] = [
    Size(20, 500),
    Size(20, 1_000),
    Size(20, 2_000),
    Size(40, 1_000),
    Size(80, 1_000),
    Size(100, 10_000),
];
const GRPC: [Size; 7] = [
    Size(50, 1_000),
    Size(50, 2_000),
    Size(50, 5_000),
    Size(25, 2_000),
    Size(100, 2_000),
    Size(200, 2_000),
    Size(200, 20_000),
];
const GRPC_QUICK: [Size; 3] = [Size(10, 100), Size(10, 200), Size(20, 100)];
const REST_S: u64 = 10;
const REST_S_QUICK: u64 = 2;

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.piece {
        Some(Piece::Core { nodes, vms }) => println!("{}", cell::measure(nodes, vms)?),
        Some(Piece::Grpc { nodes, vms, rest_s }) => {
            bellwether_pki::install_crypto_provider();
            let measured = grpc::measure(nodes, vms, Duration::from_secs(rest_s));
            println!("{}", runtime()?.block_on(measured)?);
        }
        Some(Piece::Snapshot { directory, controller }) => {
            let measured = grpc::snapshot::measure(&directory, controller);
            println!("{}", runtime()?.block_on(measured)?);
        }
        None => report(&cli)?,
    }
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Runtime::new().context("start the asynchronous runtime")
}

fn report(cli: &Cli) -> Result<()> {
    let wanted = |part| cli.only.is_none_or(|only| only == part);
    let mut result = json!({});
    if wanted(Part::Core) {
        let cells = core_cells(if cli.quick { &CORE_QUICK } else { &CORE })?;
        result["growth"] = growth::exponents(&cells, &cell::MEASURES);
        result["cells"] = cells.into();
    }
    if wanted(Part::Packing) {
        result["packing"] = packing::measure()?;
    }
    if wanted(Part::Grpc) {
        let sizes: &[Size] = match (cli.grpc.as_slice(), cli.quick) {
            ([], false) => &GRPC,
            ([], true) => &GRPC_QUICK,
            (sizes, _) => sizes,
        };
        let cells = grpc_cells(sizes, if cli.quick { REST_S_QUICK } else { REST_S })?;
        let growth = growth::exponents(&cells, &grpc::MEASURES);
        result["grpc"] = json!({ "growth": growth, "cells": cells });
    }
    match cli.json {
        true => println!("{result}"),
        false => print!("{}", text(&result)),
    }
    Ok(())
}

fn core_cells(sizes: &[Size]) -> Result<Vec<Value>> {
    let cell = |Size(nodes, vms): &Size| {
        eprintln!("{nodes} nodes, {vms} VMs in memory");
        measured(&mut own_process(&["core", &nodes.to_string(), &vms.to_string()])?)
    };
    sizes.iter().map(cell).collect()
}

fn grpc_cells(sizes: &[Size], rest_s: u64) -> Result<Vec<Value>> {
    let cell = |Size(nodes, vms): &Size| {
        let words = [nodes, vms, &rest_s].map(u64::to_string);
        let [nodes, vms, rest_s] = words.each_ref().map(String::as_str);
        eprintln!("{nodes} nodes, {vms} VMs over gRPC");
        measured(&mut own_process(&["grpc", nodes, vms, rest_s])?)
    };
    sizes.iter().map(cell).collect()
}

fn own_process(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    command.args(arguments);
    Ok(command)
}

/// What a process of its own has measured; its progress goes to standard error.
fn measured(command: &mut Command) -> Result<Value> {
    let output = command.stderr(Stdio::inherit()).output().context("start a measurement")?;
    if !output.status.success() {
        bail!("the measurement {command:?} failed");
    }
    serde_json::from_slice(&output.stdout).context("read a measurement")
}

/// The whole result for people.
fn text(result: &Value) -> String {
    let mut text = String::new();
    let table = |part: &Value, measures: &[&str]| {
        let cells = part["cells"].as_array().map(Vec::as_slice).unwrap_or_default();
        growth::table(cells, &part["growth"], measures)
    };
    if result.get("cells").is_some() {
        let _ = writeln!(
            text,
            "in memory, CPU time of one thread:\n{}",
            table(result, &cell::MEASURES)
        );
    }
    if let Some(packing) = result.get("packing") {
        let _ = writeln!(text, "{}", packing::sentence(packing));
    }
    if let Some(grpc) = result.get("grpc") {
        let _ = writeln!(text, "three controllers over gRPC:\n{}", table(grpc, &grpc::MEASURES));
    }
    text
}
