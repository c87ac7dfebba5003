//! What this host can give to VMs.

use std::io;

use crate::config::AgentConfig;

/// Memory and vCPUs for VMs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    pub memory_mib: u64,
    pub vcpus: u32,
}

/// Reads the host's size, and takes off what the settings say.
pub fn capacity(config: &AgentConfig) -> io::Result<Capacity> {
    let memory_mib = match config.memory_mib {
        Some(memory_mib) => memory_mib,
        None => {
            let text = std::fs::read_to_string("/proc/meminfo")?;
            total_mib(&text)?.saturating_sub(config.memory_reserve_mib)
        }
    };
    let processors = u32::try_from(std::thread::available_parallelism()?.get()).unwrap_or(u32::MAX);
    Ok(Capacity { memory_mib, vcpus: processors.saturating_mul(config.vcpu_overcommit) })
}

fn total_mib(meminfo: &str) -> io::Result<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo without MemTotal");
    Ok(kib.ok_or_else(bad)? / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_taken_off() {
        assert_eq!(total_mib("MemTotal:       24655452 kB\nMemFree: 1 kB\n").unwrap(), 24077);
        assert!(total_mib("MemFree: 1 kB\n").is_err());
        let config = AgentConfig { memory_reserve_mib: u64::MAX, ..AgentConfig::default() };
        assert_eq!(capacity(&config).unwrap().memory_mib, 0);
    }
}
