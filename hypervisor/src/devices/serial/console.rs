//! The console: a bounded ring of what the guest wrote, readers that follow it, and a file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// What a reader that attaches late still sees.
const RING_BYTES: usize = 64 * 1024;
/// A line longer than this goes to the file in parts.
const LINE_BYTES_MAX: usize = 1024;

/// Where the output also goes, besides the ring.
pub struct OutputFile {
    pub file: File,
    /// Write each byte at once: a terminal, where prompts matter.
    pub unbuffered: bool,
}

struct Ring {
    bytes: VecDeque<u8>,
    /// The number of bytes ever written.
    end: u64,
    file: Option<OutputFile>,
    line: Vec<u8>,
}

/// The output side of the serial port.
pub struct Console {
    ring: Mutex<Ring>,
    changed: watch::Sender<u64>,
}

/// What a reader gets: bytes, and how many before them were already gone.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    pub bytes: Vec<u8>,
    pub dropped: u64,
    /// Where to read on.
    pub next: u64,
}

impl Console {
    pub fn new(file: Option<OutputFile>) -> Self {
        let ring = Ring { bytes: VecDeque::new(), end: 0, file, line: Vec::new() };
        Self { ring: Mutex::new(ring), changed: watch::Sender::new(0) }
    }

    /// The output from position `from` on, at most `max` bytes.
    pub fn read(&self, from: u64, max: usize) -> Chunk {
        let ring = self.lock();
        let start = ring.end - ring.bytes.len() as u64;
        let dropped = start.saturating_sub(from);
        let from = from.max(start).min(ring.end);
        let skip = (from - start) as usize;
        let bytes: Vec<u8> = ring.bytes.iter().skip(skip).take(max).copied().collect();
        Chunk { dropped, next: from + bytes.len() as u64, bytes }
    }

    /// Follows the number of bytes ever written.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Brings the file up to date, although the last line is unfinished.
    pub fn flush(&self) {
        self.lock().flush_line();
    }

    fn push(&self, bytes: &[u8]) {
        let end = self.lock().push(bytes);
        self.changed.send_replace(end);
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn push(&mut self, bytes: &[u8]) -> u64 {
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(RING_BYTES);
        self.bytes.drain(..excess.min(self.bytes.len()));
        self.bytes.extend(bytes);
        self.end += bytes.len() as u64;
        if let Some(output) = &self.file {
            let at_once = output.unbuffered;
            self.line.extend(bytes);
            if at_once || bytes.contains(&b'\n') || self.line.len() >= LINE_BYTES_MAX {
                self.flush_line();
            }
        }
        self.end
    }

    /// A file that cannot be written costs its output, never the guest's life.
    fn flush_line(&mut self) {
        if let Some(output) = &mut self.file
            && let Err(error) = output.file.write_all(&self.line)
        {
            tracing::warn!(%error, "serial output does not reach its file");
        }
        self.line.clear();
    }
}

/// The writer that the chip gets.
pub struct Output(pub(super) Arc<Console>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_reader_learns_what_it_missed() {
        let console = Console::new(None);
        console.push(&vec![b'a'; RING_BYTES]);
        console.push(b"tail");
        let chunk = console.read(0, RING_BYTES);
        assert_eq!((chunk.dropped, chunk.bytes.len()), (4, RING_BYTES));
        assert!(chunk.bytes.ends_with(b"atail"));
        assert_eq!(console.read(chunk.next, 10).bytes, b"");
        console.push(b"!");
        assert_eq!(console.read(chunk.next, 10).bytes, b"!");
    }

    #[test]
    fn one_push_larger_than_the_ring_is_survived() {
        let console = Console::new(None);
        console.push(b"old");
        console.push(&vec![b'x'; RING_BYTES]);
        assert_eq!(console.read(0, usize::MAX).dropped, 3);
    }
}
