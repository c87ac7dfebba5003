//! The fencer's log: lines on standard error with the priority that systemd's journal reads, written
//! without allocating. A line that cannot be written is lost: the fencer waits for nobody.

use std::fmt;

use crate::text::Text;

/// As syslog has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// A person must act.
    Error = 3,
    /// It works on, with less.
    Warn = 4,
    /// A change of state.
    Info = 6,
}

/// Writes one line.
pub fn log(level: Level, arguments: fmt::Arguments<'_>) {
    let line = Text::<600>::new(format_args!("<{}>{arguments}\n", level as u8));
    let _lost = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}
