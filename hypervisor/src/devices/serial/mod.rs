//! The serial port COM1, a 16550 (from vm-superio), with a console that can be attached.

mod console;
mod saved;

pub use console::{Console, Output, OutputFile};
pub use saved::SerialV1;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::PortDevice;
use super::saved::SavedError;
use crate::kvm::GuestEnd;

/// Input that waits for the guest; what does not fit is refused, not dropped.
const INPUT_BYTES_MAX: usize = 4096;

/// Raises COM1's interrupt through an irqfd.
#[derive(Clone)]
pub struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Port {
    uart: Uart<Line, NoEvents, Output>,
    /// What the 64 bytes of the chip's FIFO have no room for yet.
    waiting: VecDeque<u8>,
}

pub struct Serial {
    port: Mutex<Port>,
    line: Line,
    console: Arc<Console>,
}

impl Serial {
    pub fn new(interrupt: EventFd, console: Arc<Console>) -> Self {
        let line = Line(Arc::new(interrupt));
        let uart = Uart::new(line.clone(), Output(Arc::clone(&console)));
        let port = Port { uart, waiting: VecDeque::new() };
        Self { port: Mutex::new(port), line, console }
    }

    /// The ring of what the guest wrote.
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// Gives input to the guest; returns how many bytes were taken.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut port = self.lock();
        let room = INPUT_BYTES_MAX.saturating_sub(port.waiting.len());
        let taken = bytes.len().min(room);
        port.waiting.extend(&bytes[..taken]);
        port.refill();
        taken
    }

    /// Raises the interrupt again if it is pending. The kernel takes it to the interrupt chips later
    /// than the chip here raises it, so between two VMMs it may be lost; the chip would not raise it
    /// again, and a driver would wait for it for ever. An extra one is harmless.
    pub fn kick(&self) {
        const NONE_PENDING: u8 = 1;
        let is_pending = self.lock().uart.state().interrupt_identification & NONE_PENDING == 0;
        if is_pending && let Err(error) = self.line.trigger() {
            tracing::warn!(%error, "the interrupt of the serial port cannot be raised");
        }
    }

    pub fn save(&self) -> SerialV1 {
        let port = self.lock();
        SerialV1::new(&port.uart.state(), port.waiting.iter().copied().collect())
    }

    pub fn restore(&self, state: SerialV1) -> Result<(), SavedError> {
        let (registers, waiting) = state.into_parts()?;
        let output = Output(Arc::clone(&self.console));
        let uart =
            Uart::from_state(&registers, self.line.clone(), NoEvents, output).map_err(|error| {
                SavedError::Mismatch { kind: "serial".into(), why: format!("{error:?}") }
            })?;
        *self.lock() = Port { uart, waiting };
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port {
    /// Moves waiting input into the chip's FIFO, as much as fits.
    fn refill(&mut self) {
        let count = self.uart.fifo_capacity().min(self.waiting.len());
        if count == 0 {
            return;
        }
        let bytes: Vec<u8> = self.waiting.iter().take(count).copied().collect();
        // In loopback mode the chip takes nothing; the bytes wait.
        match self.uart.enqueue_raw_bytes(&bytes) {
            Ok(taken) => drop(self.waiting.drain(..taken)),
            Err(error) => tracing::debug!(?error, "the serial port takes no input"),
        }
    }
}

impl PortDevice for Serial {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let (Some(first), Ok(register)) = (data.first_mut(), u8::try_from(offset)) else { return };
        let mut port = self.lock();
        *first = port.uart.read(register);
        if register == 0 && !port.waiting.is_empty() {
            port.refill();
        }
    }

    fn write(&self, offset: u16, data: &[u8]) -> Option<GuestEnd> {
        if let (Some(&byte), Ok(register)) = (data.first(), u8::try_from(offset))
            && let Err(error) = self.lock().uart.write(register, byte)
        {
            tracing::debug!(?error, "serial output was lost");
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const DATA: u16 = 0;
    const INTERRUPT_ENABLE: u16 = 1;
    const INTERRUPT_IDENTIFICATION: u16 = 2;
    const TRANSMITTER_EMPTY: u8 = 2;

    fn port() -> (Serial, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let seen = interrupt.try_clone().unwrap();
        (Serial::new(interrupt, Arc::new(Console::new(None))), seen)
    }

    #[test]
    fn an_interrupt_that_was_lost_between_two_vmms_is_raised_again() {
        let (source, raised) = port();
        source.write(INTERRUPT_ENABLE, &[TRANSMITTER_EMPTY]);
        source.write(DATA, b"x");
        raised.read().unwrap();
        let (target, raised) = port();
        target.restore(source.save()).unwrap();
        // What was raised now reached interrupt chips whose state is set afterwards.
        let _raised_too_early = raised.read();
        target.kick();
        assert!(raised.read().is_ok(), "the driver waits for ever");
        // The driver asks what it was: then it has heard.
        target.read(INTERRUPT_IDENTIFICATION, &mut [0]);
        target.kick();
        assert!(raised.read().is_err());
    }
}
