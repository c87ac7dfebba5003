//! Measurements, not checks: run with
//! `cargo nextest run --release -p bellwether-vmm --run-ignored only --no-capture measure`.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Instant;

use bellwether_proto::v1::StopRequest;
use common::{Config, Vmm, disk};
use serde_json::json;
use tempfile::tempdir;

const MIB: u64 = 1 << 20;
const MOVES: u64 = 6;

/// A line of `/proc/<pid>/status`, KiB.
fn status_kib(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

async fn measure(memory_mib: u64) -> serde_json::Value {
    // Saves go to the disk that the build is on, not to a tmpfs.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let mut config = Config::new().with_disk(&disk);
    config.spec().memory_mib = memory_mib;
    config.spec().cmdline = "tick_ms=10 journal_ms=50 mem_mib=16 fill=100".into();
    let mut vmm = Vmm::running(directory.path(), &config, 1).await;
    vmm.console().await.wait_for("filled ").await;
    let mut moves = Vec::new();
    for epoch in 2..2 + MOVES {
        let mut target = Vmm::created(directory.path(), &config).await;
        let saved = vmm.save(directory.path(), epoch).await.unwrap();
        let (file, timings) = (saved.file.unwrap(), saved.timings.unwrap());
        let loaded = target.load(&file).await.unwrap();
        // The reply says that the locks are free; the process needs longer to return its memory.
        vmm.client.stop(StopRequest {}).await.unwrap();
        let started = target.start_within(epoch, 1000, true).await.unwrap().timings.unwrap();
        moves.push(json!({
            "stop_us": timings.stop_us, "save_us": timings.save_us, "seal_us": timings.seal_us,
            "written_mib": timings.bytes_written / MIB,
            "load_us": loaded.load_us, "lock_us": started.lock_us, "resume_us": started.resume_us,
            "outage_us": (started.running_at_ns - timings.stopped_at_ns) / 1000,
        }));
        let reaping = Instant::now();
        vmm.wait_exit().await;
        moves.last_mut().unwrap()["reap_ms"] = json!(reaping.elapsed().as_millis());
        vmm = target;
        let mut console = vmm.console().await;
        let begun = Instant::now();
        vmm.wait_memory().await;
        moves.last_mut().unwrap()["fill_ms"] = json!(begun.elapsed().as_millis());
        console.number("journal").await;
    }
    let mut console = vmm.console().await;
    console.send("verify-fill").await;
    console.wait_for("verified fill_mib=").await;
    let pid = vmm.child.id();
    json!({
        "memory_mib": memory_mib, "moves": moves,
        "rss_anon_kib": status_kib(pid, "RssAnon"), "rss_file_kib": status_kib(pid, "RssFile"),
        "rss_guest_kib": status_kib(pid, "RssShmem"), "threads": status_kib(pid, "Threads"),
    })
}

/// From exec to the answer to Create, over the socket, in milliseconds.
async fn creation_ms() -> Vec<f64> {
    let directory = tempdir().unwrap();
    let mut times = Vec::new();
    for _ in 0..10 {
        let begun = Instant::now();
        let mut vmm = Vmm::spawn(directory.path()).await;
        vmm.create(&Config::new()).await.unwrap();
        times.push((begun.elapsed().as_secs_f64() * 10_000.0).round() / 10.0);
        vmm.stop().await;
    }
    times
}

#[tokio::test]
#[ignore = "a measurement"]
async fn measure_creation_and_moves() {
    println!("{:#}", json!({"exec_to_created_ms": creation_ms().await}));
    for memory_mib in [256, 1024] {
        println!("{:#}", measure(memory_mib).await);
    }
}
