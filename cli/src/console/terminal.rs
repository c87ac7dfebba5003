//! The terminal in raw mode, and back again whatever happens.
//!
//! Three ways lead out: the guard is dropped, the process panics (the release build aborts without
//! running destructors, so that a hook does it), or a signal ends it.

use std::io::stdin;
use std::sync::{Mutex, Once, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::{Exit, Failure};

/// What to restore; none when the terminal is as it was found.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal is raw as long as this lives.
pub struct RawTerminal;

impl RawTerminal {
    pub fn enter() -> Result<Self, Failure> {
        let failed = |error: rustix::io::Errno| {
            Failure::new(Exit::Refused, format!("cannot set the terminal to raw mode: {error}"))
        };
        let found = tcgetattr(stdin()).map_err(failed)?;
        let mut raw = found.clone();
        raw.make_raw();
        restore_on_panic();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        // From here on dropping the guard restores, also if this fails half-way.
        let guard = Self;
        tcsetattr(stdin(), OptionalActions::Flush, &raw).map_err(failed)?;
        Ok(guard)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(saved) = saved {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &saved);
    }
}

fn restore_on_panic() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
    });
}

/// The signals that end a console from outside. In raw mode Ctrl-C is a byte for the guest.
pub struct Signals {
    terminate: Signal,
    hangup: Signal,
    interrupt: Signal,
}

impl Signals {
    pub fn new() -> Result<Self, Failure> {
        let listen = |kind| {
            signal(kind).map_err(|error| {
                Failure::new(Exit::Refused, format!("cannot listen for signals: {error}"))
            })
        };
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    /// Waits for one; the command ends with it, through the restoring of the terminal.
    pub async fn next(&mut self) -> Failure {
        let name = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hangup.recv() => "SIGHUP",
            _ = self.interrupt.recv() => "SIGINT",
        };
        Failure::new(Exit::Unknown, format!("the console was left by {name}"))
    }
}
