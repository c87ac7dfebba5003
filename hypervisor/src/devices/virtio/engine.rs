//! The queues of a device whose work is short, and the one thread that serves them.
//!
//! ```text
//! wait for a doorbell or the host -> enter the gate -> serve until nothing is left -> interrupt -> leave
//!                                       | closed
//!                                       v
//!                                  wait for it; what waits in the queues stays there
//! ```
//!
//! A pass through the gate ends with every chain that was taken given back, so that a thread which
//! is outside has nothing outstanding: that is what a save needs.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Chain, ChainError, Link, Piece, QueueV1};
use crate::GuestMemory;
use crate::gate::Gate;
use crate::kvm::kick::borrow_event;

/// The device cannot go on, mostly because the driver broke a queue; it stops until it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("its available ring promises more than the queue has, or is not in guest memory")]
    Available,
    #[error("its used ring has no place for what is given back")]
    Used,
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("{} bytes at {:#x} are not in guest memory", .0.len, .0.address.0)]
    Outside(Piece),
    #[error("{0}")]
    Host(&'static str),
}

/// The part of a device that the thread runs.
pub trait Backend: Send {
    /// What else to wait for; `None` if only the driver gives work, or while the host's would find no
    /// place.
    fn host(&self) -> Option<BorrowedFd<'_>>;
    /// Does what there is to do, or a good part of it: true if there may be more. Every chain that is
    /// taken is given back before it returns.
    fn serve(&mut self, queues: &mut Queues<'_>) -> Result<bool, Broken>;
}

/// The queues during one pass through the gate.
pub struct Queues<'a> {
    queues: &'a mut [Option<Queue>],
    used: Vec<bool>,
    pub memory: &'a GuestMemory,
    /// What the driver accepted.
    pub features: u64,
}

impl Queues<'_> {
    /// Takes the next chain that the driver has made available; its owner gives it back.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, Broken> {
        let Some(queue) = self.queues.get_mut(queue).and_then(Option::as_mut) else {
            return Ok(None);
        };
        let next = queue.iter(self.memory).map_err(|_| Broken::Available)?.next();
        Ok(next.map(Chain::read).transpose()?)
    }

    /// Puts back the chain that was taken last, as if it had never been taken.
    pub fn unpop(&mut self, queue: usize) {
        if let Some(queue) = self.queues.get_mut(queue).and_then(Option::as_mut) {
            queue.go_to_previous_position();
        }
    }

    /// Gives a chain back, with so many bytes written into it.
    pub fn push(&mut self, queue: usize, head: u16, written: u32) -> Result<(), Broken> {
        let Some(ring) = self.queues.get_mut(queue).and_then(Option::as_mut) else { return Ok(()) };
        self.used[queue] = true;
        ring.add_used(self.memory, head, written).map_err(|_| Broken::Used)
    }
}

/// The queues of a device as they are saved; a part of its own saved form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineV1 {
    pub features: u64,
    pub is_broken: bool,
    /// One entry for each queue, if a driver uses the device.
    pub queues: Option<Vec<Option<QueueV1>>>,
}

/// How a pass through the gate ended.
enum Pass {
    Done,
    More,
    Closed,
}

struct Active {
    features: u64,
    queues: Vec<Option<Queue>>,
    is_broken: bool,
}

/// What a device and its thread share.
pub struct Engine {
    name: &'static str,
    memory: GuestMemory,
    gate: Arc<Gate>,
    link: Arc<Link>,
    doorbells: Vec<EventFd>,
    active: Mutex<Option<Active>>,
}

impl Engine {
    /// Starts the thread, which waits for the driver. `name` is for logs, and the thread's.
    pub fn start(
        name: &'static str,
        queues: usize,
        memory: GuestMemory,
        gate: Arc<Gate>,
        link: Arc<Link>,
        backend: impl Backend + 'static,
    ) -> io::Result<Arc<Self>> {
        let doorbells =
            (0..queues).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>()?;
        let active = Mutex::new(None);
        let engine = Arc::new(Self { name, memory, gate, link, doorbells, active });
        let runner = Arc::clone(&engine);
        thread::Builder::new().name(name.to_owned()).spawn(move || runner.run(backend))?;
        Ok(engine)
    }

