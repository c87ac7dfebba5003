//! The record of why a VMM ended: a file beside its socket, complete or absent.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::clock;

/// Exit status of the process; `--help` lists them.
pub const CODE_OK: u8 = 0;
pub const CODE_ERROR: u8 = 1;
pub const CODE_RESET: u8 = 3;
pub const CODE_TRIPLE_FAULT: u8 = 4;
pub const CODE_INTERNAL: u8 = 5;

/// What the file says, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExitRecord {
    pub vm_id: String,
    pub epoch: u64,
    /// As in the API: `guest-shutdown`, `guest-reset`, `triple-fault`, `internal-error: ...`,
    /// `stopped`, `signal`.
    pub reason: String,
    /// The state that it ended in.
    pub state: String,
    pub time_unix_ms: u64,
    pub boottime_ns: u64,
    pub pid: u32,
}

/// The process's exit status for a reason.
pub fn code_of(reason: &str) -> u8 {
    match reason {
        "guest-shutdown" | "stopped" | "signal" => CODE_OK,
        "guest-reset" => CODE_RESET,
        "triple-fault" => CODE_TRIPLE_FAULT,
        _ => CODE_INTERNAL,
    }
}

struct Recorder {
    path: PathBuf,
    /// What is known while the VMM lives, for a panic to record.
    last: Mutex<ExitRecord>,
}

static RECORDER: OnceLock<Recorder> = OnceLock::new();

/// Names the file, removes what an earlier VMM left there, and lets a panic of any thread record
/// itself and end the process: a VMM with a dead thread must not hold locks.
pub fn install(path: &Path) {
    let _nothing_there = fs::remove_file(path);
    let recorder = Recorder { path: path.to_path_buf(), last: Mutex::default() };
    let _installed_before = RECORDER.set(recorder);
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default_hook(info);
        record(&format!("internal-error: {info}"));
        std::process::abort();
    }));
}

/// Keeps what a later record will say besides its reason.
pub fn note(vm_id: &str, epoch: u64, state: &str) {
    if let Some(recorder) = RECORDER.get() {
        let mut last = recorder.last.lock().unwrap_or_else(PoisonError::into_inner);
        (last.vm_id, last.epoch, last.state) = (vm_id.to_owned(), epoch, state.to_owned());
    }
}

/// Writes the record, atomically, as well as it can: the reason is in the log in any case.
pub fn record(reason: &str) {
    let Some(recorder) = RECORDER.get() else { return };
    // A panicking thread may hold the lock itself.
    let last = recorder.last.try_lock().map(|last| last.clone()).unwrap_or_default();
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let record = ExitRecord {
        reason: reason.to_owned(),
        time_unix_ms: unix.as_millis() as u64,
        boottime_ns: clock::boottime_ns(),
        pid: std::process::id(),
        ..last
    };
    if let Err(error) = write(&recorder.path, &record) {
        tracing::warn!(path = %recorder.path.display(), %error, "the exit record cannot be written");
    }
}

fn write(path: &Path, record: &ExitRecord) -> std::io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".tmp");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    fs::rename(&partial, path)
}
