//! A switch's settings file. It has secrets in it, so nobody but its owner may read it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::parameters::Parameters;

/// Where the package fence-agents puts them.
const AGENTS: &str = "/usr/sbin";

/// How one host is switched off.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchConfig {
    /// `fence_ipmilan`, say, in /usr/sbin, or an absolute path.
    pub agent: String,
    /// How long `off` may take. Agents wait themselves until the host is off.
    #[serde(default = "off_ms")]
    pub off_ms: u64,
    /// How long one `status` may take.
    #[serde(default = "status_ms")]
    pub status_ms: u64,
    /// How long a status may say *on* after an `off` that succeeded.
    #[serde(default = "confirm_ms")]
    pub confirm_ms: u64,
    /// What the agent is told.
    #[serde(default)]
    pub parameters: Parameters,
}

fn off_ms() -> u64 {
    40_000
}
fn status_ms() -> u64 {
    10_000
}
fn confirm_ms() -> u64 {
    5_000
}

/// What is wrong with a settings file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read `{}`: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("`{}`: {source}", path.display())]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("`{}` may be read by others (mode {mode:o}), and it has secrets in it: chmod 600", path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("`{}`: `agent` is `{agent}`; give a name that begins with fence_, or an absolute path", path.display())]
    Agent { path: PathBuf, agent: String },
    #[error("`{}`: `{name}` is {value}; give 100 to 600000", path.display())]
    Time { path: PathBuf, name: &'static str, value: u64 },
}

impl SwitchConfig {
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.into(), source };
        let mode = std::fs::metadata(path).map_err(read)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(ConfigError::Exposed { path: path.into(), mode });
        }
        Self::parse(&std::fs::read_to_string(path).map_err(read)?, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|mut source| {
            // It would show the line, and the line may be a secret.
            source.set_input(None);
            ConfigError::Parse { path: path.into(), source: Box::new(source) }
        })?;
        let is_name = config.agent.starts_with("fence_") && !config.agent.contains('/');
        if !is_name && !Path::new(&config.agent).is_absolute() {
            return Err(ConfigError::Agent { path: path.into(), agent: config.agent });
        }
        let times = [
            ("off_ms", config.off_ms),
            ("status_ms", config.status_ms),
            ("confirm_ms", config.confirm_ms),
        ];
        match times.into_iter().find(|(_, ms)| !(100..=600_000).contains(ms)) {
            Some((name, value)) => Err(ConfigError::Time { path: path.into(), name, value }),
            None => Ok(config),
        }
    }

    /// The agent's program. A path stays what it is.
    pub fn program(&self) -> PathBuf {
        Path::new(AGENTS).join(&self.agent)
    }

    pub fn off_timeout(&self) -> Duration {
        Duration::from_millis(self.off_ms)
    }
    pub fn status_timeout(&self) -> Duration {
        Duration::from_millis(self.status_ms)
    }
    pub fn confirm(&self) -> Duration {
        Duration::from_millis(self.confirm_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn parse(text: &str) -> Result<SwitchConfig, ConfigError> {
        SwitchConfig::parse(text, Path::new("n2.toml"))
    }

    #[test]
    fn a_name_is_looked_for_where_agents_are() {
        let config = parse("agent = \"fence_ipmilan\"\n[parameters]\nip = \"10.0.9.2\"\n").unwrap();
        assert_eq!(config.program(), Path::new("/usr/sbin/fence_ipmilan"));
        assert_eq!(parse("agent = \"/opt/it\"").unwrap().program(), Path::new("/opt/it"));
        for agent in ["sh", "fence_x/../sh", "../fence_x"] {
            let refused = parse(&format!("agent = \"{agent}\"")).unwrap_err();
            assert!(matches!(refused, ConfigError::Agent { .. }), "{refused}");
        }
        assert!(matches!(parse("agent = \"fence_x\"\noff_ms = 9"), Err(ConfigError::Time { .. })));
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n2.toml");
        std::fs::write(&path, "agent = \"fence_dummy\"").unwrap();
        for (mode, taken) in [(0o644, false), (0o640, false), (0o600, true)] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            assert_eq!(SwitchConfig::load(&path).is_ok(), taken, "{mode:o}");
        }
    }

    #[test]
    fn an_error_does_not_show_the_line() {
        let refused =
            parse("agent = \"fence_x\"\n[parameters]\npassword = hunter22\n").unwrap_err();
        assert!(!refused.to_string().contains("hunter22"), "{refused}");
    }
}
