//! Measures a restore on demand: time to usable, fault latency, fill rate.
//!
//! `cargo run --release -p bellwether-memory --example restore_latency -- [dir] [MiB]`
#![expect(clippy::print_stdout, reason = "a benchmark talks to the person who runs it")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bellwether_memory::{
    GuestRam, LazyOptions, LazyRestore, SaveOptions, UserfaultSource, save_memory,
};
use bellwether_statefile::{Expect, Identity, SealedFile, StateFile, StateFileWriter};
use bellwether_types::{Epoch, VmId};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap_or_else(|| "/tmp".to_owned());
    let mib: u64 = arguments.next().map_or(Ok(1024), |text| text.parse())?;
    let sealed = make_file(Path::new(&directory), mib)?;
    faults_alone(&sealed, mib)?;
    faults_and_fill(&sealed, mib)?;
    eager(&sealed, mib)?;
    std::fs::remove_file(&sealed.path)?;
    Ok(())
}

fn identity() -> Identity {
    Identity { vm_id: VmId::from_uuid(Uuid::from_u128(3)), epoch: Epoch(1), generation: 1 }
}

fn make_file(directory: &Path, mib: u64) -> Outcome<SealedFile> {
    let ram = GuestRam::new(mib << 20)?;
    let mut random = SmallRng::seed_from_u64(1);
    let mut block = vec![0u8; 1 << 20];
    for region in ram.regions() {
        for offset in (0..region.length).step_by(block.len()) {
            random.fill_bytes(&mut block);
            ram.memory().write_slice(&block, GuestAddress(region.start + offset))?;
        }
    }
    let mut writer = StateFileWriter::create(directory, identity(), &ram.regions())?;
    save_memory(&ram, &mut writer, &SaveOptions::default())?;
    Ok(writer.seal()?)
}

/// Opens the file and starts the load; says how long that took.
fn start(
    sealed: &SealedFile,
    mib: u64,
    options: LazyOptions,
) -> Outcome<(Arc<GuestRam>, LazyRestore, Duration)> {
    let ram = Arc::new(GuestRam::new(mib << 20)?);
    let Identity { vm_id, epoch, .. } = identity();
    let expect = Expect { vm_id, epoch, generation: None, hash: sealed.hash };
    let started = Instant::now();
    let file = StateFile::open(&sealed.path, &expect)?;
    let restore = LazyRestore::start(Arc::clone(&ram), file, options)?;
    Ok((ram, restore, started.elapsed()))
}

/// Touches random pages until the time is over or the load has ended; gives the latencies.
fn touch(ram: &GuestRam, restore: &LazyRestore, most: usize) -> Outcome<Vec<Duration>> {
    let mut random = SmallRng::seed_from_u64(2);
    let mut latencies = Vec::new();
    while latencies.len() < most && restore.wait_done_for(Duration::ZERO).is_none() {
        let region = ram.regions()[0];
        let address = random.random_range(0..region.length / 4096) * 4096;
        let before = restore.progress().faults_loaded;
        let started = Instant::now();
        let _byte: u8 = ram.memory().read_obj(GuestAddress(address))?;
        let latency = started.elapsed();
        if restore.progress().faults_loaded != before || latency > Duration::from_micros(50) {
            latencies.push(latency);
        }
    }
    latencies.sort();
    Ok(latencies)
}

fn quantiles(latencies: &[Duration]) -> String {
    let at = |q: f64| {
        let index = ((latencies.len() as f64 * q) as usize).min(latencies.len().saturating_sub(1));
        latencies.get(index).map_or(0, Duration::as_micros)
    };
    format!("{} faults, p50 {} us, p99 {} us", latencies.len(), at(0.5), at(0.99))
}

fn faults_alone(sealed: &SealedFile, mib: u64) -> Outcome<()> {
    let slow = LazyOptions { fill_bytes_per_s_max: Some(1), ..LazyOptions::default() };
    let (ram, restore, usable) = start(sealed, mib, slow)?;
    let latencies = touch(&ram, &restore, (mib as usize / 2).min(1000))?;
    println!("usable after {usable:?}; faults without fill: {}", quantiles(&latencies));
    Ok(())
}

fn faults_and_fill(sealed: &SealedFile, mib: u64) -> Outcome<()> {
    let (ram, restore, usable) = start(sealed, mib, LazyOptions::default())?;
    let started = Instant::now();
    let latencies = touch(&ram, &restore, usize::MAX)?;
    restore.wait_done()?;
    let rate = mib as f64 / started.elapsed().as_secs_f64();
    println!("usable after {usable:?}; faults during fill: {}", quantiles(&latencies));
    println!("  fill with a toucher: {rate:.0} MiB/s");
    for fill_threads in [1, 2, 4] {
        let options = LazyOptions { fill_threads, ..LazyOptions::default() };
        let (_ram, restore, _) = start(sealed, mib, options)?;
        let started = Instant::now();
        restore.wait_done()?;
        let rate = mib as f64 / started.elapsed().as_secs_f64();
        println!("  fill alone, {fill_threads} threads: {rate:.0} MiB/s");
    }
    Ok(())
}

fn eager(sealed: &SealedFile, mib: u64) -> Outcome<()> {
    let options = LazyOptions { userfaultfd: UserfaultSource::Never, ..LazyOptions::default() };
    let (_ram, _restore, took) = start(sealed, mib, options)?;
    println!("eager: {took:?}, {:.0} MiB/s", mib as f64 / took.as_secs_f64());
    Ok(())
}
