//! `controller.toml` in the data directory: optional, with a default for everything.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bellwether_core::Timing;
use bellwether_core::config::TimingError;
use bellwether_raft::Timers;
use bellwether_types::{WatchdogTiming, WatchdogTimingError};
use serde::Deserialize;

/// The file's name in a data directory.
pub const CONFIG_FILE: &str = "controller.toml";

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControllerConfig {
    pub timing: Timing,
    /// Without this section the defaults hold, if they fit `lease_ms`.
    pub watchdog: Option<WatchdogTiming>,
    pub raft: RaftTimers,
}

/// Raft's timers, milliseconds.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaftTimers {
    pub heartbeat_ms: u64,
    pub election_ms_min: u64,
    pub election_ms_max: u64,
}

impl Default for RaftTimers {
    fn default() -> Self {
        Self { heartbeat_ms: 200, election_ms_min: 1_000, election_ms_max: 2_000 }
    }
}

impl RaftTimers {
    pub fn timers(&self) -> Timers {
        Timers {
            heartbeat_interval: Duration::from_millis(self.heartbeat_ms),
            election_timeout_min: Duration::from_millis(self.election_ms_min),
            election_timeout_max: Duration::from_millis(self.election_ms_max),
            ..Timers::default()
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}")]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("{path}: {source}")]
    Timing { path: PathBuf, source: TimingError },
    #[error("{path}: {source}")]
    Watchdog { path: PathBuf, source: Box<WatchdogTimingError> },
}

impl ControllerConfig {
    /// Reads the file if there is one, and checks what must hold between the numbers.
    pub fn load(data_dir: &Path) -> Result<Self, ConfigError> {
        let path = data_dir.join(CONFIG_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        Self::parse(&text, &path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let path = path.to_path_buf();
        let config: Self = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.clone(),
            source: Box::new(source),
        })?;
        if let Err(source) = config.timing.validate() {
            return Err(ConfigError::Timing { path, source });
        }
        match config.watchdog.map(|watchdog| watchdog.validate(config.timing.lease_ms)) {
            Some(Err(source)) => Err(ConfigError::Watchdog { path, source: Box::new(source) }),
            Some(Ok(())) | None => Ok(config),
        }
    }

    /// The times of the fence proof `watchdog`; none if nobody gave any and the defaults do not fit.
    pub fn watchdog_timing(&self) -> Option<WatchdogTiming> {
        let default = WatchdogTiming::default();
        let fits = default.validate(self.timing.lease_ms).is_ok();
        self.watchdog.or_else(|| fits.then_some(default))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ControllerConfig, ConfigError> {
        ControllerConfig::parse(text, Path::new("controller.toml"))
    }

    #[test]
    fn an_empty_file_gives_defaults_and_a_wrong_one_says_where() {
        assert_eq!(parse("").unwrap().timing, Timing::default());
        let unknown = parse("[timing]\nleese_ms = 3\n").unwrap_err().to_string();
        assert!(unknown.contains("leese_ms"), "{unknown}");
        let breaks = parse("[timing]\nlease_ms = 9000\n").unwrap_err().to_string();
        assert!(breaks.contains("suspect_after_ms"), "{breaks}");
    }

    #[test]
    fn watchdog_times_that_prove_nothing_are_refused_and_defaults_only_used_where_they_fit() {
        let short = parse("[watchdog]\nwait_ms = 8000\n").unwrap_err().to_string();
        assert!(short.contains("W >= (1+d) * max(") && short.contains("8924"), "{short}");
        assert_eq!(parse("").unwrap().watchdog_timing(), Some(WatchdogTiming::default()));
        let slow = parse("[timing]\nlease_ms = 6000\nsuspect_after_ms = 4000\n").unwrap();
        assert_eq!(slow.watchdog_timing(), None);
    }
}
