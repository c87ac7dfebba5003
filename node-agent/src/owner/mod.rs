//! The owner of one VM on this node: one task that holds its record and executes its orders.
//!
//! ```text
//!   Agent service --Message--> inbox --+
//!                                      v
//!   pidfd of the VMM ---exit-----> [ owner ] --calls--> VMM
//!   status interval ----tick-----------^  |
//!                                         +--observation--> board --> controllers
//! ```
//!
//! One order is executed at a time. A release that waits behind another order calls off that
//! order's wait for the VMM ([`Recall`]), so that a VMM that hangs can always be killed. What an
//! order changes is written to the runtime directory before the VMM hears of it (`may_have_run`)
//! and before the controller does (floors).

mod body;
mod execute;
mod files;
mod lifecycle;
mod takeover;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bellwether_agent_core::{
    Action, Answer, Durable, Machine, Observation, Outcome, Phase, Refusal, RefusalKind, Saved,
    Stamped, VmmSight, VmmState, observe,
};
use bellwether_proto::v1;
use bellwether_types::{StateFileRef, VmId, VmState};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tonic::{Code, Status};

pub use body::Body;
pub use execute::Failure;
use execute::ensure_storage;
pub use lifecycle::reap;

use crate::failpoints;
use crate::launch;
use crate::node::Node;
use crate::runtime_dir::RuntimeError;
use crate::vmm::{LastRelease, Recall, Vmm};

/// After so many unanswered status calls in a row a VMM is reported as unknown.
const SILENCE_MAX: u32 = 4;

/// What an order needs besides its stamp.
#[derive(Debug)]
pub enum Details {
    Prepare { spec: Box<v1::VmSpec>, storage: PathBuf },
    TakeOver { wait: Duration },
    LoadState { file: StateFileRef },
    Activate { lock_wait: Duration },
    PreCopy { storage: PathBuf },
    Seal { storage: PathBuf },
    ClaimBack { file: Option<StateFileRef> },
    RemoveState { storage: PathBuf, purge: bool },
    Plain,
}

/// An order for the owner.
#[derive(Debug)]
pub struct Command {
    pub stamped: Stamped,
    pub details: Details,
}

/// What the owner answers.
#[derive(Debug)]
pub enum Reply {
    Answer(Answer),
    /// A takeover that met a holder; nothing was taken.
    NotHeld {
        holder: String,
    },
    Removed {
        files: u64,
    },
    /// The order is admitted; what it asks for is done beside the owner.
    Connection(Vmm),
}

/// What reaches an owner.
#[derive(Debug)]
pub struct Message {
    pub command: Command,
    pub reply: oneshot::Sender<Result<Reply, Status>>,
}

/// The owner of one VM.
pub struct Owner {
    node: Arc<Node>,
    vm: VmId,
    machine: Machine,
    /// What of the machine is on the disk.
    saved: Saved,
    body: Option<Body>,
    sight: Option<VmmSight>,
    /// Status calls in a row that had no answer.
    silence: u32,
    releases: watch::Receiver<LastRelease>,
}

enum Event {
    Message(Option<Message>),
    Exited,
    Tick,
}

impl Owner {
    pub fn new(
        node: Arc<Node>,
        vm: VmId,
        durable: Durable,
        releases: watch::Receiver<LastRelease>,
    ) -> Self {
        let machine = Machine::new(vm, durable.clone());
        let saved = Saved::new(durable);
        Self { node, vm, machine, saved, body: None, sight: None, silence: 0, releases }
    }

    /// Serves until the registry is gone.
    pub async fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        let mut tick = interval(self.node.status_interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.publish();
        loop {
            match self.next(&mut inbox, &mut tick).await {
                Event::Message(None) => return,
                Event::Message(Some(message)) => self.serve(message).await,
                Event::Exited => self.exited(),
                Event::Tick => self.look().await,
            }
            self.publish();
        }
    }

    async fn next(&self, inbox: &mut mpsc::Receiver<Message>, tick: &mut Interval) -> Event {
        tokio::select! {
            message = inbox.recv() => Event::Message(message),
            () = body::exit_of(self.body.as_ref()) => Event::Exited,
            _ = tick.tick() => Event::Tick,
        }
    }

    async fn serve(&mut self, message: Message) {
        let Message { command, reply } = message;
        let word = command.stamped.order.word();
        let (epoch, task) = (command.stamped.epoch, command.stamped.task);
        failpoints::before(&command.stamped.order).await;
        let result = self.obey(&command).await;
        match &result {
            Ok(_) => tracing::info!(vm_id = %self.vm, %epoch, task, order = word, "obeyed"),
            Err(status) => {
                let reason = status.message();
                tracing::warn!(vm_id = %self.vm, %epoch, task, order = word, reason, "not obeyed");
            }
        }
        self.publish();
        failpoints::after(&command.stamped.order).await;
        // The controller that asked may be gone; it will ask again.
        let _ = reply.send(result);
    }

    async fn obey(&mut self, command: &Command) -> Result<Reply, Status> {
        if self.machine.current().is_some_and(|current| current.uncertain) {
            self.look().await;
        }
        let standing = self.node.desk.standing(self.node.terms.highest());
        let admitted = self.machine.admit(&command.stamped, standing);
        let action = admitted.map_err(refuse)?;
        if self.saved.is_due_before(self.machine.durable(), &action)
            && let Err(status) = self.save_floor()
        {
            // Nothing was done yet, and without the floor nothing may be.
            self.call_off(command).await;
            return Err(status);
        }
        self.publish();
        let result = match action {
            Action::Answer(answer) => return Ok(Reply::Answer(answer)),
            action => self.execute(action, command).await,
        };
        self.settle(command, result).await
    }

