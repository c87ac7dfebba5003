//! The test's side of `hold`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::wait::{Cancel, Until, Waited, wait_for_file};

/// A directory in which processes report the points they reached and wait to be let go.
#[derive(Clone, Debug)]
pub struct HoldDir {
    dir: PathBuf,
}

impl HoldDir {
    /// Takes a directory that exists, by its absolute path.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The entry of the environment variable that holds a process at this point.
    pub fn entry(&self, name: &str) -> String {
        format!("{name}=hold:{}", self.dir.display())
    }

    /// Waits until a process is held at the point, and gives its id. Blocks the thread.
    pub fn wait_reached(&self, name: &str, timeout: Duration) -> io::Result<i32> {
        let file = format!("{name}.reached");
        match wait_for_file(&self.dir, &file, Until::Exists, Some(timeout), &Cancel::default())? {
            Waited::Done => {}
            other => {
                let what =
                    format!("nobody reached the point `{name}`: {other:?} after {timeout:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
        }
        let text = std::fs::read_to_string(self.dir.join(file))?;
        text.trim().parse().map_err(io::Error::other)
    }

    /// Lets all go that are held at the point or will reach it.
    pub fn release(&self, name: &str) -> io::Result<()> {
        std::fs::write(self.dir.join(format!("{name}.go")), "")
    }
}
