//! How long a guest stands still when it is moved: by the size of its memory, by how fast it dirties
//! it, and in comparison with a move that stops it first.
#![forbid(unsafe_code)]
// A person or a program reads what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bellwether_cluster_tests::lines::Line;
use bellwether_cluster_tests::measure::{direct_writer_mib_s, load_average, percentile};
use bellwether_cluster_tests::{Cluster, Options, StorageKind, Watch, vmm, wait_for};
use bellwether_proto::v1;
use clap::Parser;
use serde_json::{Value, json};

/// How long a guest stands still when it is moved.
///
/// Moves VMs to and fro between two nodes of a cluster on this machine. Their memory is filled with
/// data that has no zero pages, and half of it is rewritten all the time, at a rate that is a
/// fraction of what the storage gives to a plain direct writer in the same run. The outage is the
/// largest gap between two ticks of the guest, by the guest's own clock. The same VMs are moved
/// with pre-copy and, as the baseline, without.
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
    /// Sizes of the VMs' memory, MiB
    #[arg(long, value_name = "MIB,..", value_delimiter = ',', default_value = "256,1024,4096")]
    sizes: Vec<u64>,
    /// How fast the guests dirty memory, as fractions of the plain writer
    #[arg(long, value_name = "PART,..", value_delimiter = ',', default_value = "0,0.1,0.5,0.9")]
    dirty: Vec<f64>,
    /// Moves of each cell; of the baseline a quarter of them
    #[arg(long, value_name = "N", default_value_t = 30)]
    moves: usize,
}

const TICK_MS: u64 = 2;
/// Filling 4 GiB takes a while where every first touch of a page is slow.
const FILL_TIME: Duration = Duration::from_secs(300);
const MOVE_TIME: Duration = Duration::from_secs(120);

#[tokio::main]
async fn main() -> Result<()> {
    let mut cli = Cli::parse();
    if cli.quick {
        (cli.sizes, cli.dirty, cli.moves) = (vec![128, 256], vec![0.0, 0.1], 4);
    }
    let storage = cli.storage.clone().map_or(StorageKind::Directory, StorageKind::Below);
    let most = cli.sizes.iter().copied().max().unwrap_or(0);
    let options = Options { memory_mib: most, storage, ..Options::patient(2) };
    let cluster = Cluster::start(options).await?;
    let writer_mib_s = direct_writer_mib_s(cluster.storage(), if cli.quick { 256 } else { 2048 })?;
    let load = load_average()?;
    eprintln!("plain direct writer: {writer_mib_s:.0} MiB/s; load of the machine: {load:.1}");
    let mut run = Run { cluster, writer_mib_s, moves: cli.moves, cells: Cells::default() };
    for &memory_mib in &cli.sizes {
        for &fraction in &cli.dirty {
            run.cell(memory_mib, fraction).await?;
        }
        run.save_and_restore(memory_mib).await?;
    }
    let report = run.report(load);
    run.cluster.finish()?;
    if cli.json {
        println!("{report}");
    }
    Ok(())
}

/// What was measured so far.
struct Run {
    cluster: Cluster,
    writer_mib_s: f64,
    moves: usize,
    cells: Cells,
}

#[derive(Default)]
struct Cells {
    pre_copy: Vec<Value>,
    stop_and_copy: Vec<Value>,
    save_ratios: Vec<f64>,
    first_instruction_ms: Vec<f64>,
    loaded_mib_s: Vec<f64>,
}

/// One move.
struct Moved {
    outage_ms: f64,
    total_s: f64,
    measures: BTreeMap<String, u64>,
}

impl Run {
    async fn cell(&mut self, memory_mib: u64, fraction: f64) -> Result<()> {
        let dirty = (self.writer_mib_s * fraction).round() as u64;
        let name = format!("bench-{memory_mib}-{dirty}");
        let watch = self.start(&name, memory_mib, dirty).await?;
        let baseline = (self.moves / 4).max(2);
        for (rule, moves) in [("finish", self.moves), ("never", baseline)] {
            set_pre_copy(&self.cluster, &name, rule).await?;
            let mut moved = Vec::new();
            for number in 1..=moves {
                let one = self.move_once(&watch, &name).await?;
                eprintln!(
                    "{memory_mib:5} MiB, dirty {fraction:.2}, {rule}, move {number:2}: {:.1} ms {}",
                    one.outage_ms,
                    parts(&one.measures)
                );
                moved.push(one);
            }
            let cell = cell(memory_mib, fraction, moved);
            eprintln!("{rule}: {cell}");
            match rule {
                "never" => self.cells.stop_and_copy.push(cell),
                _ => self.cells.pre_copy.push(cell),
            }
        }
        watch.verifies_again(MOVE_TIME).await?;
        watch.check()?;
        self.cluster.remove(&name).await
    }

    async fn start(&self, name: &str, memory_mib: u64, dirty: u64) -> Result<Watch> {
        let guest = self.cluster.guest(name)?.memory_mib(memory_mib).cmdline(format!(
            "tick_ms={TICK_MS} mem_mib={} dirty_mib_s={dirty} verify_mib_s=8 journal_ms=100 \
             fill=100",
            memory_mib / 2
        ));
        let watch = self.cluster.run(&guest).await?;
        let is_filled = |line: &Line| *line == Line::Filled;
        watch.heard_since(0, "the guest to fill its memory", FILL_TIME, is_filled).await?;
        Ok(watch)
    }