    /// An admitted order cannot be begun. What a prepare was to replace goes nevertheless: the
    /// machine has given it up, and it never ran.
    async fn call_off(&mut self, command: &Command) {
        let prepare = matches!(command.details, Details::Prepare { .. });
        let outcome = match prepare {
            true => self.demolish().await.map_or_else(|it| it.outcome(), |()| Outcome::Failed),
            false => Outcome::Unknown,
        };
        self.machine.complete(&command.stamped, &outcome);
    }

    /// Takes the result of an execution into the machine, and makes it durable before it is told.
    async fn settle(
        &mut self,
        command: &Command,
        result: Result<Reply, Failure>,
    ) -> Result<Reply, Status> {
        match result {
            Ok(reply) => {
                if let Reply::Answer(answer) = &reply {
                    self.machine.complete(&command.stamped, &Outcome::Done(answer.clone()));
                }
                self.note_record();
                self.save_floor()?;
                Ok(reply)
            }
            Err(failure) => {
                self.machine.complete(&command.stamped, &failure.outcome());
                if let Some(given_up) = self.maybe_give_up(command, &failure).await {
                    return Err(given_up);
                }
                // The VMM's own word is better than our guess about what it did.
                self.look().await;
                self.note_record();
                Err(self.explain(failure))
            }
        }
    }

    /// Adds to an error of the VMM what became of the guest.
    fn explain(&self, failure: Failure) -> Status {
        let Failure { status, sealing, .. } = failure;
        let active = self.machine.current().is_some_and(|current| current.phase == Phase::Active);
        match sealing && active && self.silence == 0 {
            true => Status::new(
                status.code(),
                format!("{}; the guest goes on here, nothing is lost", status.message()),
            ),
            false => status,
        }
    }

    fn save_floor(&mut self) -> Result<(), Status> {
        let durable = self.machine.durable();
        if !self.saved.is_due(durable) {
            return Ok(());
        }
        self.node.runtime.save_floor(self.vm, durable).map_err(|error| {
            tracing::error!(vm_id = %self.vm, %error, "cannot make the released epoch durable");
            Status::unavailable(format!("{error}; the release is not complete, ask again"))
        })?;
        self.saved.note(durable);
        Ok(())
    }

    /// The process has ended by itself.
    fn exited(&mut self) {
        let Some(body) = &mut self.body else { return };
        let reason = body.exit_reason();
        body.forget_process();
        tracing::warn!(vm_id = %self.vm, home = %body.home_epoch(), reason, "the VMM has ended");
        // What was released and would not end in time has ended now. While the floor cannot be made
        // durable it is only an incarnation that has ended; the release is to be ordered again.
        match self.machine.is_releasing() && self.save_floor().is_ok() {
            true => {
                self.clean_up();
                self.complete_release(&reason);
            }
            false => self.machine.ended(&reason),
        }
    }

    /// Asks the VMM for its status, connecting first where an earlier try failed.
    async fn look(&mut self) {
        let Some(body) = &mut self.body else { return };
        let Some(vmm) = body.connected().await else {
            self.silence = self.silence.saturating_add(1);
            return;
        };
        match vmm.status().await {
            Ok((_, sight)) => {
                self.silence = 0;
                if let Err(error) = launch::bound_log(body.home()) {
                    tracing::debug!(vm_id = %self.vm, %error, "cannot bound the VMM's log");
                }
                self.machine.see(&sight);
                self.sight = Some(sight);
                self.note_record();
            }
            Err(error) => {
                self.silence = self.silence.saturating_add(1);
                tracing::debug!(vm_id = %self.vm, %error, "no status");
            }
        }
    }

    /// Posts what is seen now.
    fn publish(&self) {
        self.node.board.post(self.vm, self.observation());
    }

    fn observation(&self) -> Option<Observation> {
        let current = self.machine.current()?;
        let sight = self.sight.as_ref().filter(|_| current.is_live());
        let mut observation = observe(current, sight);
        let silent = self.silence >= SILENCE_MAX && current.phase == Phase::Active;
        if silent {
            observation.state = VmState::Unknown;
            observation.reason = "the VMM does not answer".to_owned();
        }
        Some(observation)
    }

    /// Writes the incarnation's record if it has changed.
    fn save_record(&mut self) -> Result<(), RuntimeError> {
        let (Some(body), Some(current)) = (&mut self.body, self.machine.current()) else {
            return Ok(());
        };
        body.save_record(current).inspect_err(|error| {
            tracing::error!(vm_id = %self.vm, %error, "cannot record the incarnation");
        })
    }

    /// The same for what the VMM tells of itself, so that it can be written later or never.
    fn note_record(&mut self) {
        // It is tried again after the next status.
        let _ = self.save_record();
    }

    fn recall(&self, stamped: &Stamped) -> Option<Recall> {
        let Stamped { term, epoch, .. } = *stamped;
        Some(Recall { releases: self.releases.clone(), term, epoch })
    }

    /// The VMM is paused or runs, as far as it is known.
    fn sees(&self, state: VmmState) -> bool {
        self.sight.as_ref().is_some_and(|sight| sight.state == state)
    }
}

/// A refusal under the code that tells the controller what to make of it.
pub fn refuse(refusal: Refusal) -> Status {
    let code = match refusal.kind() {
        RefusalKind::NeverRan => Code::Aborted,
        RefusalKind::Passing => Code::Unavailable,
        RefusalKind::Lasting => Code::FailedPrecondition,
    };
    Status::new(code, refusal.to_string())
}
