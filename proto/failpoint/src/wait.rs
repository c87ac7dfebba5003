//! Waiting for a file to appear or to go.

use std::io;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::io::Errno;

/// Between two looks without any event: some file systems report none, and a cancelled wait ends
/// no later than this.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Lets the waiter know that nobody waits for it any more.
#[derive(Clone, Default)]
pub(crate) struct Cancel(Option<Arc<AtomicBool>>);

#[cfg(debug_assertions)]
impl Cancel {
    pub(crate) fn never() -> Self {
        Self(None)
    }

    pub(crate) fn new() -> Self {
        Self(Some(Arc::default()))
    }

    pub(crate) fn cancel(&self) {
        if let Some(flag) = &self.0 {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

impl Cancel {
    fn cancelled(&self) -> bool {
        self.0.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    Exists,
    Gone,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// The file exists, or is gone, as was wanted.
    Done,
    TimedOut,
    Cancelled,
    /// The directory itself is gone, and so is whoever would have made the file.
    DirectoryGone,
}

/// Waits until `dir/name` exists, or until it is gone.
pub(crate) fn wait_for_file(
    dir: &Path,
    name: &str,
    until: Until,
    timeout: Option<Duration>,
    cancel: &Cancel,
) -> io::Result<Waited> {
    let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    // The watch comes before the first look: a change between the two makes an event.
    let interest = inotify::WatchFlags::CREATE
        | inotify::WatchFlags::MOVED_TO
        | inotify::WatchFlags::DELETE
        | inotify::WatchFlags::MOVED_FROM
        | inotify::WatchFlags::DELETE_SELF;
    match inotify::add_watch(&events, dir, interest) {
        Ok(_) => {}
        Err(Errno::NOENT) => return Ok(Waited::DirectoryGone),
        Err(error) => return Err(error.into()),
    }
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        let exists = dir.join(name).try_exists()?;
        if !exists && !dir.try_exists()? {
            return Ok(Waited::DirectoryGone);
        }
        if exists == (until == Until::Exists) {
            return Ok(Waited::Done);
        }
        if cancel.cancelled() {
            return Ok(Waited::Cancelled);
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(Waited::TimedOut);
        }
        poll_events(&events, left.unwrap_or(LOOK_INTERVAL).min(LOOK_INTERVAL))?;
    }
}

/// Waits for events or for the time, and empties the queue: the caller looks at the directory.
fn poll_events(events: &rustix::fd::OwnedFd, timeout: Duration) -> io::Result<()> {
    let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(events, PollFlags::IN)], Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(events, &mut buffer);
    loop {
        match reader.next() {
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
