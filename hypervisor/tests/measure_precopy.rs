//! How long a guest stands still when it moves: pre-copy against stop-and-copy, in the same run.
//! A measurement, not a check:
//!
//! `cargo nextest run --release -p bellwether-vmm --run-ignored only --no-capture measure_pre_copy`
//!
//! `MEASURE_MIB=256,1024` sets the sizes of memory, `MEASURE_PERCENT=0,10,50` the rates at which the
//! guest dirties it, in percent of what a plain direct writer gets, `MEASURE_MOVES=10` the moves.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use bellwether_proto::v1::{PreCopyRequest, SaveRequest, StopRequest};
use common::{Config, Console, Vmm, disk};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// The numbers of an environment variable.
fn numbers(name: &str, default: &str) -> Vec<u64> {
    let text = std::env::var(name).unwrap_or_else(|_| default.to_owned());
    text.split(',').map(|number| number.trim().parse().unwrap()).collect()
}

/// What one thread gets with O_DIRECT and 4 MiB requests, MiB/s, syncs included.
fn writer_mib_s(directory: &Path) -> u64 {
    const REQUEST: usize = 4 << 20;
    const BYTES: u64 = 512 * MIB;
    let path = directory.join("plain-writer");
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).custom_flags(direct);
    let file = options.open(&path).unwrap();
    let mut buffer = bellwether_statefile::AlignedBuf::new(REQUEST);
    buffer.as_mut_slice().fill(0x5a);
    let begun = Instant::now();
    for at in (0..BYTES).step_by(REQUEST) {
        file.write_all_at(buffer.as_slice(), at).unwrap();
    }
    file.sync_data().unwrap();
    let rate = BYTES as f64 / begun.elapsed().as_secs_f64() / MIB as f64;
    std::fs::remove_file(path).unwrap();
    rate as u64
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    StopAndCopy,
    PreCopy,
    /// Pre-copy, and a destination that loads along.
    Tail,
}

const WAYS: [Way; 3] = [Way::StopAndCopy, Way::PreCopy, Way::Tail];

/// What one move took, in microseconds.
struct Move {
    /// The largest gap between two ticks of the guest, less the ordinary one.
    outage: u64,
    /// Stop, what is written while the guest stands, and seal.
    source: u64,
    load: u64,
    predicted: u64,
    rounds: u64,
    written: u64,
    total: u64,
}

const TICK_MS: u64 = 2;
/// More than the guest's queue of output holds of them.
const TICKS_AFTER: usize = 400;

/// The time of the last tick that was printed whole.
fn last_tick(console: &Console) -> u64 {
    console.lines.iter().rev().find_map(|line| whole_tick(line)).unwrap()
}

/// The time in a tick's line, if the line was printed whole.
fn whole_tick(line: &str) -> Option<u64> {
    let words: Vec<_> = line.split_whitespace().collect();
    (words.len() == 4 && words[0] == "tick").then(|| words[2].parse().ok())?
}

async fn tick_ns(console: &mut Console) -> u64 {
    let line = console.wait_until("a whole tick", |line| whole_tick(line).is_some()).await;
    whole_tick(&line).unwrap()
}

/// Moves the guest once; it runs in the returned VMM then.
async fn move_once(
    directory: &Path,
    config: &Config,
    mut vmm: Vmm,
    epoch: u64,
    way: Way,
) -> (Vmm, Move) {
    let begun = Instant::now();
    let mut target = Vmm::created(directory, config).await;
    let mut console = vmm.console().await;
    let (mut predicted, mut rounds, mut tailed) = (0, 0, None);
    if way != Way::StopAndCopy {
        let request = PreCopyRequest {
            directory: directory.display().to_string(),
            generation: epoch,
            finish_anyway: true,
            tell_pieces: way == Way::Tail,
            ..Default::default()
        };
        let mut stream = vmm.client.pre_copy(request).await.unwrap().into_inner();
        while let Some(progress) = stream.message().await.unwrap() {
            (predicted, rounds) = (progress.outage_us, u64::from(progress.round));
            assert_ne!(progress.phase, "ended", "{}", progress.reason);
            let is_ready = progress.phase == "ready";
            let mut behind = 0;
            if !progress.pieces.is_empty() {
                behind = target.load_ahead(progress).await.unwrap().loaded_bytes;
            }
            // A destination that never catches up is not waited for.
            if is_ready && (behind <= 16 * MIB || begun.elapsed() > Duration::from_secs(60)) {
                break;
            }
        }
        tailed = Some(stream);
    }
    tick_ns(&mut console).await;
    let mut source = vmm.client.clone();
    let request = SaveRequest { directory: directory.display().to_string(), generation: epoch };
    let saving = tokio::spawn(async move { source.save(request).await });
    // A destination that tails loads on until the source has sealed.
    while way == Way::Tail
        && !saving.is_finished()
        && let Some(stream) = &mut tailed
        && let Some(progress) = stream.message().await.unwrap()
    {
        target.load_ahead(progress).await.unwrap();
    }
    let saved = saving.await.unwrap().unwrap().into_inner();
    let (file, timings) = (saved.file.unwrap(), saved.timings.unwrap());
    let load = target.load(&file).await.unwrap().load_us;
    vmm.client.stop(StopRequest {}).await.unwrap();
    target.start_within(epoch, 1000, true).await.unwrap();
    while !console.is_silent_for(Duration::from_millis(30)).await {}
    let before = last_tick(&console);
    // The guest may first print ticks that it had queued, so the gap is looked for, not computed from
    // the first one.
    let (mut console, mut ticks) = (target.console().await, vec![before]);
    for _ in 0..TICKS_AFTER {
        ticks.push(tick_ns(&mut console).await);
    }
    let gap = ticks.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    let moved = Move {
        outage: gap.saturating_sub(TICK_MS * 1_000_000) / 1000,
        source: timings.stop_us + timings.save_us + timings.seal_us,
        load,
        predicted,
        rounds,
        written: timings.bytes_written / MIB,
        total: begun.elapsed().as_micros() as u64,
    };
    vmm.wait_exit().await;
    target.wait_memory().await;
    (target, moved)
}

