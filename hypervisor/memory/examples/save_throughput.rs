//! Compares a save with a plain O_DIRECT writer: same storage, same run, alternating.
//!
//! `cargo run --release -p bellwether-memory --example save_throughput -- [dir] [MiB] [rounds] [threads]`
#![expect(clippy::print_stdout, reason = "a benchmark talks to the person who runs it")]

use std::error::Error;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bellwether_memory::{GuestRam, SaveOptions, save_memory};
use bellwether_statefile::{AlignedBuf, Identity, StateFileWriter};
use bellwether_types::{Epoch, VmId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

const REQUEST: usize = 1 << 20;
type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap_or_else(|| "/tmp".to_owned());
    let mib: u64 = arguments.next().map_or(Ok(2048), |text| text.parse())?;
    let rounds: u64 = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let threads = arguments.next().map_or(Ok(SaveOptions::default().threads), |t| t.parse())?;
    let options = SaveOptions { threads, ..SaveOptions::default() };
    let ram = GuestRam::new(mib << 20)?;
    for kind in ["all pages random", "every other 32 KiB zero"] {
        let used = populate(&ram, kind.starts_with("every"))?;
        println!("{mib} MiB of guest memory, {kind}, {} threads", options.threads);
        let mut ratios = Vec::new();
        for round in 0..rounds {
            let plain = plain_writer(Path::new(&directory), used, options.threads)?;
            let ours = our_save(Path::new(&directory), &ram, &options, round)?;
            let (plain, ours) = (used as f64 / plain, used as f64 / ours);
            let mib = f64::from(1 << 20);
            ratios.push(ours / plain);
            println!(
                "  plain {:6.0} MiB/s   ours {:6.0} MiB/s   ratio {:.2}",
                plain / mib,
                ours / mib,
                ours / plain
            );
        }
        ratios.sort_by(f64::total_cmp);
        println!("  median ratio {:.2}", ratios[ratios.len() / 2]);
    }
    Ok(())
}

/// Fills the memory; gives the bytes that are not zero.
fn populate(ram: &GuestRam, half: bool) -> Outcome<u64> {
    let mut random = SmallRng::seed_from_u64(1);
    let mut block = vec![0u8; 32 << 10];
    let mut used = 0;
    for region in ram.regions() {
        for (index, offset) in (0..region.length).step_by(block.len()).enumerate() {
            if half && index % 2 == 1 {
                block.fill(0);
            } else {
                random.fill_bytes(&mut block);
                used += block.len() as u64;
            }
            ram.memory().write_slice(&block, GuestAddress(region.start + offset))?;
        }
    }
    Ok(used)
}

/// Seconds that as many threads take to write as many bytes, in 1 MiB requests, durably.
fn plain_writer(directory: &Path, bytes: u64, threads: usize) -> Outcome<f64> {
    let path = directory.join("plain-writer.bench");
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(flags)
        .open(&path)?;
    let mut buffer = AlignedBuf::new(REQUEST);
    SmallRng::seed_from_u64(2).fill_bytes(buffer.as_mut_slice());
    let next = AtomicU64::new(0);
    let started = Instant::now();
    file.set_len(bytes)?;
    std::thread::scope(|scope| -> Outcome<()> {
        let work = || -> std::io::Result<()> {
            loop {
                let at = next.fetch_add(REQUEST as u64, Ordering::Relaxed);
                if at >= bytes {
                    return Ok(());
                }
                file.write_all_at(buffer.as_slice(), at)?;
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().map_err(|_| "the plain writer panicked")??;
        }
        Ok(())
    })?;
    file.sync_data()?;
    let seconds = started.elapsed().as_secs_f64();
    std::fs::remove_file(&path)?;
    Ok(seconds)
}

/// Seconds that a save takes, from the creation of the file to its seal.
fn our_save(directory: &Path, ram: &GuestRam, options: &SaveOptions, round: u64) -> Outcome<f64> {
    let vm_id = VmId::from_uuid(Uuid::from_u128(2));
    let identity = Identity { vm_id, epoch: Epoch(1), generation: round };
    let started = Instant::now();
    let mut writer = StateFileWriter::create(directory, identity, &ram.regions())?;
    let stats = save_memory(ram, &mut writer, options)?;
    let sealed = writer.seal()?;
    let seconds = started.elapsed().as_secs_f64();
    if !stats.direct {
        println!("  (the file system refuses O_DIRECT)");
    }
    std::fs::remove_file(&sealed.path)?;
    Ok(seconds)
}
