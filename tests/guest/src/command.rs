//! Command lines received on the serial port.

const LINE_BYTES_MAX: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    Ping,
    Stats,
    /// One `key=value`.
    Rate(&'a str),
    VerifyFill,
    Crash,
    Reset,
    PowerOff,
    Unknown(&'a str),
}

impl<'a> Command<'a> {
    pub fn parse(line: &'a str) -> Self {
        match line.trim() {
            "ping" => Self::Ping,
            "stats" => Self::Stats,
            "verify-fill" => Self::VerifyFill,
            "crash" => Self::Crash,
            "reset" => Self::Reset,
            "poweroff" => Self::PowerOff,
            other => match other.strip_prefix("rate ") {
                Some(rate) => Self::Rate(rate.trim()),
                None => Self::Unknown(other),
            },
        }
    }
}

/// Collects bytes into lines. What is longer than a line may be is cut off.
pub struct LineReader {
    bytes: [u8; LINE_BYTES_MAX],
    len: usize,
}

impl Default for LineReader {
    fn default() -> Self {
        Self { bytes: [0; LINE_BYTES_MAX], len: 0 }
    }
}

impl LineReader {
    /// Takes a byte. Calls `line` when it ended a line that is not empty.
    pub fn push<R>(&mut self, byte: u8, line: impl FnOnce(&str) -> R) -> Option<R> {
        if byte != b'\n' && byte != b'\r' {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = byte;
                self.len += 1;
            }
            return None;
        }
        let text = core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("?");
        self.len = 0;
        (!text.trim().is_empty()).then(|| line(text))
    }
}