fn quantiles(mut values: Vec<u64>) -> Value {
    values.sort_unstable();
    let at = |q: f64| values[((values.len() - 1) as f64 * q).ceil() as usize] as f64 / 1000.0;
    json!({"p50": at(0.5), "p99": at(0.99), "max": at(1.0)})
}

fn summary(moves: &[Move]) -> Value {
    let of = |field: fn(&Move) -> u64| quantiles(moves.iter().map(field).collect());
    json!({
        "moves": moves.len(),
        "outage_ms": of(|m| m.outage), "source_ms": of(|m| m.source), "load_ms": of(|m| m.load),
        "predicted_ms": of(|m| m.predicted), "total_ms": of(|m| m.total),
        "rounds_max": moves.iter().map(|m| m.rounds).max(),
        "written_mib": moves.iter().map(|m| m.written).sum::<u64>() / moves.len() as u64,
    })
}

/// A guest of this size that dirties at this rate, moved in both ways in turn.
async fn cell(memory_mib: u64, dirty_mib_s: u64, moves: u64) -> Value {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let mut config = Config::new().with_disk(&disk);
    config.spec().memory_mib = memory_mib;
    config.spec().cmdline = format!(
        "tick_ms={TICK_MS} journal_ms=50 mem_mib={} fill=90 verify_mib_s=16 dirty_mib_s={dirty_mib_s}",
        memory_mib / 2
    );
    let mut vmm = Vmm::running(directory.path(), &config, 1).await;
    vmm.console().await.wait_for("filled ").await;
    let mut moved = WAYS.map(|_| Vec::new());
    for index in 0..WAYS.len() * moves as usize {
        let way = index % WAYS.len();
        let epoch = index as u64 + 2;
        let (next, one) = move_once(directory.path(), &config, vmm, epoch, WAYS[way]).await;
        vmm = next;
        moved[way].push(one);
    }
    let mut console = vmm.console().await;
    console.send("verify-fill").await;
    console.wait_for("verified fill_mib=").await;
    console.wait_for("pattern ").await;
    let median = |moves: &[Move]| {
        let mut outages: Vec<_> = moves.iter().map(|m| m.outage).collect();
        outages.sort_unstable();
        outages[outages.len() / 2].max(1) as f64
    };
    let [stop, pre, tail] = &moved;
    let ratio = |moves: &[Move]| (median(stop) / median(moves) * 10.0).round() / 10.0;
    json!({
        "memory_mib": memory_mib, "dirty_mib_s": dirty_mib_s,
        "stop_and_copy_over_pre_copy": ratio(pre), "stop_and_copy_over_tail": ratio(tail),
        "stop_and_copy": summary(stop), "pre_copy": summary(pre), "tail": summary(tail),
    })
}

#[tokio::test]
#[ignore = "a measurement"]
async fn measure_pre_copy() {
    let moves = numbers("MEASURE_MOVES", "5")[0];
    for memory_mib in numbers("MEASURE_MIB", "256,1024") {
        for percent in numbers("MEASURE_PERCENT", "0,10,50") {
            let writer = writer_mib_s(Path::new(env!("CARGO_TARGET_TMPDIR")));
            let mut cell = cell(memory_mib, writer * percent / 100, moves).await;
            cell["writer_mib_s"] = json!(writer);
            cell["dirty_percent"] = json!(percent);
            println!("{cell:#}");
        }
    }
}
