//! `fencer.toml`: everything has a default, and by default there is no watchdog.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

/// The settings of one fencer.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FencerConfig {
    /// The agent's.
    pub runtime_dir: PathBuf,
    /// Whether the watchdog is armed. It resets the host when VMs under the lease arbiter run on
    /// though the node lost its lease; VMs under the storage arbiter need none.
    pub watchdog: bool,
    pub watchdog_device: PathBuf,
    /// Twd, the period. The watchdog may choose another, which is read back and told.
    pub watchdog_s: u32,
    /// Whether the kernel's software watchdog will do. It resets nothing when the kernel stands
    /// still, so it never yields a fence proof.
    pub software_watchdog: bool,
    /// P: the longest age of a grant that still pets; no grant may end further ahead.
    pub pet_ms: u64,
    /// How long a VMM may take to stop after its deadline, before it is killed.
    pub stop_ms: u64,
    /// Real-time priority (SCHED_RR), 1 to 99.
    pub priority: u8,
}

impl Default for FencerConfig {
    fn default() -> Self {
        Self {
            runtime_dir: "/run/bellwether".into(),
            watchdog: false,
            watchdog_device: "/dev/watchdog".into(),
            watchdog_s: 5,
            software_watchdog: false,
            pet_ms: 1_000,
            stop_ms: 1_000,
            priority: 50,
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
}

impl FencerConfig {
    /// Reads the settings; without a file they are the defaults.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.into(), source }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let refuse = |setting, value: u64, expected| {
            let (path, value) = (path.to_owned(), value.to_string());
            Err(ConfigError::Value { path, setting, value, expected })
        };
        if !(1..=600).contains(&self.watchdog_s) {
            return refuse("watchdog_s", self.watchdog_s.into(), "give 1 to 600");
        }
        if !(100..=60_000).contains(&self.pet_ms) {
            return refuse("pet_ms", self.pet_ms, "give 100 to 60000");
        }
        if self.pet_ms >= u64::from(self.watchdog_s) * 1000 {
            let expected = "give less than watchdog_s: pets come at most that far apart";
            return refuse("pet_ms", self.pet_ms, expected);
        }
        if !(100..=60_000).contains(&self.stop_ms) {
            return refuse("stop_ms", self.stop_ms, "give 100 to 60000");
        }
        if !(1..=99).contains(&self.priority) {
            return refuse("priority", self.priority.into(), "give 1 to 99");
        }
        if !self.runtime_dir.is_absolute() {
            let value = self.runtime_dir.display().to_string();
            let (setting, expected) = ("runtime_dir", "give an absolute path");
            return Err(ConfigError::Value { path: path.into(), setting, value, expected });
        }
        Ok(())
    }

    /// Between two looks: often enough that a grant of age P is noticed while it is fresh.
    pub fn tick(&self) -> Duration {
        Duration::from_millis((self.pet_ms / 4).clamp(25, 250))
    }

    /// The fencer's own directory.
    pub fn directory(&self) -> PathBuf {
        self.runtime_dir.join("fencer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<FencerConfig, ConfigError> {
        FencerConfig::parse(text, Path::new("/etc/bellwether/fencer.toml"))
    }

    #[test]
    fn there_is_no_watchdog_by_default() {
        let config = FencerConfig::load(Path::new("/nowhere/fencer.toml")).unwrap();
        assert_eq!(config, FencerConfig::default());
        assert!(!config.watchdog && !config.software_watchdog);
    }

    /// The file that is installed shows the defaults, commented out: with the marks taken away it
    /// says the same.
    #[test]
    fn the_installed_file_shows_the_defaults() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/config/fencer.toml");
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(parse(&text).unwrap(), FencerConfig::default());
        let settings = text.lines().filter_map(|line| line.strip_prefix("# "));
        let settings: Vec<&str> = settings.filter(|line| line.contains(" = ")).collect();
        assert_eq!(settings.len(), 8, "{settings:?}");
        assert_eq!(parse(&settings.join("\n")).unwrap(), FencerConfig::default());
    }

    #[test]
    fn a_wrong_value_is_named_with_its_remedy() {
        for (text, part) in [
            ("watchdog_s = 0", "`watchdog_s` is 0; give 1"),
            ("pet_ms = 5000", "`pet_ms` is 5000; give less than watchdog_s"),
            ("priority = 100", "`priority` is 100"),
            ("runtime_dir = \"run\"", "absolute"),
            ("pet_mss = 1", "pet_mss"),
        ] {
            let refused = parse(text).unwrap_err().to_string();
            assert!(refused.contains(part), "{text}: {refused}");
        }
    }
}
