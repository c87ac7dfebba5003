//! What a lab leaves on this machine while it is up, and how all of it goes again: at its end, and
//! when somebody interrupts it. Its machines end with the process by themselves.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

/// The exit status of a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// Files and directories to remove.
#[derive(Clone, Default)]
pub struct Traces {
    paths: Arc<Mutex<Vec<PathBuf>>>,
}

impl Traces {
    pub fn add(&self, path: PathBuf) {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner).push(path);
    }

    /// Removes everything, the newest first, so that a directory is empty when its turn comes.
    pub fn remove(&self) {
        let mut paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        for path in paths.drain(..).rev() {
            // Some are not there yet, some not any more.
            let _gone = match path.is_dir() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
        }
    }

    /// From now on Ctrl-C, a hangup and SIGTERM remove everything and end this process.
    pub fn remove_at_signals(&self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let traces = self.clone();
        let signals = runtime.block_on(async {
            let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
            kinds.map(signal).into_iter().collect::<std::io::Result<Vec<_>>>()
        });
        let mut signals = signals.context("wait for signals")?;
        thread::spawn(move || {
            runtime.block_on(async {
                let [interrupt, terminate, hangup] = &mut signals[..] else { return };
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
            });
            traces.remove();
            std::process::exit(INTERRUPTED);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_goes_after_what_is_in_it() {
        let directory = std::env::temp_dir().join(format!("bw-traces-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&directory).unwrap();
        let file = directory.join("file");
        fs::write(&file, "x").unwrap();
        let traces = Traces::default();
        traces.add(directory.clone());
        traces.add(file);
        traces.add(directory.join("never-made"));
        traces.remove();
        assert!(!directory.exists());
    }
}
