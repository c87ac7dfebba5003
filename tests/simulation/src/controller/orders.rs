//! Orders to agents, and what their answers mean for a task.

use std::path::Path;

use bellwether_agent_core::{Answer, Order as What, Stamped};
use bellwether_core::answer::{self, Failure, Kind};
use bellwether_core::observe::Seen;
use bellwether_core::reconcile::strays_of;
use bellwether_core::state::Runner;
use bellwether_core::task::{Measures, Retry};
use bellwether_core::{Attempt, StepEvent, Task, TaskKind, Vm, state_file};
use bellwether_types::{Epoch, FenceProof, NodeId, StateFileRef};

use super::Controller;
use super::lead::Leadership;
use crate::kernel::{Nanos, SECOND};
use crate::net::Address;
use crate::wire::{Code, Details, Order, OrderReply, Request, Response, Status};

const SHORT: Nanos = 15 * SECOND;
const SEAL: Nanos = 600 * SECOND;

pub type Result<T> = std::result::Result<T, Failure>;

/// Orders on behalf of one task.
pub struct Orders<'a> {
    controller: &'a Controller,
    leadership: Leadership,
    task: &'a Task,
}

impl<'a> Orders<'a> {
    pub fn new(controller: &'a Controller, leadership: Leadership, task: &'a Task) -> Self {
        Self { controller, leadership, task }
    }

    fn vm(&self) -> Result<Vm> {
        let gone = || Failure::Unknown("the VM is gone from the state".into());
        self.controller.state().vms.get(&self.task.vm).cloned().ok_or_else(gone)
    }

    async fn ask(
        &self,
        node: NodeId,
        epoch: Epoch,
        what: What,
        details: Details,
        at_most: Nanos,
    ) -> std::result::Result<OrderReply, Status> {
        let (term, task) = (self.leadership.term, self.task.id.0);
        let boot = self.controller.boot_of(node);
        let stamped = Stamped { term, task, epoch, boot, order: what };
        let order = Order { vm: self.task.vm, stamped, details };
        send(self.controller, node, order, at_most).await
    }

    pub async fn prepare(&self, attempt: Attempt) -> Result<StepEvent> {
        self.clear_the_way(attempt).await?;
        let vm = self.vm()?;
        let what = What::Prepare { arbiter: vm.arbiter() };
        let asked = self.ask(attempt.node, attempt.epoch, what, Details::Prepare, SHORT).await;
        asked.map_err(|status| self.failure(status))?;
        Ok(StepEvent::Prepared)
    }

    /// An agent holds one incarnation of a VM at a time: what an earlier fault left there goes first.
    async fn clear_the_way(&self, attempt: Attempt) -> Result<()> {
        let state = self.controller.state();
        let left =
            strays_of(&state, &self.controller.observed.borrow(), attempt.node, self.task.vm);
        for stray in left {
            self.release(Attempt { node: stray.node, epoch: stray.epoch }).await?;
        }
        Ok(())
    }

    pub async fn take_over(&self, attempt: Attempt) -> Result<StepEvent> {
        let details = Details::TakeOver { wait_ms: self.controller.world.timing.lock_wait_ms };
        let asked = self.ask(attempt.node, attempt.epoch, What::TakeOver, details, SHORT).await;
        Ok(match asked.map_err(|status| self.failure(status))? {
            OrderReply::NotHeld { holder } => StepEvent::Busy { holder },
            OrderReply::Answer(Answer::TakenOver { handover: Some(handover) }) => {
                let file = state_file::handed_over(Path::new(""), self.task.vm, &handover);
                StepEvent::HeldWithState { file }
            }
            _ => StepEvent::Held,
        })
    }

    /// The rounds, of which the destination hears; an agent that has gone refuses.
    pub async fn pre_copy(&self, source: &Runner, load_at: Option<Attempt>) -> Result<StepEvent> {
        if let Some(Attempt { node, epoch }) = load_at {
            let asked = self.ask(node, epoch, What::LoadAhead, Details::Plain, SHORT).await;
            asked.map_err(|status| self.failure(status))?;
        }
        let (node, epoch) = (source.node, source.epoch);
        let asked = self.ask(node, epoch, What::PreCopy, Details::Plain, SEAL).await;
        asked.map_err(|status| self.failure(status))?;
        Ok(StepEvent::PreCopied { measures: Measures::new() })
    }

    pub async fn seal(&self, source: &Runner) -> Result<StateFileRef> {
        let asked = self.ask(source.node, source.epoch, What::Seal, Details::Seal, SEAL).await;
        match asked.map_err(|status| self.failure(status))? {
            OrderReply::Answer(Answer::Sealed(sealed)) => Ok(sealed.file),
            _ => Err(Failure::Unknown("the answer has no file".into())),
        }
    }

    pub async fn load(&self, attempt: Attempt, file: &StateFileRef) -> Result<StepEvent> {
        let what = What::LoadState { hash: file.hash };
        let details = Details::LoadState { file: file.clone() };
        let asked = self.ask(attempt.node, attempt.epoch, what, details, SHORT).await;
        asked.map_err(|status| self.failure(status))?;
        Ok(StepEvent::Loaded { measures: Measures::new() })
    }

