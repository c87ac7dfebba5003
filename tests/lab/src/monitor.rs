//! QEMU's own monitor of one machine: it says when the watchdog fired and when the machine was reset,
//! whatever the host itself can still say.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::timeline::Timeline;

/// A machine opens its monitor within milliseconds after it was switched on.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Between two tries.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);

/// What one machine's monitors have told, over all the times that it was switched on.
#[derive(Clone, Default)]
pub struct Monitor {
    fired: Arc<Mutex<Vec<Duration>>>,
}

impl Monitor {
    /// Follows the machine that was just switched on, until it is switched off.
    pub fn follow(&self, host: &str, socket: &Path, timeline: &Timeline) -> Result<()> {
        let mut stream = connect(socket)?;
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").context("talk to QEMU")?;
        let (own, host, timeline) = (self.clone(), host.to_owned(), timeline.clone());
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                own.take(&host, &line, &timeline);
            }
        });
        Ok(())
    }

    fn take(&self, host: &str, line: &str, timeline: &Timeline) {
        let Ok(said) = serde_json::from_str::<Value>(line) else { return };
        match said["event"].as_str() {
            Some("WATCHDOG") => {
                timeline.note(host, "machine: its watchdog fires");
                let mut fired = self.fired.lock().unwrap_or_else(PoisonError::into_inner);
                fired.push(timeline.now());
            }
            Some("RESET") => timeline.note(host, "machine: reset"),
            _ => {}
        }
    }

    /// When its watchdog has fired, by the lab's clock.
    pub fn fired(&self) -> Vec<Duration> {
        self.fired.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let mut waited = Duration::ZERO;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(_) if waited < CONNECT_MAX => {
                thread::park_timeout(CONNECT_PAUSE);
                waited += CONNECT_PAUSE;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("connect to {}", socket.display()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_watchdog_counts() {
        let path = std::env::temp_dir().join(format!("bw-monitor-{}", uuid::Uuid::new_v4()));
        let timeline = Timeline::create(&path).unwrap();
        let monitor = Monitor::default();
        for line in [
            r#"{"QMP": {"version": {}}}"#,
            r#"{"return": {}}"#,
            r#"{"timestamp": {}, "event": "RESET", "data": {"guest": true}}"#,
            r#"{"timestamp": {}, "event": "WATCHDOG", "data": {"action": "reset"}}"#,
        ] {
            monitor.take("node1", line, &timeline);
        }
        assert_eq!(monitor.fired().len(), 1);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("machine: reset") && text.contains("watchdog fires"), "{text}");
        std::fs::remove_file(path).unwrap();
    }
}
