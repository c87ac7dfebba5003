//! `bell.toml`: which clusters this administrator knows, and how to reach each.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bellwether_member::{create_private_dir, write_atomic};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};

/// How to reach one cluster, and as whom.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// API addresses of controllers, tried in this order.
    pub endpoints: Vec<SocketAddr>,
    /// The directory with `ca.pem`, `cert.pem` and `key.pem`.
    pub identity: PathBuf,
}

/// All contexts of a file.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    /// The one that is used when none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    #[serde(default)]
    pub contexts: BTreeMap<String, Context>,
}

impl Contexts {
    /// Finds a context by name, or the current one.
    pub fn choose(&self, name: Option<&str>) -> Result<(&str, &Context), Failure> {
        let Some(name) = name.or(self.current.as_deref()) else {
            return Err(Failure::usage(
                "there is no context, so it is not known which cluster is meant",
            )
            .remedy(
                "make a cluster with `bell cluster init`, or add one with `bell context add`",
            ));
        };
        match self.contexts.get_key_value(name) {
            Some((name, context)) => Ok((name, context)),
            None => Err(Failure::new(Exit::NotFound, format!("there is no context `{name}`"))
                .remedy("`bell context list` shows those that exist")),
        }
    }
}

/// Where contexts are kept.
pub struct ContextFile {
    path: PathBuf,
}

impl ContextFile {
    /// The given file, or `~/.config/bellwether/bell.toml`.
    pub fn locate(given: Option<&Path>) -> Result<Self, Failure> {
        let path = match given {
            Some(path) => path.to_path_buf(),
            None => home()?.join(".config/bellwether/bell.toml"),
        };
        let path = std::path::absolute(&path)
            .map_err(|error| Failure::usage(format!("--config {}: {error}", path.display())))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of the file, in which identities are kept, too.
    pub fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Reads the contexts; a file that is not there has none.
    pub fn load(&self) -> Result<Contexts, Failure> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Contexts::default());
            }
            Err(error) => return Err(self.unusable(&error.to_string())),
        };
        toml::from_str(&text).map_err(|error| self.unusable(error.to_string().trim_end()))
    }

    /// Changes the file under a lock, so that two commands at once both have their effect.
    pub fn change<T>(
        &self,
        change: impl FnOnce(&mut Contexts) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        create_private_dir(self.dir()).map_err(|error| self.unusable(&error.to_string()))?;
        let _lock = self.lock().map_err(|error| self.unusable(&error.to_string()))?;
        let mut contexts = self.load()?;
        let done = change(&mut contexts)?;
        let text = toml::to_string(&contexts).map_err(|error| self.unusable(&error.to_string()))?;
        write_atomic(&self.path, text.as_bytes(), 0o600)
            .map_err(|error| self.unusable(&error.to_string()))?;
        Ok(done)
    }

    /// A file beside the contexts, because those are replaced and a lock on them would go with them.
    fn lock(&self) -> std::io::Result<File> {
        let mut name = OsString::from(".");
        name.push(self.path.file_name().unwrap_or_default());
        name.push(".lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.dir().join(name))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    }

    fn unusable(&self, reason: &str) -> Failure {
        Failure::usage(format!("{}: {reason}", self.path.display()))
            .remedy("correct the file, or give another with --config")
    }
}

fn home() -> Result<PathBuf, Failure> {
    match std::env::var_os("HOME") {
        Some(home) if !home.is_empty() => Ok(PathBuf::from(home)),
        _ => Err(Failure::usage("HOME is not set, so there is no place for contexts")
            .remedy("give the file with --config or $BELLWETHER_CONFIG")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn context(port: u16) -> Context {
        Context {
            endpoints: vec![SocketAddr::from(([127, 0, 0, 1], port))],
            identity: "/root/admin".into(),
        }
    }

    fn add(file: &ContextFile, name: &str, port: u16) {
        file.change(|all| {
            all.contexts.insert(name.into(), context(port));
            all.current = Some(name.into());
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_change_keeps_what_was_there_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let file = ContextFile::locate(Some(&dir.path().join("new/bell.toml"))).unwrap();
        assert_eq!(file.load().unwrap(), Contexts::default());
        add(&file, "lab", 7400);
        add(&file, "production", 7500);
        let all = file.load().unwrap();
        assert_eq!(all.choose(None).unwrap(), ("production", &context(7500)));
        assert_eq!(all.choose(Some("lab")).unwrap(), ("lab", &context(7400)));
        assert_eq!(all.choose(Some("x")).unwrap_err().exit, Exit::NotFound);
        assert_eq!(Contexts::default().choose(None).unwrap_err().exit, Exit::Usage);
        let mode = std::fs::metadata(file.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_refused_change_and_a_bad_file_leave_the_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = ContextFile::locate(Some(&dir.path().join("bell.toml"))).unwrap();
        add(&file, "lab", 7400);
        let before = std::fs::read(file.path()).unwrap();
        let refused = file.change(|all| {
            all.contexts.clear();
            Err::<(), _>(Failure::usage("no"))
        });
        assert!(refused.is_err());
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
        std::fs::write(file.path(), "colour = 1\n").unwrap();
        let failure = file.load().unwrap_err();
        assert!(failure.message.contains("bell.toml") && failure.message.contains("colour"));
    }
}
