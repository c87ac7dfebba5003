//! The serial console: lines out through a bounded queue, command lines in.
//!
//! The queue keeps a slow reader of the serial port from stopping the guest. A line that does not fit is
//! dropped as a whole and counted; a fatal report waits instead.

use crate::ports::{inb, outb};
use crate::sync::Lock;
use core::fmt::{self, Write};

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
const DATA_READY: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO_BYTES: usize = 16;
const QUEUE_BYTES: usize = 32 * 1024;
/// How often an unready transmitter is asked before the rest waits for the next wake-up.
const POLLS_MAX: u32 = 64;
/// A fatal report gives up on a dead port only after this many polls.
const POLLS_FATAL_MAX: u32 = 10_000_000;

struct Console {
    queue: [u8; QUEUE_BYTES],
    head: usize,
    len: usize,
    overflowed: bool,
    dropped: u64,
    burst: usize,
}

static CONSOLE: Lock<Console> = Lock::new(Console {
    queue: [0; QUEUE_BYTES],
    head: 0,
    len: 0,
    overflowed: false,
    dropped: 0,
    burst: 1,
});

/// Sets the port to 115200 8N1 without interrupts.
pub fn init() {
    const SETUP: [(u16, u8); 7] = [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 1), (4, 3)];
    for (offset, value) in SETUP {
        // SAFETY: the first serial port belongs to this module.
        unsafe { outb(PORT + offset, value) };
    }
    // SAFETY: as above; the top bits say whether the FIFO took.
    let fifo = unsafe { inb(PORT + 2) } & 0xc0 == 0xc0;
    CONSOLE.with(|c| c.burst = if fifo { FIFO_BYTES } else { 1 });
}

/// Queues one line.
pub fn line(args: fmt::Arguments) {
    CONSOLE.with(|c| c.line(args));
}

/// Sends what the port takes now. Returns true when nothing is left.
pub fn drain() -> bool {
    CONSOLE.with(|c| c.drain(POLLS_MAX))
}

/// Sends everything, waiting for the port.
pub fn flush() {
    CONSOLE.with(|c| c.drain(POLLS_FATAL_MAX));
}

/// The last line of a guest that stops: whatever held the console does not matter any more.
pub fn last_line(args: fmt::Arguments) {
    CONSOLE.seize();
    CONSOLE.with(|c| {
        c.drain(POLLS_FATAL_MAX);
        c.line(args);
        c.drain(POLLS_FATAL_MAX);
    });
}

/// Lines that were lost because the queue was full.
pub fn dropped() -> u64 {
    CONSOLE.with(|c| c.dropped)
}

/// One received byte, if there is one.
pub fn receive() -> Option<u8> {
    // SAFETY: the first serial port belongs to this module.
    unsafe { (inb(LINE_STATUS) & DATA_READY != 0).then(|| inb(PORT)) }
}

impl Console {
    fn line(&mut self, args: fmt::Arguments) {
        let before = self.len;
        self.overflowed = false;
        let written = writeln!(self, "{args}");
        if written.is_err() || self.overflowed {
            self.len = before;
            self.dropped += 1;
        }
    }

    fn drain(&mut self, polls_max: u32) -> bool {
        while self.len > 0 {
            if !transmitter_empties(polls_max) {
                return false;
            }
            for _ in 0..self.burst.min(self.len) {
                // SAFETY: the first serial port belongs to this module.
                unsafe { outb(PORT, self.queue[self.head]) };
                self.head = (self.head + 1) % QUEUE_BYTES;
                self.len -= 1;
            }
        }
        true
    }
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.len == QUEUE_BYTES {
                self.overflowed = true;
                return Err(fmt::Error);
            }
            self.queue[(self.head + self.len) % QUEUE_BYTES] = byte;
            self.len += 1;
        }
        Ok(())
    }
}

fn transmitter_empties(polls_max: u32) -> bool {
    // SAFETY: the first serial port belongs to this module.
    (0..polls_max).any(|_| unsafe { inb(LINE_STATUS) } & TRANSMITTER_EMPTY != 0)
}

#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => { $crate::console::line(format_args!($($arg)*)) };
}
