//! Everything that the command prints goes through here.
//!
//! Standard output carries results: tables, or JSON and nothing else. Standard error carries what
//! is for people: progress, notes, errors and their remedies.

mod json;
mod progress;
mod table;
mod time;
mod why;

use std::io::{ErrorKind, IsTerminal, Write, stderr, stdout};

use serde_json::Value;

pub use json::ToJson;
pub use progress::Progress;
pub use table::{
    Table, cluster_status, contexts, event_line, finding_line, migration, node, nodes, pre_copied,
    task, tasks, vm, vms,
};
pub use time::{coarse, now_ms};
pub use why::{forecast, task_explanation, vm_explanation};

use crate::args::Format;
use crate::exit::Failure;

/// Where results go and how they look.
pub struct Output {
    format: Format,
    /// The width to fold tables to; none when a program reads them.
    width: Option<u16>,
    stderr_is_terminal: bool,
}

impl Output {
    pub fn new(format: Format) -> Self {
        let width = rustix::termios::tcgetwinsize(stdout()).ok().map(|size| size.ws_col);
        Self {
            format,
            width: width.filter(|columns| *columns >= 20),
            stderr_is_terminal: stderr().is_terminal(),
        }
    }

    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    pub const fn stderr_is_terminal(&self) -> bool {
        self.stderr_is_terminal
    }

    /// A result as JSON on one line, or as a person reads it.
    pub fn result(&self, json: &Value, text: impl FnOnce() -> String) -> Result<(), Failure> {
        match self.format {
            Format::Json => self.line(&json.to_string()),
            Format::Table => match text().trim_end() {
                "" => Ok(()),
                text => self.line(text),
            },
        }
    }

    /// A table; `empty` says on standard error that there is nothing to show.
    pub fn table(&self, json: &Value, table: &Table, empty: &str) -> Result<(), Failure> {
        if !self.is_json() && table.is_empty() {
            self.note(empty);
            return Ok(());
        }
        self.result(json, || table.render(self.width))
    }

    /// One line of result.
    pub fn line(&self, text: &str) -> Result<(), Failure> {
        self.bytes(format!("{}\n", printable(text)).as_bytes())
    }

    /// Bytes of result, as they are.
    pub fn bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => Failure::output_closed(),
            _ => Failure::new(
                crate::exit::Exit::Unknown,
                format!("cannot write the result: {error}"),
            )
            .remedy("what was asked may be done; only its result could not be written"),
        })
    }

    /// Something a person may want to know, which is no result.
    pub fn note(&self, text: &str) {
        say(text);
    }

    /// The same, to be overlooked by nobody.
    pub fn warning(&self, text: &str) {
        say(&self.bold(text));
    }

    /// What is wrong and what to do.
    pub fn failure(&self, failure: &Failure) {
        if failure.message.is_empty() {
            return;
        }
        say(&format!("{} {}", self.bold("error:"), printable(&failure.message)));
        if let Some(remedy) = &failure.remedy {
            say(&format!("{} {remedy}", self.bold("remedy:")));
        }
    }

    /// Asks a person at a terminal; none when there is no terminal to ask at.
    pub fn question(&self, text: &str) -> Option<String> {
        if !std::io::stdin().is_terminal() || !self.stderr_is_terminal {
            return None;
        }
        write_stderr(format!("{text} ").as_bytes());
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).ok()?;
        Some(answer.trim().to_owned())
    }

    fn bold(&self, text: &str) -> String {
        let plain = !self.stderr_is_terminal || std::env::var_os("NO_COLOR").is_some();
        if plain { text.to_owned() } else { format!("\x1b[1m{text}\x1b[0m") }
    }
}

/// Names and reasons come from elsewhere; none of them may move the cursor.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// A line for people.
fn say(text: &str) {
    write_stderr(format!("{text}\n").as_bytes());
}

fn write_stderr(bytes: &[u8]) {
    // When standard error is gone there is nobody left to tell.
    let _ = stderr().lock().write_all(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_shown_moves_the_cursor() {
        assert_eq!(printable("a\x1b[2Jb\nc\r"), "a\u{fffd}[2Jb\nc\u{fffd}");
    }
}