    async fn move_once(&self, watch: &Watch, name: &str) -> Result<Moved> {
        let cluster = &self.cluster;
        let home = cluster.home_of(name).await?;
        let to = cluster.other_than(&[home])?;
        let (mark, begun) = (watch.mark(), Instant::now());
        let task = cluster.admin().migrate(name, &format!("node{to}")).await?;
        let task = cluster.admin().task_done(task, MOVE_TIME).await?;
        let total_s = begun.elapsed().as_secs_f64();
        watch.ticks_on(MOVE_TIME).await?;
        let gap = watch.largest_gap(mark).context("the guest printed no ticks")?;
        let stopped = task.measures.get("outage_us").copied().unwrap_or(0);
        let inside = u64::try_from(gap.inside.as_micros())?;
        // The longest pause is the move, or a stall while memory comes after it: both are the
        // guest's outage. A clock that stood still with the guest would be no measurement. What the
        // leader counts ends with an answer to it, some milliseconds after the guest runs.
        if inside < stopped / 2 {
            bail!(
                "the guest's clock counted {inside} us of a move that took {stopped} us; its \
                 parts: {:?}",
                task.measures
            );
        }
        loaded(cluster, watch).await?;
        let outage_ms = gap.inside.as_secs_f64() * 1_000.0;
        Ok(Moved { outage_ms, total_s, measures: task.measures })
    }

    /// A save while the guest runs, and a restore of which the first instruction counts.
    async fn save_and_restore(&mut self, memory_mib: u64) -> Result<()> {
        let name = format!("bench-save-{memory_mib}");
        let watch = self.start(&name, memory_mib, 0).await?;
        let admin = self.cluster.admin();
        for _ in 0..(self.moves / 4).max(2) {
            let task = admin.task_done(admin.save(&name).await?, MOVE_TIME).await?;
            let part = |task: &v1::Task, key: &str| task.measures.get(key).copied().unwrap_or(0);
            let mib = part(&task, "precopy_bytes") as f64 / f64::from(1 << 20);
            let seconds = part(&task, "precopy_us") as f64 / 1e6;
            self.cells.save_ratios.push(mib / seconds.max(1e-6) / self.writer_mib_s);
            let begun = Instant::now();
            let task = admin.task_done(admin.restore(&name, "").await?, MOVE_TIME).await?;
            let first: u64 =
                ["load_us", "lock_us", "resume_us"].map(|key| part(&task, key)).iter().sum();
            self.cells.first_instruction_ms.push(first as f64 / 1e3);
            loaded(&self.cluster, &watch).await?;
            self.cells.loaded_mib_s.push(memory_mib as f64 / begun.elapsed().as_secs_f64());
        }
        watch.verifies_again(MOVE_TIME).await?;
        watch.check()?;
        self.cluster.remove(&name).await
    }

    fn report(&self, load: f64) -> Value {
        let Cells { pre_copy, stop_and_copy, .. } = &self.cells;
        let median = |values: &[f64]| spread(values.to_vec())[0];
        let [p50, p99, _] = spread(self.cells.first_instruction_ms.clone());
        json!({
            "cells": pre_copy,
            "stop_and_copy": stop_and_copy,
            "writer_mib_s": self.writer_mib_s,
            "load_average": load,
            "save_ratio": median(&self.cells.save_ratios),
            "restore_first_instruction_ms": { "p50": p50, "p99": p99 },
            "restore_loaded_mib_s": median(&self.cells.loaded_mib_s),
        })
    }
}

/// The median, the 99th percentile and the most.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [0.5, 0.99, 1.0].map(|part| percentile(&values, part))
}

fn cell(memory_mib: u64, dirty_fraction: f64, moved: Vec<Moved>) -> Value {
    let [p50, p99, max] = spread(moved.iter().map(|one| one.outage_ms).collect());
    let [total_s, ..] = spread(moved.iter().map(|one| one.total_s).collect());
    let part = |key: &str| {
        let of = |one: &Moved| one.measures.get(key).copied().unwrap_or(0) as f64;
        spread(moved.iter().map(of).collect())[0]
    };
    let parts: BTreeMap<&str, f64> = PARTS.iter().map(|key| (*key, part(key))).collect();
    json!({
        "memory_mib": memory_mib,
        "dirty_fraction": dirty_fraction,
        "moves": moved.len(),
        "outage_ms": { "p50": p50, "p99": p99, "max": max },
        "total_s": total_s,
        "bytes_written": part("memory_bytes"),
        "parts_us_p50": parts,
    })
}

/// What a move's outage consists of, as the task tells it.
const PARTS: [&str; 9] = [
    "stop_us",
    "save_us",
    "seal_us",
    "seal_order_us",
    "load_us",
    "commit_us",
    "lock_us",
    "resume_us",
    "outage_us",
];

fn parts(measures: &BTreeMap<String, u64>) -> String {
    let part = |key: &&str| {
        let value = measures.get(*key).copied().unwrap_or(0) as f64 / 1e3;
        format!("{} {value:.1}", key.trim_end_matches("_us"))
    };
    let rounds = measures.get("precopy_rounds").copied().unwrap_or(0);
    format!("[{}, {rounds} rounds]", PARTS.iter().map(part).collect::<Vec<_>>().join(", "))
}

async fn set_pre_copy(cluster: &Cluster, vm: &str, rule: &str) -> Result<()> {
    let changes = v1::VmChanges { pre_copy: rule.into(), ..v1::VmChanges::default() };
    let request = v1::SetVmRequest { vm: vm.into(), changes: Some(changes) };
    cluster.admin().ask(async |mut client| client.set_vm(request.clone()).await).await?;
    Ok(())
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
