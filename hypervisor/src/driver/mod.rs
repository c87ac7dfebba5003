//! The driver: the one owner of the VM's life. Everything else sends it commands.
//!
//! It runs on a thread of its own and does one thing at a time; what must not wait for it (status,
//! console, the lease, a fault of restored memory) has its own way. The drawing of the states is in
//! [`crate::lifecycle`].

mod command;
mod error;
mod lapse;
mod precopy;
mod run;
mod save;
mod stop;

pub use command::{Activated, Command, CreateConfig, Reply};
pub use error::{Kind, VmmError};

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};

use bellwether_memory::{Ahead, LazyEvent};

use crate::board::Board;
use crate::gate::Hold;
use crate::kvm::GuestEnd;
use crate::kvm::dirty::KvmDirtyLog;
use crate::kvm::platform::PlatformStateV1;
use crate::lease::LeaseGuard;
use crate::lifecycle::{self, Phase, Verb};
use crate::locks::{Claimant, Locks};
use crate::machine::Machine;
use crate::precopy::Job;

/// The state that only the driver has.
pub struct Driver {
    board: Arc<Board>,
    commands: Sender<Command>,
    /// Set by whoever asks for a stop, so that a wait for locks ends early.
    cancel: Arc<AtomicBool>,
    phase: Phase,
    machine: Option<Arc<Machine>>,
    lease: Option<Arc<LeaseGuard>>,
    claimant: Option<Claimant>,
    locks: Option<Locks>,
    /// The epoch whose locks were let go when the lease ran out, until they are taken back.
    unlocked: Option<u64>,
    /// The clock of a loaded machine, until it starts.
    loaded: Option<PlatformStateV1>,
    /// The file that memory comes from.
    source: Source,
    /// Memory that was loaded before its file was sealed.
    ahead: Option<Ahead>,
    /// A pre-copy under way.
    job: Option<Job>,
    /// The dirty log of a save that has just ended: switched off after its answer is out.
    spent_log: Option<KvmDirtyLog>,
    /// A load that failed half-way: this machine can only be stopped.
    is_spoiled: bool,
}

/// What becomes of the file that a machine was loaded from.
#[derive(Default)]
struct Source {
    path: Option<PathBuf>,
    is_complete: bool,
    consume: bool,
}

/// How the others reach the driver.
#[derive(Clone)]
pub struct Handle {
    pub commands: Sender<Command>,
    pub board: Arc<Board>,
    pub cancel: Arc<AtomicBool>,
}

impl Driver {
    /// A driver without a machine, and the way to it.
    pub fn new() -> (Self, Receiver<Command>, Handle) {
        let (commands, receiver) = channel();
        let handle =
            Handle { commands: commands.clone(), board: Arc::default(), cancel: Arc::default() };
        let driver = Self {
            board: Arc::clone(&handle.board),
            commands,
            cancel: Arc::clone(&handle.cancel),
            phase: Phase::Empty,
            machine: None,
            lease: None,
            claimant: None,
            locks: None,
            unlocked: None,
            loaded: None,
            source: Source::default(),
            ahead: None,
            job: None,
            spent_log: None,
            is_spoiled: false,
        };
        (driver, receiver, handle)
    }

    /// Serves commands until the VMM is to end; returns the reason.
    pub fn run(mut self, commands: &Receiver<Command>) -> String {
        for command in commands {
            if let Some(reason) = self.serve(command) {
                return reason;
            }
        }
        self.stop("stopped")
    }

