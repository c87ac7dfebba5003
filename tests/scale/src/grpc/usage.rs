//! What a process has used: memory now, and CPU time so far.

use anyhow::{Context, Result};

/// What one process has used.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub resident_bytes: u64,
    /// The most that was ever resident.
    pub peak_bytes: u64,
    /// User and system, of all threads. The kernel counts it in steps of 10 ms.
    pub cpu_ms: f64,
}

impl Usage {
    pub fn of(pid: u32) -> Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            std::fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        let page_bytes = rustix::param::page_size() as u64;
        let ticks_per_s = rustix::param::clock_ticks_per_second() as f64;
        let statm = read("statm")?;
        let pages: u64 = statm.split(' ').nth(1).context("statm has no second field")?.parse()?;
        let peak_bytes = peak_bytes(&read("status")?).context("status has no VmHWM")?;
        let ticks = cpu_ticks(&read("stat")?).context("stat has no CPU time")?;
        let cpu_ms = ticks as f64 / ticks_per_s * 1_000.0;
        Ok(Self { resident_bytes: pages * page_bytes, peak_bytes, cpu_ms })
    }
}

/// Fields 14 and 15. The name, field 2, is in brackets and may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn peak_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1_024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 40 2 0 0 20 0 1 0";
        assert_eq!(cpu_ticks(stat), Some(42));
        assert_eq!(cpu_ticks("7 (a"), None);
        let own = Usage::of(std::process::id()).unwrap();
        assert!(own.resident_bytes > 0 && own.peak_bytes >= own.resident_bytes);
    }
}
