//! Numbers: percentiles, and what the storage gives to a plain direct writer.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::fs::OFlags;

/// One write: what a good writer of large files uses.
const BLOCK: usize = 4 << 20;
const ALIGNMENT: usize = 4096;

/// The value below or at which a part of all values lies, by the nearest rank.
pub fn percentile(sorted: &[f64], part: f64) -> f64 {
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// How many processes want to run, on average over the last minute: other work on the machine makes
/// every time longer.
pub fn load_average() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").context("read /proc/loadavg")?;
    let first = text.split(' ').next().unwrap_or_default();
    first.parse().with_context(|| format!("/proc/loadavg says `{text}`"))
}

/// Writes so many MiB with O_DIRECT and syncs them; MiB per second.
pub fn direct_writer_mib_s(dir: &Path, mib: usize) -> Result<f64> {
    let path = dir.join("writer.tmp");
    let rate = write_direct(&path, mib);
    // Whatever happened, the file is of no more use.
    let _ = std::fs::remove_file(&path);
    rate.with_context(|| format!("write {} directly", path.display()))
}

fn write_direct(path: &Path, mib: usize) -> Result<f64> {
    let flags = i32::try_from(OFlags::DIRECT.bits())?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(flags)
        .open(path)?;
    let buffer = vec![0x5a_u8; BLOCK + ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let block = buffer.get(start..start + BLOCK).context("an aligned block")?;
    let blocks = (mib << 20) / BLOCK;
    let started = Instant::now();
    for index in 0..blocks {
        file.write_all_at(block, (index * BLOCK) as u64)?;
    }
    file.sync_data()?;
    Ok((blocks * BLOCK) as f64 / f64::from(1 << 20) / started.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), 10.0);
        assert_eq!(percentile(&values, 0.99), 20.0);
        assert_eq!(percentile(&values, 1.0), 20.0);
        assert!(percentile(&[], 0.5).is_nan());
    }
}
