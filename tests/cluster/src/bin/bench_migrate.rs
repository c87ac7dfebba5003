//! How long a guest stands still when it is moved, by the size of its memory.
#![forbid(unsafe_code)]
// A person or a program reads what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bellwether_cluster_tests::lines::Line;
use bellwether_cluster_tests::measure::{direct_writer_mib_s, percentile};
use bellwether_cluster_tests::{Cluster, Options, StorageKind, Watch, vmm, wait_for};
use clap::Parser;
use serde_json::{Value, json};

/// How long a guest stands still when it is moved.
///
/// Moves a VM to and fro between two nodes of a cluster on this machine. Its memory is filled with
/// data that has no zero pages. The outage is the largest gap between two ticks of the guest, by
/// the guest's own clock. `dirty_fraction` is the rate at which the guest dirties memory meanwhile,
/// as a fraction of what the storage gives to a plain direct writer in the same run.
#[derive(Parser)]
struct Cli {
    /// Print the result as one JSON object on standard output
    #[arg(long)]
    json: bool,
    /// Few moves of small VMs: only to see that it works
    #[arg(long)]
    quick: bool,
    /// The storage to measure [default: a directory in /tmp]
    #[arg(long, value_name = "DIR")]
    storage: Option<PathBuf>,
    /// The rate at which the guest dirties memory, MiB/s
    #[arg(long, value_name = "MIB", default_value_t = 8)]
    dirty_mib_s: u64,
}

const SIZES_MIB: [u64; 3] = [256, 1024, 4096];
const QUICK_SIZES_MIB: [u64; 2] = [128, 256];
const MOVES: usize = 20;
const QUICK_MOVES: usize = 3;
const TICK_MS: u64 = 5;
/// Filling 4 GiB takes a while where every first touch of a page is slow.
const FILL_TIME: Duration = Duration::from_secs(300);
const MOVE_TIME: Duration = Duration::from_secs(120);

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let (sizes, moves): (&[u64], usize) = match cli.quick {
        true => (&QUICK_SIZES_MIB, QUICK_MOVES),
        false => (&SIZES_MIB, MOVES),
    };
    let storage = cli.storage.clone().map_or(StorageKind::Directory, StorageKind::Below);
    let most = sizes.iter().copied().max().unwrap_or(0);
    let cluster =
        Cluster::start(Options { nodes: 2, memory_mib: most, storage, ..Options::default() })
            .await?;
    let writer_mib_s = direct_writer_mib_s(cluster.storage(), if cli.quick { 256 } else { 2048 })?;
    eprintln!("plain direct writer: {writer_mib_s:.0} MiB/s");
    let mut cells = Vec::new();
    for &memory_mib in sizes {
        let outages = measure(&cluster, memory_mib, moves, cli.dirty_mib_s).await?;
        cells.push(cell(memory_mib, cli.dirty_mib_s as f64 / writer_mib_s, outages));
    }
    cluster.finish()?;
    if cli.json {
        println!("{}", json!({ "cells": cells, "writer_mib_s": writer_mib_s }));
    }
    Ok(())
}

fn cell(memory_mib: u64, dirty_fraction: f64, mut outages: Vec<f64>) -> Value {
    outages.sort_by(f64::total_cmp);
    let [p50, p99, max] = [0.5, 0.99, 1.0].map(|part| percentile(&outages, part));
    eprintln!("{memory_mib:5} MiB: outage p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms");
    json!({
        "memory_mib": memory_mib,
        "dirty_fraction": dirty_fraction,
        "moves": outages.len(),
        "outage_ms": { "p50": p50, "p99": p99, "max": max },
    })
}

/// The outage of each of the moves, in milliseconds.
async fn measure(cluster: &Cluster, memory_mib: u64, moves: usize, dirty: u64) -> Result<Vec<f64>> {
    let name = format!("bench-{memory_mib}");
    let pattern_mib = 16;
    let guest = cluster.guest(&name)?.memory_mib(memory_mib).cmdline(format!(
        "tick_ms={TICK_MS} mem_mib={pattern_mib} dirty_mib_s={dirty} verify_mib_s=8 journal_ms=100 fill=100"
    ));
    let watch = cluster.run(&guest).await?;
    let is_filled = |line: &Line| *line == Line::Filled;
    watch.heard_since(0, "the guest to fill its memory", FILL_TIME, is_filled).await?;
    let mut outages = Vec::new();
    for number in 1..=moves {
        let outage = move_once(cluster, &watch, &name).await?;
        eprintln!("{memory_mib:5} MiB, move {number:2}: {outage:.1} ms");
        outages.push(outage);
    }
    watch.verifies_again(MOVE_TIME).await?;
    watch.check()?;
    cluster.remove(&name).await?;
    Ok(outages)
}

async fn move_once(cluster: &Cluster, watch: &Watch, name: &str) -> Result<f64> {
    let home = cluster.home_of(name).await?;
    let to = cluster.other_than(&[home])?;
    let mark = watch.mark();
    let task = cluster.admin().migrate(name, &format!("node{to}")).await?;
    let task = cluster.admin().task_done(task, MOVE_TIME).await?;
    watch.ticks_on(MOVE_TIME).await?;
    let gap = watch.largest_gap(mark).context("the guest printed no ticks")?;
    let stopped = task.measures.get("outage_us").copied().unwrap_or(0);
    let inside = u64::try_from(gap.inside.as_micros())?;
    // The longest pause is the move, or a stall while memory comes after it: both are the guest's
    // outage. A clock that stood still with the guest would be no measurement.
    if inside < stopped * 8 / 10 {
        bail!(
            "the guest's clock counted {inside} us of a move that took {stopped} us; its parts: {:?}",
            task.measures
        );
    }
    loaded(cluster, watch).await?;
    Ok(gap.inside.as_secs_f64() * 1_000.0)
}

/// Waits until all memory is in place: a move before that would measure the loading of the last.
async fn loaded(cluster: &Cluster, watch: &Watch) -> Result<()> {
    wait_for("the memory to be loaded", MOVE_TIME, async || {
        for incarnation in cluster.running_instances(watch.vm_id()).await {
            let status = vmm::status(&incarnation.socket).await?;
            if status.memory_loaded_bytes == status.memory_total_bytes {
                return Ok(Some(()));
            }
        }
        Ok(None)
    })
    .await
}
