//! Named points at which a test can hold or kill a process, or make a step fail.
//!
//! A point costs nothing in a release build and one load of memory in a debug build whose
//! environment does not name it. The environment is read once, at the first point:
//!
//! ```text
//! BELLWETHER_FAILPOINTS='name=action;name2=action2'
//! action: kill          SIGKILL to this process
//!         hold:DIR      writes DIR/<name>.reached (this process's id), waits for DIR/<name>.go
//!         error:TEXT    failpoint_error! returns Err(TEXT)
//!         …@N           only at the Nth time that the process passes the point (1 is the first)
//! ```
//!
//! The other form is for tests that arm points while the process runs:
//!
//! ```text
//! BELLWETHER_FAILPOINTS='dir:DIR'         at each point, in this order:
//!   DIR/<name>.hold exists                writes DIR/<name>.reached, waits until it is gone
//!   DIR/<name>.kill exists                removes it, and SIGKILL to this process
//!   DIR/<name>.error exists               failpoint_error! returns Err(its text)
//! ```
//!
//! A name consists of letters, digits, `.`, `_` and `-`; a text or directory has no `;`. A point
//! that was let go stays open, as `DIR/<name>.go` stays. A process whose DIR disappears while it
//! is held kills itself, because nobody is left to let it go. A mistake in the variable ends the
//! process: a test must never pass because its fault was misspelt.
//!
//! ```
//! # use bellwether_failpoint::{failpoint, failpoint_error, hold};
//! # async fn saga() -> Result<(), String> {
//! failpoint!("migrate.after-stop");          // kill and hold; blocks the thread
//! hold("migrate.after-seal").await;          // the same in async code
//! failpoint_error!("storage.write")?;        // Result<(), String>
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod harness;
#[cfg(debug_assertions)]
mod point;
#[cfg(any(debug_assertions, test))]
mod spec;
mod wait;

pub use harness::HoldDir;

/// The environment variable that names the points.
pub const ENV: &str = "BELLWETHER_FAILPOINTS";

/// A point in synchronous code. It takes `kill` and `hold`.
#[macro_export]
macro_rules! failpoint {
    ($name:expr) => {
        $crate::hit($name)
    };
}

/// A point that can also fail: an expression of type `Result<(), String>`.
#[macro_export]
macro_rules! failpoint_error {
    ($name:expr) => {
        $crate::hit_error($name)
    };
}

/// Whether this process can reach any point. A `main` warns about it in its log.
#[inline(always)]
pub fn active() -> bool {
    #[cfg(debug_assertions)]
    return point::active();
    #[cfg(not(debug_assertions))]
    false
}

/// What [`failpoint!`] calls.
#[inline(always)]
pub fn hit(name: &str) {
    #[cfg(debug_assertions)]
    point::hit(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// What [`failpoint_error!`] calls.
#[inline(always)]
pub fn hit_error(name: &str) -> Result<(), String> {
    #[cfg(debug_assertions)]
    return point::hit_error(name, &wait::Cancel::never());
    #[cfg(not(debug_assertions))]
    {
        let _ = name;
        Ok(())
    }
}

/// A point in asynchronous code: the task waits, its thread does not. It takes `kill` and `hold`.
#[inline(always)]
pub async fn hold(name: &str) {
    #[cfg(debug_assertions)]
    point::hold(name).await;
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// A point in asynchronous code that can also fail.
#[inline(always)]
pub async fn hold_error(name: &str) -> Result<(), String> {
    #[cfg(debug_assertions)]
    return point::hold_error(name).await;
    #[cfg(not(debug_assertions))]
    {
        let _ = name;
        Ok(())
    }
}
