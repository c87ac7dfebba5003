//! The one record of a run: what the lab did and what every host said, in the order in which it
//! happened by the lab's clock. Host clocks may jump; this one does not.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// The lab's own lines.
pub const LAB: &str = "lab";

#[derive(Clone)]
pub struct Timeline {
    inner: Arc<Inner>,
}

struct Inner {
    started: Instant,
    /// The same moment by the wall clock, milliseconds.
    began_ms: u64,
    path: PathBuf,
    file: Mutex<File>,
}

impl Timeline {
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let inner = Inner {
            started: Instant::now(),
            began_ms: wall.as_millis() as u64,
            path: path.to_owned(),
            file: Mutex::new(file),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// When the lab started, by the clock that its hosts are set by: milliseconds since 1970.
    pub fn began_ms(&self) -> u64 {
        self.inner.began_ms
    }

    /// What time it is by that clock, which never jumps: milliseconds since 1970.
    pub fn wall_ms(&self) -> u64 {
        self.inner.began_ms + self.now().as_millis() as u64
    }

    /// Since the lab started.
    pub fn now(&self) -> Duration {
        self.inner.started.elapsed()
    }

    /// Adds a line.
    pub fn note(&self, source: &str, text: &str) {
        let mut file = self.inner.file.lock().unwrap_or_else(PoisonError::into_inner);
        let line = format!("{} {source:<8} {text}\n", stamp(self.now()));
        // A full disk must not stop the lab; the run itself says what failed.
        let _ = file.write_all(line.as_bytes());
    }
}

/// `  12.345`, seconds.
pub fn stamp(at: Duration) -> String {
    format!("{:>9.3}", at.as_secs_f64())
}
