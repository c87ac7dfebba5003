//! What the fencer tells the agent, and through it the controller: which bound this node can promise.
//!
//! `<runtime>/fencer/facts.json` is written once, when everything is set up, and removed when the
//! watchdog is disarmed. A fencer that died left its watchdog armed, so the facts stay true: the
//! next fencer pets it, or the host is reset.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::device::WatchdogFacts;

/// The file's name in the fencer's directory.
pub const FACTS_FILE: &str = "facts.json";

/// What the running fencer is and has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Facts {
    pub pid: u32,
    pub start_ticks: u64,
    /// The armed watchdog; `None` where none is configured.
    pub watchdog: Option<WatchdogFacts>,
    /// P, as this fencer enforces it.
    pub pet_ms: u64,
    /// How long a VMM may take to stop.
    pub stop_ms: u64,
    /// It is scheduled in real time.
    pub realtime: bool,
    /// It is locked into memory.
    pub locked: bool,
}

/// Why a node yields no fence proof by watchdog.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoProof {
    #[error("no watchdog is armed (`watchdog = true` in fencer.toml)")]
    NotArmed,
    #[error("its watchdog is the kernel's own, which a kernel that stands still does not reset")]
    Software,
    #[error("its fencer is not scheduled in real time, so that it may pet too late (CAP_SYS_NICE)")]
    NotRealTime,
    #[error("its fencer is not locked into memory, so that it may pet too late (CAP_IPC_LOCK)")]
    NotLocked,
}

/// The numbers for the inequality of the proof.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bound {
    /// Twd, read back.
    pub watchdog_ms: u64,
    /// P.
    pub pet_ms: u64,
}

impl Facts {
    /// For which bound the node can yield the proof `watchdog`, or why it cannot.
    pub fn proof(&self) -> Result<Bound, NoProof> {
        match &self.watchdog {
            None => Err(NoProof::NotArmed),
            Some(watchdog) if !watchdog.hardware => Err(NoProof::Software),
            Some(_) if !self.realtime => Err(NoProof::NotRealTime),
            Some(_) if !self.locked => Err(NoProof::NotLocked),
            Some(watchdog) => Ok(Bound { watchdog_ms: watchdog.timeout_ms, pet_ms: self.pet_ms }),
        }
    }

    /// Writes the facts: a reader sees all of them or none.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let new = directory.join(".facts.json.tmp");
        std::fs::write(&new, serde_json::to_vec(self)?)?;
        std::fs::rename(&new, directory.join(FACTS_FILE))
    }

    /// Reads the facts of a fencer's directory; `None` where no fencer has been, or the last one has
    /// disarmed its watchdog.
    pub fn read(directory: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(directory.join(FACTS_FILE)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes the facts back.
    pub fn remove(directory: &Path) -> io::Result<()> {
        match std::fs::remove_file(directory.join(FACTS_FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let watchdog = WatchdogFacts {
            device: "/dev/watchdog".into(),
            identity: "i6300ESB timer".into(),
            firmware_version: 0,
            timeout_ms: 6_000,
            nowayout: Some(false),
            hardware: true,
        };
        Facts {
            pid: 7,
            start_ticks: 8,
            watchdog: Some(watchdog),
            pet_ms: 1_000,
            stop_ms: 1_000,
            realtime: true,
            locked: true,
        }
    }

    #[test]
    fn what_is_written_is_read_until_it_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Facts::read(dir.path()).unwrap(), None);
        facts().write(dir.path()).unwrap();
        assert_eq!(Facts::read(dir.path()).unwrap(), Some(facts()));
        Facts::remove(dir.path()).unwrap();
        Facts::remove(dir.path()).unwrap();
        assert_eq!(Facts::read(dir.path()).unwrap(), None);
    }

    #[test]
    fn only_an_armed_hardware_watchdog_under_a_punctual_fencer_proves_anything() {
        assert_eq!(facts().proof(), Ok(Bound { watchdog_ms: 6_000, pet_ms: 1_000 }));
        assert_eq!(Facts { watchdog: None, ..facts() }.proof(), Err(NoProof::NotArmed));
        assert_eq!(Facts { realtime: false, ..facts() }.proof(), Err(NoProof::NotRealTime));
        assert_eq!(Facts { locked: false, ..facts() }.proof(), Err(NoProof::NotLocked));
        let mut software = facts();
        software.watchdog.as_mut().unwrap().hardware = false;
        assert_eq!(software.proof(), Err(NoProof::Software));
    }
}