    /// The source lets go and the attempt comes up, at once: the attempt waits for the locks.
    pub async fn activate(
        &self,
        attempt: Attempt,
        release: Option<Runner>,
        file: Option<StateFileRef>,
    ) -> Result<StepEvent> {
        let release = async {
            if let Some(source) = release {
                let source = Attempt { node: source.node, epoch: source.epoch };
                let _left_as_a_stray = self.release(source).await;
            }
        };
        let details = Details::Activate { wait_ms: self.controller.world.timing.lock_wait_ms };
        let what = What::Activate { hash: file.map(|file| file.hash) };
        let activate = self.ask(attempt.node, attempt.epoch, what, details, SHORT);
        let (reply, ()) = futures::join!(Box::pin(activate), Box::pin(release));
        match reply {
            Ok(_) => Ok(StepEvent::Activated { measures: Measures::new() }),
            Err(status) => self.uncertain(status),
        }
    }

    pub async fn claim_back(
        &self,
        source: Attempt,
        sealed: Epoch,
        file: &StateFileRef,
    ) -> Result<StepEvent> {
        let what = What::ClaimBack { sealed_epoch: sealed };
        let details = Details::ClaimBack { file: file.clone() };
        match self.ask(source.node, source.epoch, what, details, SHORT).await {
            Ok(_) => Ok(StepEvent::ClaimedBack { measures: Measures::new() }),
            Err(status) => self.uncertain(status),
        }
    }

    /// Whether the attempt's node answers or not, the task goes on: what is left there is a stray.
    pub async fn abandon(&self, attempt: Attempt) -> Result<StepEvent> {
        if let (TaskKind::Migrate, Some(source)) = (self.task.kind, self.vm()?.place.runner()) {
            let (node, epoch) = (source.node, source.epoch);
            let asked = self.ask(node, epoch, What::EndPreCopy, Details::Plain, SHORT).await;
            let _gives_up_by_itself = asked;
        }
        Ok(self.release(attempt).await.unwrap_or_else(|_| {
            let error = "the attempt was left behind as a stray".into();
            StepEvent::Failed { error, retry: Retry::OtherNode }
        }))
    }

    pub async fn release(&self, attempt: Attempt) -> Result<StepEvent> {
        let (node, epoch) = (attempt.node, attempt.epoch);
        let asked = self.ask(node, epoch, What::Release, Details::Plain, SHORT).await;
        match asked.map_err(|status| self.failure(status))? {
            OrderReply::Released { reason, boot_id } => {
                Ok(StepEvent::Released { proof: FenceProof::Released { node, boot_id }, reason })
            }
            _ => Err(Failure::Unknown("the answer names no boot".into())),
        }
    }

    pub async fn ask_guest(&self, runner: &Runner) -> Result<StepEvent> {
        let Runner { node, epoch, boot_id } = *runner;
        let seen = self.controller.observed.borrow().vm(self.task.vm, node, boot_id, epoch);
        if seen != Seen::Ended {
            let asked = self.ask(node, epoch, What::Shutdown, Details::Plain, SHORT).await;
            asked.map_err(|status| self.failure(status))?;
        }
        let until = self.controller.now_ms() + self.controller.world.timing.shutdown_ms;
        Ok(StepEvent::Asked { until })
    }

    /// Removes state files that an earlier fault left behind.
    pub async fn sweep(&self, attempt: Attempt, below: Epoch) {
        let Some(last) = below.0.checked_sub(1).filter(|last| *last > 0) else { return };
        let details = Details::RemoveState { purge: false };
        let asked = self.ask(attempt.node, Epoch(last), What::RemoveState, details, SHORT);
        let _next_start_removes_them = asked.await;
    }

    pub async fn purge(&self, node: NodeId) -> Result<StepEvent> {
        let epoch = self.vm()?.epoch;
        let details = Details::RemoveState { purge: true };
        let asked = self.ask(node, epoch, What::RemoveState, details, SHORT).await;
        asked.map_err(|status| self.failure(status))?;
        Ok(StepEvent::Purged)
    }

    fn read(&self, status: &Status) -> (Kind, String) {
        let kind = kind(status.code);
        let name = match kind {
            Kind::Silent => "silent",
            Kind::NeverRan => "never-ran",
            Kind::Unfit => "unfit",
            Kind::Refused => "refused",
        };
        self.controller.world.hit("answer", name);
        (kind, status.message.clone())
    }

    fn failure(&self, status: Status) -> Failure {
        let (kind, error) = self.read(&status);
        answer::failure(kind, error)
    }

    fn uncertain(&self, status: Status) -> Result<StepEvent> {
        let (kind, error) = self.read(&status);
        answer::uncertain(kind, error)
    }
}

/// Gives an order and waits for the answer.
pub async fn send(
    controller: &Controller,
    node: NodeId,
    order: Order,
    at_most: Nanos,
) -> std::result::Result<OrderReply, Status> {
    let request = Request::Order(Box::new(order));
    let net = controller.world.net.clone();
    match net.call(controller.host(), Address::Agent(node), request, at_most).await {
        Ok(Response::Order(reply)) => Ok(reply),
        Ok(_) => Err(Status::new(Code::Internal, "another question was answered")),
        Err(error) => Err(error.status()),
    }
}

/// What the code of a status says (`agent.proto`), as the product's shell reads it.
fn kind(code: Code) -> Kind {
    match code {
        Code::Unavailable | Code::DeadlineExceeded | Code::Unknown => Kind::Silent,
        Code::Aborted => Kind::NeverRan,
        Code::DataLoss => Kind::Unfit,
        _ => Kind::Refused,
    }
}