    pub fn doorbells(&self) -> &[EventFd] {
        &self.doorbells
    }

    pub fn activate(&self, features: u64, queues: Vec<Option<Queue>>) {
        *self.active() = Some(Active { features, queues, is_broken: false });
        // From now on the thread waits for the host as well.
        for doorbell in &self.doorbells {
            let _rung = doorbell.write(1);
        }
    }

    /// The lock is free only between passes, so nothing is outstanding after it.
    pub fn reset(&self) {
        *self.active() = None;
    }

    pub fn save(&self) -> EngineV1 {
        let active = self.active();
        EngineV1 {
            features: active.as_ref().map_or(0, |active| active.features),
            is_broken: active.as_ref().is_some_and(|active| active.is_broken),
            queues: active.as_ref().map(|active| {
                active.queues.iter().map(|queue| queue.as_ref().map(QueueV1::of)).collect()
            }),
        }
    }

    /// Takes the queues over; they must be of this device and in guest memory.
    pub fn restore(&self, state: &EngineV1) -> Result<(), String> {
        let queues = match &state.queues {
            None => None,
            Some(queues) if queues.len() != self.doorbells.len() => {
                return Err(format!("{} queues, not {}", queues.len(), self.doorbells.len()));
            }
            Some(queues) => {
                let queues = queues.iter().map(|queue| self.to_queue(queue.as_ref()));
                Some(queues.collect::<Result<Vec<_>, String>>()?)
            }
        };
        let (features, is_broken) = (state.features, state.is_broken);
        *self.active() = queues.map(|queues| Active { features, queues, is_broken });
        Ok(())
    }

    fn to_queue(&self, state: Option<&QueueV1>) -> Result<Option<Queue>, String> {
        let Some(state) = state else { return Ok(None) };
        let queue = state.to_queue().map_err(|error| error.to_string())?;
        match queue.is_valid(&self.memory) {
            true => Ok(Some(queue)),
            false => Err("a queue is not in guest memory".into()),
        }
    }

    fn run(&self, mut backend: impl Backend) {
        loop {
            if let Err(error) = self.wait(&backend) {
                tracing::error!(%error, device = self.name, "waiting failed; the device stops");
                return;
            }
            loop {
                match self.pass(&mut backend) {
                    Pass::Done => break,
                    Pass::More => {}
                    Pass::Closed => self.gate.wait_open(),
                }
            }
        }
    }

    fn wait(&self, backend: &impl Backend) -> io::Result<()> {
        let is_active = self.active().as_ref().is_some_and(|active| !active.is_broken);
        let host = backend.host().filter(|_| is_active);
        let mut fds: Vec<PollFd<'_>> = self
            .doorbells
            .iter()
            .map(borrow_event)
            .chain(host)
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for doorbell in &self.doorbells {
            // Nothing in it is as good.
            let _rung = doorbell.read();
        }
        Ok(())
    }

    /// Serves the queues once.
    fn pass(&self, backend: &mut impl Backend) -> Pass {
        // The pass is given back last: whoever waits for it finds the interrupts sent.
        let Some(_pass) = self.gate.try_enter() else { return Pass::Closed };
        let mut active = self.active();
        let Some(active) = active.as_mut().filter(|active| !active.is_broken) else {
            return Pass::Done;
        };
        let mut queues = Queues {
            used: vec![false; active.queues.len()],
            queues: &mut active.queues,
            memory: &self.memory,
            features: active.features,
        };
        let served = backend.serve(&mut queues);
        for (index, _) in queues.used.iter().enumerate().filter(|(_, used)| **used) {
            self.link.notify_queue(index);
        }
        match served {
            Ok(true) => Pass::More,
            Ok(false) => Pass::Done,
            Err(why) => {
                tracing::warn!(
                    device = self.name,
                    %why,
                    "a device stops until its driver resets it"
                );
                active.is_broken = true;
                self.link.set_needs_reset();
                Pass::Done
            }
        }
    }

    fn active(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
