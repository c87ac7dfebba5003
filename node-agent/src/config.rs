//! `agent.toml`: everything has a default, so that a node runs without one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bellwether_types::BootId;
use serde::Deserialize;

/// The VMM's executable, as it is named beside the agent's or in PATH.
const VMM_NAME: &str = "bellwether-vmm";

/// The settings of one agent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    /// The VMM's executable. Default: beside the agent's own, else in PATH.
    pub vmm: Option<PathBuf>,
    /// Where the sockets, lease pages, logs and floors of this boot live. It must disappear with
    /// the boot (as /run does) and its path must be short: socket addresses end at 107 bytes.
    pub runtime_dir: PathBuf,
    /// Memory that VMs may not have, because the host needs it.
    pub memory_reserve_mib: u64,
    /// Memory that VMs may have. Default: the host's less `memory_reserve_mib`.
    pub memory_mib: Option<u64>,
    /// So many vCPUs of VMs per processor of the host.
    pub vcpu_overcommit: u32,
    /// Where the boot id is read. Several nodes on one kernel each need a file of their own.
    pub boot_id_path: PathBuf,
    /// Between two renewals. Default: a sixth of the lease, so that one lost
    /// renewal makes nobody suspicious.
    pub renew_interval_ms: Option<u64>,
    /// Between two looks at the status of a VMM.
    pub status_interval_ms: u64,
    /// How many times longer than usual a VMM may take for what it is told: for very slow hosts.
    pub patience: u32,
    /// How long this node alone hears no controller before it hands its VMs over: seals them on the
    /// storage, so that others run them on. 0 for never.
    pub handover_after_ms: u64,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            vmm: None,
            runtime_dir: "/run/bellwether".into(),
            memory_reserve_mib: 512,
            memory_mib: None,
            vcpu_overcommit: 4,
            boot_id_path: "/proc/sys/kernel/random/boot_id".into(),
            renew_interval_ms: None,
            status_interval_ms: 250,
            patience: 1,
            handover_after_ms: 30_000,
        }
    }
}

/// What is wrong with the settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read `{}`: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("`{}`: {source}", path.display())]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("`{}`: `{setting}` is {value}; {expected}", path.display())]
    Value { path: PathBuf, setting: &'static str, value: String, expected: &'static str },
    #[error(
        "no `{VMM_NAME}` beside `{}` and none in PATH; install it or set `vmm` in agent.toml",
        beside.display()
    )]
    NoVmm { beside: PathBuf },
    #[error("`{}` holds no boot id: {source}; set `boot_id_path` to a file with one UUID", path.display())]
    BootId { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
}

impl AgentConfig {
    /// Reads the settings; without a file they are the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let refuse = |setting, value: String, expected| {
            Err(ConfigError::Value { path: path.into(), setting, value, expected })
        };
        if self.vcpu_overcommit == 0 || self.vcpu_overcommit > 64 {
            return refuse("vcpu_overcommit", self.vcpu_overcommit.to_string(), "give 1 to 64");
        }
        if !(10..=10_000).contains(&self.status_interval_ms) {
            let value = self.status_interval_ms.to_string();
            return refuse("status_interval_ms", value, "give 10 to 10000");
        }
        if let Some(ms) = self.renew_interval_ms
            && !(10..=20_000).contains(&ms)
        {
            return refuse("renew_interval_ms", ms.to_string(), "give 10 to 20000");
        }
        if !(1..=20).contains(&self.patience) {
            return refuse("patience", self.patience.to_string(), "give 1 to 20");
        }
        if !self.runtime_dir.is_absolute() {
            let value = self.runtime_dir.display().to_string();
            return refuse("runtime_dir", value, "give an absolute path");
        }
        Ok(())
    }

    /// The VMM's executable.
    pub fn find_vmm(&self) -> Result<PathBuf, ConfigError> {
        if let Some(vmm) = &self.vmm {
            return Ok(vmm.clone());
        }
        let own = std::env::current_exe().unwrap_or_default();
        let beside = own.with_file_name(VMM_NAME);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let candidates =
            std::iter::once(beside).chain(std::env::split_paths(&path).map(|d| d.join(VMM_NAME)));
        candidates
            .into_iter()
            .find(|candidate| candidate.is_absolute() && candidate.is_file())
            .ok_or(ConfigError::NoVmm { beside: own })
    }

    /// The id of this boot.
    pub fn boot_id(&self) -> Result<BootId, ConfigError> {
        let path = &self.boot_id_path;
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        text.parse()
            .map_err(|source| ConfigError::BootId { path: path.into(), source: Box::new(source) })
    }

    /// Between two renewals of a lease of this length.
    pub fn renew_interval(&self, lease_ms: u64) -> Duration {
        Duration::from_millis(self.renew_interval_ms.unwrap_or(lease_ms / 6).max(10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<AgentConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, text).unwrap();
        AgentConfig::load(Some(&path))
    }

    #[test]
    fn everything_has_a_default() {
        let config = load("").unwrap();
        assert_eq!(config.runtime_dir, Path::new("/run/bellwether"));
        assert_eq!(config.renew_interval(3_000), Duration::from_millis(500));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("runtim_dir = \"/x\"", "unknown field"),
            ("runtime_dir = \"x\"", "absolute"),
            ("vcpu_overcommit = 0", "vcpu_overcommit"),
            ("status_interval_ms = 1", "status_interval_ms"),
            ("patience = 0", "patience"),
        ] {
            let refused = load(text).unwrap_err().to_string();
            assert!(refused.contains(part), "{text}: {refused}");
        }
    }
}