    fn serve(&mut self, command: Command) -> Option<String> {
        match command {
            Command::Create(config, reply) => reply.send(self.create(*config)),
            Command::Lock { epoch, wait, reply } => reply.send(self.lock(epoch, wait)),
            Command::LoadAhead { path, epoch, generation, pieces, reply } => {
                reply.send(self.load_ahead(&path, epoch, generation, &pieces));
            }
            Command::Load { file, reply } => reply.send(self.load(&file)),
            Command::Start { epoch, wait, consume, reply } => {
                reply.send(self.start(epoch, wait, consume));
            }
            Command::Pause(reply) => reply.send(self.pause()),
            Command::Resume(reply) => reply.send(self.resume()),
            Command::Save { directory, generation, reply } => {
                reply.send(self.save(&directory, generation));
                self.spent_log = None;
            }
            Command::HandOver(reply) => reply.send(self.hand_over()),
            Command::PreCopy(options, reply) => reply.send(self.pre_copy(options)),
            Command::AbortPreCopy(reply) => {
                self.abort_pre_copy();
                reply.send(Ok(()));
            }
            Command::PreCopyEnded => self.pre_copy_ended(),
            Command::Shutdown(reply) => reply.send(self.shutdown()),
            Command::LeaseChanged => self.lease_changed(),
            Command::Memory(event) => self.memory_event(event),
            Command::Ended(end) => return Some(self.guest_ended(&end)),
            Command::Signal => return Some(self.stop("signal")),
            Command::Stop(reply) => {
                let reason = self.stop("stopped");
                reply.send(Ok(reason.clone()));
                return Some(reason);
            }
        }
        None
    }

    /// The phase after `verb`, if it is possible now.
    fn next(&self, verb: Verb) -> Result<Phase, VmmError> {
        if self.is_spoiled && verb != Verb::Stop {
            return Err(VmmError::Spoiled);
        }
        Ok(lifecycle::next(self.phase, verb)?)
    }

    fn enter(&mut self, phase: Phase) {
        let before = self.phase;
        self.phase = phase;
        self.board.update(|view| view.phase = phase);
        if before != phase {
            tracing::info!(from = %before, to = %phase, "state");
        }
    }

    fn machine(&self) -> Result<&Arc<Machine>, VmmError> {
        self.machine.as_ref().ok_or(VmmError::NoMachine)
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.next(Verb::Pause)?;
        let machine = self.machine()?;
        machine.gate.hold(Hold::Administrator);
        machine.wait_still()?;
        machine.serial.console().flush();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.next(Verb::Resume)?;
        self.retry_memory()?;
        let machine = self.machine()?;
        machine.wake_devices();
        machine.gate.release(Hold::Administrator);
        Ok(())
    }

    /// Memory that could not be read is asked for again; what is damaged stays so.
    fn retry_memory(&self) -> Result<(), VmmError> {
        let gate = &self.machine()?.gate;
        let memory = self.board.view().memory.clone();
        let Some(memory) = memory.filter(|_| gate.is_held(Hold::IoError)) else { return Ok(()) };
        let accepted = || {
            let _was_held = gate.release(Hold::IoError);
        };
        memory.retry(accepted).map_err(|error| VmmError::MemoryLost(error.to_string()))?;
        tracing::info!("restored memory is asked for again");
        Ok(())
    }

    fn shutdown(&mut self) -> Result<(), VmmError> {
        self.next(Verb::Shutdown)?;
        self.machine()?.acpi_pm.press_power_button();
        Ok(())
    }

    /// Memory of a restored VM is whole, or will never be.
    fn memory_event(&mut self, event: LazyEvent) {
        match event {
            LazyEvent::Complete => {
                self.source.is_complete = true;
                tracing::info!("restored memory is complete");
                self.consume_source();
            }
            LazyEvent::Failed { chunk, error } => {
                // The sink has closed the gate already.
                tracing::error!(
                    ?chunk,
                    error,
                    "restored memory cannot be read; the guest is paused"
                );
                self.board.update(|view| view.reason = format!("io-error: {error}"));
            }
        }
    }

    /// Removes the file that memory came from, once nobody needs it.
    fn consume_source(&mut self) {
        if !(self.source.is_complete && self.source.consume) {
            return;
        }
        let Some(path) = self.source.path.take() else { return };
        match std::fs::remove_file(&path) {
            Ok(()) => tracing::info!(path = %path.display(), "the state file is consumed"),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a consumed state file stays behind");
            }
        }
    }

    fn guest_ended(&mut self, end: &GuestEnd) -> String {
        let reason = match end {
            GuestEnd::Shutdown => "guest-shutdown".to_owned(),
            GuestEnd::Reset => "guest-reset".to_owned(),
            GuestEnd::TripleFault => "triple-fault".to_owned(),
            GuestEnd::Internal(what) => format!("internal-error: {what}"),
        };
        self.stop(&reason)
    }
}
