//! The worker thread of one disk.
//!
//! ```text
//! wait for the doorbell -> enter the gate -> [ pop, do, put into used ring ]* -> interrupt -> leave
//!                             | closed                  | closed in the middle
//!                             v                         v
//!                        wait for it             give the request back, leave, wait
//! ```
//!
//! The gate is checked before every submission to the disk. A request that was begun when the gate
//! closed goes back into the available ring as if it had never been taken; it is done again from
//! the start, which is harmless because disk writes are idempotent.

use std::cell::Cell;
use std::io::ErrorKind;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::request::{Parsed, Request, RequestKind, parse};
use super::{Active, Shared};
use crate::devices::virtio::Piece;

const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// Data passes through a buffer of this size. Copying costs little, and it lets page faults on
/// guest memory that is still being restored happen in user mode, where they are always served.
const BUFFER_BYTES: usize = 128 * 1024;

/// Log at most this many failures a disk at level warn: a guest decides how many there are.
const WARNINGS_MAX: u32 = 20;

/// The gate closed before the request was done.
struct Interrupted;

enum Step {
    Done,
    Empty,
    Interrupted,
}

pub(super) fn run(shared: &Shared) {
    let mut worker = Worker { shared, buffer: Vec::new(), warnings: Cell::new(0) };
    loop {
        match shared.doorbell.read() {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "waiting for a doorbell failed; the disk stops");
                return;
            }
        }
        while worker.serve() {
            // Its requests stay in the queue, for when the gate opens.
            shared.gate.wait_open();
        }
    }
}

struct Worker<'a> {
    shared: &'a Shared,
    buffer: Vec<u8>,
    warnings: Cell<u32>,
}

impl Worker<'_> {
    /// Serves requests until the queue is empty or the gate closes; true for the latter.
    fn serve(&mut self) -> bool {
        // The pass is given back last: whoever waits for it finds the used ring complete and the
        // interrupt sent.
        let Some(_pass) = self.shared.gate.try_enter() else { return true };
        let mut used = false;
        let closed = loop {
            if !self.shared.gate.may_submit() {
                break true;
            }
            let mut active = self.shared.active();
            let Some(queue) = active.as_mut().filter(|active| !active.is_broken) else {
                break false;
            };
            match self.step(queue) {
                Step::Done => used = true,
                Step::Empty => break false,
                Step::Interrupted => break true,
            }
        };
        if used {
            self.shared.link.notify_queue(0);
        }
        closed
    }

    /// Takes one request from the queue and does it.
    fn step(&mut self, active: &mut Active) -> Step {
        let memory = &self.shared.memory;
        let before = active.queue.next_avail();
        let next = match active.queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(error) => return self.break_queue(active, &error.to_string()),
        };
        let Some(chain) = next else { return Step::Empty };
        let Parsed { head, request } = parse(chain, memory, self.shared.disk.sectors());
        let request = match request {
            Ok(request) => request,
            Err(error) => return self.break_queue(active, &error.to_string()),
        };
        let Ok((status, written)) = self.execute(&request, active.has_flush) else {
            active.queue.set_next_avail(before);
            return Step::Interrupted;
        };
        let answered = memory.write_obj(status, request.status).is_ok()
            && active.queue.add_used(memory, head, written + 1).is_ok();
        if answered {
            Step::Done
        } else {
            self.break_queue(active, "an answer has no place in guest memory")
        }
    }

    fn break_queue(&self, active: &mut Active, why: &str) -> Step {
        self.warn(why);
        active.is_broken = true;
        self.shared.link.set_needs_reset();
        Step::Empty
    }

    /// The status and the number of data bytes that were written to guest memory.
    fn execute(&mut self, request: &Request, has_flush: bool) -> Result<(u8, u32), Interrupted> {
        let disk = &self.shared.disk;
        match request.kind {
            RequestKind::Read { offset } => self.transfer(&request.data, offset, false),
            RequestKind::Write { .. } if disk.is_read_only() => {
                self.warn("write to a read-only disk");
                Ok((STATUS_IO_ERROR, 0))
            }
            RequestKind::Write { offset } => {
                let (status, _) = self.transfer(&request.data, offset, true)?;
                if status == STATUS_OK && !has_flush { self.flush() } else { Ok((status, 0)) }
            }
            RequestKind::Flush => self.flush(),
            RequestKind::GetId => Ok(self.get_id(&request.data)),
            RequestKind::Unsupported => Ok((STATUS_UNSUPPORTED, 0)),
            RequestKind::Invalid(why) => {
                self.warn(why);
                Ok((STATUS_IO_ERROR, 0))
            }
        }
    }

    fn flush(&self) -> Result<(u8, u32), Interrupted> {
        self.check_gate()?;
        if self.shared.disk.is_read_only() {
            return Ok((STATUS_OK, 0));
        }
        match self.shared.disk.sync() {
            Ok(()) => Ok((STATUS_OK, 0)),
            Err(error) => {
                self.warn(&format!("flush: {error}"));
                Ok((STATUS_IO_ERROR, 0))
            }
        }
    }

    fn get_id(&self, data: &[Piece]) -> (u8, u32) {
        let id = self.shared.disk.id();
        let mut done = 0;
        for piece in data {
            let part = &id[done..(done + piece.len as usize).min(id.len())];
            if self.shared.memory.write_slice(part, piece.address).is_err() {
                return (STATUS_IO_ERROR, done as u32);
            }
            done += part.len();
        }
        (STATUS_OK, done as u32)
    }

    /// Moves the pieces from or to the disk. An error ends it where it is.
    fn transfer(
        &mut self,
        pieces: &[Piece],
        mut offset: u64,
        is_write: bool,
    ) -> Result<(u8, u32), Interrupted> {
        let mut written = 0;
        self.buffer.resize(BUFFER_BYTES, 0);
        for piece in pieces {
            let mut done = 0;
            while done < piece.len {
                self.check_gate()?;
                let len = (piece.len - done).min(BUFFER_BYTES as u32);
                let address = piece.address.0.checked_add(u64::from(done));
                if !self.move_part(address, len as usize, offset, is_write) {
                    return Ok((STATUS_IO_ERROR, written));
                }
                done += len;
                offset += u64::from(len);
                written += if is_write { 0 } else { len };
            }
        }
        Ok((STATUS_OK, written))
    }

    fn move_part(&mut self, address: Option<u64>, len: usize, offset: u64, is_write: bool) -> bool {
        let (disk, memory) = (&self.shared.disk, &self.shared.memory);
        let Some(address) = address.map(GuestAddress) else { return false };
        let part = &mut self.buffer[..len];
        let result = if is_write {
            match memory.read_slice(part, address) {
                Ok(()) => disk.write(part, offset).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            }
        } else {
            match disk.read(part, offset) {
                Ok(()) => memory.write_slice(part, address).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            }
        };
        match result {
            Ok(()) => true,
            Err(error) => {
                self.warn(&format!("{len} bytes at {offset}: {error}"));
                false
            }
        }
    }

    fn check_gate(&self) -> Result<(), Interrupted> {
        if self.shared.gate.may_submit() { Ok(()) } else { Err(Interrupted) }
    }

    fn warn(&self, why: &str) {
        let disk = self.shared.disk.path().display();
        if self.warnings.get() < WARNINGS_MAX {
            self.warnings.set(self.warnings.get() + 1);
            tracing::warn!(%disk, why, "disk request failed");
        } else {
            tracing::debug!(%disk, why, "disk request failed");
        }
    }
}
