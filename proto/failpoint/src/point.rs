//! What happens when a process reaches a point. Debug builds only.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::process::{Signal, getpid, kill_process};

use crate::spec::{Action, Point, Spec, parse};
use crate::wait::{Cancel, Until, Waited, wait_for_file};

fn spec() -> &'static Spec {
    static SPEC: OnceLock<Spec> = OnceLock::new();
    SPEC.get_or_init(|| match std::env::var(crate::ENV) {
        Ok(text) => parse(&text).unwrap_or_else(|reason| give_up(&reason)),
        Err(std::env::VarError::NotPresent) => Spec::Listed(Vec::new()),
        Err(std::env::VarError::NotUnicode(_)) => give_up("it is not UTF-8"),
    })
}

pub(crate) fn active() -> bool {
    !matches!(spec(), Spec::Listed(points) if points.is_empty())
}

/// Whether anything is due at this point; asked before a thread is spent on it.
fn is_armed(name: &str) -> bool {
    match spec() {
        Spec::Listed(points) => points.iter().any(|point| point.name == name),
        Spec::Directory(dir) => {
            ["hold", "kill", "error"].iter().any(|kind| file(dir, name, kind).exists())
        }
    }
}

fn file(dir: &Path, name: &str, kind: &str) -> PathBuf {
    dir.join(format!("{name}.{kind}"))
}

pub(crate) fn hit(name: &str) {
    if hit_error(name, &Cancel::never()).is_err() {
        refuse_error(name);
    }
}

pub(crate) async fn hold(name: &str) {
    if hold_error(name).await.is_err() {
        refuse_error(name);
    }
}

/// Does what is due at this point.
pub(crate) fn hit_error(name: &str, cancel: &Cancel) -> Result<(), String> {
    match spec() {
        Spec::Listed(points) => hit_listed(points, name, cancel),
        Spec::Directory(dir) => hit_in_directory(dir, name, cancel),
    }
}

/// The first entry of this name that fires counts.
fn hit_listed(points: &[Point], name: &str, cancel: &Cancel) -> Result<(), String> {
    // All entries count the hit, whichever of them acts.
    let mut due = None;
    for point in points.iter().filter(|point| point.name == name) {
        due = due.or(point.fire());
    }
    match due {
        None => Ok(()),
        Some(Action::Kill) => kill_self(),
        Some(Action::Error(text)) => Err(text.clone()),
        Some(Action::Hold(dir)) => {
            hold_here(dir, name, ("go", Until::Exists), cancel);
            Ok(())
        }
    }
}

/// A process can be held first and then killed, or told to fail, when it is let go.
fn hit_in_directory(dir: &Path, name: &str, cancel: &Cancel) -> Result<(), String> {
    if file(dir, name, "hold").exists() {
        hold_here(dir, name, ("hold", Until::Gone), cancel);
    }
    // Only one process can take the file away: a kill is for the first that comes by.
    if std::fs::remove_file(file(dir, name, "kill")).is_ok() {
        kill_self();
    }
    match std::fs::read_to_string(file(dir, name, "error")) {
        Ok(text) => Err(text),
        Err(_) => Ok(()),
    }
}

pub(crate) async fn hold_error(name: &str) -> Result<(), String> {
    if !is_armed(name) {
        return Ok(());
    }
    // The waiting thread must end when this future is dropped, or the runtime could not shut down.
    let guard = CancelOnDrop(Cancel::new());
    let cancel = guard.0.clone();
    let point = name.to_owned();
    match tokio::task::spawn_blocking(move || hit_error(&point, &cancel)).await {
        Ok(result) => result,
        Err(error) => give_up(&format!("the point `{name}` failed: {error}")),
    }
}

struct CancelOnDrop(Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// `end` is the file, and what has to become of it, that lets the process go.
fn hold_here(dir: &Path, name: &str, end: (&str, Until), cancel: &Cancel) {
    let (kind, until) = end;
    let waited = announce(dir, name)
        .and_then(|()| wait_for_file(dir, &format!("{name}.{kind}"), until, None, cancel));
    match waited {
        Ok(Waited::Done | Waited::Cancelled | Waited::TimedOut) => {}
        Ok(Waited::DirectoryGone) => kill_self(),
        Err(error) => give_up(&format!("hold `{name}` in {}: {error}", dir.display())),
    }
}

/// Writes the `.reached` file under another name first: who sees it can read the whole id.
fn announce(dir: &Path, name: &str) -> io::Result<()> {
    let pid = getpid().as_raw_nonzero();
    let tmp = dir.join(format!(".{name}.{pid}.tmp"));
    std::fs::write(&tmp, pid.to_string())?;
    std::fs::rename(&tmp, dir.join(format!("{name}.reached")))
}

fn kill_self() -> ! {
    // Like a power cut: no destructor, no flush, no exit handler.
    let _ = kill_process(getpid(), Signal::KILL);
    // The signal is delivered before the call returns; this is for the compiler.
    std::process::abort()
}

fn refuse_error(name: &str) -> ! {
    give_up(&format!("the point `{name}` cannot fail; it takes kill and hold only"))
}

#[allow(clippy::print_stderr, reason = "a test's mistake; no log may be set up yet")]
fn give_up(reason: &str) -> ! {
    eprintln!("{}: {reason}", crate::ENV);
    std::process::abort()
}
