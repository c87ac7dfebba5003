//! The owner of one VM on one node: one task that holds its record and executes its orders.

use std::rc::Rc;

use bellwether_agent_core::{
    Action, Answer, Durable, Machine, Observation, Order as What, Outcome, Phase, Saved, Stamped,
    Standing, VmmSight, observe,
};
use bellwether_types::{Arbiter, Epoch, VmId, VmState};
use futures::future::Either;

use super::{Handle, Message, STATUS_INTERVAL, This, reply};
use crate::kernel::{Nanos, ProcId, SECOND};
use crate::net::Address;
use crate::sync::{first, within};
use crate::wire::{
    CallError, Code, Details, Order, OrderReply, Request, Response, Status, VmmCall, VmmReply,
};
use crate::world::Record;

/// After so many unanswered status calls in a row a VMM is reported as unknown.
const SILENCE_MAX: u32 = 4;
const STATUS_MAX: Nanos = 2 * SECOND;

/// What an incarnation consists of on this host.
#[derive(Clone, Debug)]
pub struct Body {
    pub record: Record,
    pub process: Option<ProcId>,
    /// The state file that its guest comes from, while it may still be read.
    pub loaded_file: Option<String>,
}

/// An execution that did not succeed.
#[derive(Clone, Debug)]
pub struct Failure {
    pub status: Status,
    /// It may have happened, or may still happen.
    pub unknown: bool,
}

impl Failure {
    pub fn failed(code: Code, text: impl Into<String>) -> Self {
        Self { status: Status::new(code, text), unknown: false }
    }

    pub fn unknown(code: Code, text: impl Into<String>) -> Self {
        Self { status: Status::new(code, text), unknown: true }
    }

    pub fn outcome(&self) -> Outcome {
        if self.unknown { Outcome::Unknown } else { Outcome::Failed }
    }
}

/// Why a call to a VMM has no answer.
pub enum VmmError {
    Refused(Status),
    /// Nobody knows what it did.
    Open,
    /// A release of this epoch came in between.
    Released,
}

impl From<VmmError> for Failure {
    fn from(error: VmmError) -> Self {
        match error {
            VmmError::Refused(status) => Self { status: definite(status), unknown: false },
            VmmError::Open | VmmError::Released => {
                Self::unknown(Code::DeadlineExceeded, "the VMM gave no answer; outcome unknown")
            }
        }
    }
}

/// What is known not to have happened must not arrive under a code that leaves it open.
pub fn definite(status: Status) -> Status {
    match status.code {
        Code::Unavailable | Code::DeadlineExceeded | Code::Unknown => {
            Status::new(Code::Internal, status.message)
        }
        _ => status,
    }
}

pub struct Owner {
    pub agent: This,
    pub vm: VmId,
    pub machine: Machine,
    saved: Saved,
    pub body: Option<Body>,
    pub sight: Option<VmmSight>,
    pub silence: u32,
    handle: Handle,
}

impl Owner {
    pub fn new(agent: &This, vm: VmId, durable: Durable, handle: Handle) -> Self {
        Self {
            agent: Rc::clone(agent),
            vm,
            machine: Machine::new(vm, durable.clone()),
            saved: Saved::new(durable),
            body: None,
            sight: None,
            silence: 0,
            handle,
        }
    }

    /// Serves as long as the agent.
    pub async fn run(mut self) {
        self.publish();
        loop {
            let tick = self.agent.world.sleep(self.agent.host(), STATUS_INTERVAL);
            let inbox = self.handle.inbox.clone();
            let exit = self.exit();
            match first(first(inbox.pop(), exit), tick).await {
                Either::Left(Either::Left(message)) => self.serve(message).await,
                Either::Left(Either::Right(())) => self.exited().await,
                Either::Right(()) => self.look().await,
            }
            self.publish();
        }
    }

    fn exit(&self) -> impl Future<Output = ()> + use<> {
        let process = self.body.as_ref().and_then(|body| body.process);
        let world = Rc::clone(&self.agent.world);
        async move {
            match process {
                Some(process) => world.exit_of(process).await,
                None => std::future::pending().await,
            }
        }
    }

    async fn serve(&mut self, message: Message) {
        let Message { order, responder } = message;
        let result = self.obey(&order).await;
        self.publish();
        self.promise(&order, &result);
        responder.answer(reply(result));
    }

    /// What the oracle may hold this agent to, once the answer is out.
    fn promise(&self, order: &Order, result: &Result<OrderReply, Status>) {
        let gone = match result {
            Ok(OrderReply::Released { .. }) => true,
            Err(status) => status.code == Code::Aborted,
            _ => false,
        };
        if gone {
            let (node, boot) = (self.agent.node, self.agent.boot);
            let keeps = self.next_agent_refuses(order.stamped.epoch);
            let mut oracle = self.agent.world.oracle.borrow_mut();
            oracle.promised(node, boot, self.vm, order.stamped.epoch);
            if !keeps {
                oracle.fail(format!(
                    "4: node {node} tells that epoch {} is released, and its next agent would not know",
                    order.stamped.epoch
                ));
            }
        }
    }

    /// Whether an agent that began now, from what is on the disk, would not prepare this epoch again.
    fn next_agent_refuses(&self, epoch: Epoch) -> bool {
        let durable =
            self.agent.world.runtime(self.agent.node, |it| it.floors.get(&self.vm).cloned());
        let what = What::Prepare { arbiter: Arbiter::Storage };
        let boot = self.agent.boot;
        let again = Stamped { term: u64::MAX / 2, task: 0, epoch, boot, order: what };
        let standing = Standing { lease_live: true, contact_recent: true, term: 0 };
        Machine::new(self.vm, durable.unwrap_or_default()).admit(&again, standing).is_err()
    }

    async fn obey(&mut self, order: &Order) -> Result<OrderReply, Status> {
        if self.machine.current().is_some_and(|current| current.uncertain) {
            self.look().await;
        }
        let admitted = self.machine.admit(&order.stamped, self.agent.standing());
        let action = admitted.map_err(|refusal| self.agent.refuse(&refusal))?;
        let (node, boot) = (self.agent.node, self.agent.boot);
        let word = order.stamped.order.word();
        let terms = (order.stamped.term, self.agent.world.runtime(node, |runtime| runtime.term));
        self.agent.world.oracle.borrow_mut().obeyed(node, boot, terms, word);
        if self.saved.is_due_before(self.machine.durable(), &action)
            && let Err(status) = self.save_floor().await
        {
            self.call_off(order).await;
            return Err(status);
        }
        self.publish();
        let result = match action {
            Action::Answer(answer) => return Ok(self.answer(answer)),
            action => self.execute(action, order).await,
        };
        self.settle(order, result).await
    }

    pub fn answer(&self, answer: Answer) -> OrderReply {
        match answer {
            Answer::Released { reason } => {
                OrderReply::Released { reason, boot_id: self.agent.boot }
            }
            answer => OrderReply::Answer(answer),
        }
    }

    /// An admitted order cannot be begun. What a prepare was to replace goes nevertheless.
    async fn call_off(&mut self, order: &Order) {
        let outcome = match order.details {
            Details::Prepare => {
                self.demolish().await.map_or_else(|it| it.outcome(), |()| Outcome::Failed)
            }
            _ => Outcome::Unknown,
        };
        self.machine.complete(&order.stamped, &outcome);
    }

    /// Takes the result of an execution into the machine, and makes it durable before it is told.
    async fn settle(
        &mut self,
        order: &Order,
        result: Result<OrderReply, Failure>,
    ) -> Result<OrderReply, Status> {
        match result {
            Ok(done) => {
                let answer = match &done {
                    OrderReply::Answer(answer) => Some(answer.clone()),
                    OrderReply::Released { reason, .. } => {
                        Some(Answer::Released { reason: reason.clone() })
                    }
                    OrderReply::NotHeld { .. } | OrderReply::Removed => None,
                };
                if let Some(answer) = answer {
                    self.machine.complete(&order.stamped, &Outcome::Done(answer));
                }
                self.save_record();
                self.save_floor().await?;
                Ok(done)
            }
            Err(failure) => {
                self.machine.complete(&order.stamped, &failure.outcome());
                if let Some(given_up) = self.maybe_give_up(order, &failure).await {
                    return Err(given_up);
                }
                // The VMM's own word is better than our guess about what it did.
                self.look().await;
                self.save_record();
                Err(failure.status)
            }
        }
    }

    pub async fn save_floor(&mut self) -> Result<(), Status> {
        let durable = self.machine.durable().clone();
        if !self.saved.is_due(&durable) {
            return Ok(());
        }
        self.agent.sync().await.map_err(|()| {
            Status::new(Code::Unavailable, "the release cannot be made durable, ask again")
        })?;
        self.agent.world.runtime(self.agent.node, |runtime| {
            runtime.floors.insert(self.vm, durable.clone());
        });
        self.saved.note(&durable);
        Ok(())
    }

    /// The process has ended by itself.
    async fn exited(&mut self) {
        let reason = self.exit_reason();
        if let Some(body) = &mut self.body {
            body.process = None;
        }
        match self.machine.is_releasing() && self.save_floor().await.is_ok() {
            true => {
                self.clean_up();
                self.complete_release(&reason).await;
            }
            false => self.machine.ended(&reason),
        }
    }

    pub fn exit_reason(&self) -> String {
        let home = self.body.as_ref().map_or(Epoch(0), |body| body.record.home);
        let known = self
            .agent
            .world
            .runtime(self.agent.node, |runtime| runtime.exits.get(&(self.vm, home)).cloned());
        known.unwrap_or_else(|| "killed".to_owned())
    }

    /// Asks the VMM for its status.
    pub async fn look(&mut self) {
        if self.body.as_ref().is_none_or(|body| body.process.is_none()) {
            return;
        }
        match self.call(VmmCall::Status, STATUS_MAX, None).await {
            Ok(VmmReply::Status(sight)) => {
                self.silence = 0;
                self.machine.see(&sight);
                self.sight = Some(sight);
                self.save_record();
            }
            _ => self.silence = self.silence.saturating_add(1),
        }
    }

    /// Asks the VMM, but not for ever, and not against a release of the epoch that is given.
    pub async fn call(
        &self,
        call: VmmCall,
        at_most: Nanos,
        recall: Option<(u64, Epoch)>,
    ) -> Result<VmmReply, VmmError> {
        let process = self.body.as_ref().and_then(|body| body.process);
        let Some(process) = process else { return Err(VmmError::Open) };
        let (world, host) = (&self.agent.world, self.agent.host());
        let net = world.net.clone();
        let asking =
            async move { net.call(host, Address::Vmm(process), Request::Vmm(call), at_most).await };
        let released = Rc::clone(&self.handle.released);
        let recalled = self.handle.releases.until(move || {
            let (term, epoch) = recall?;
            let (by, up_to) = *released.borrow();
            (by >= term && up_to >= epoch).then_some(())
        });
        match first(asking, recalled).await {
            Either::Left(Ok(Response::Vmm(reply))) => Ok(reply),
            Either::Left(Err(CallError::Status(status))) => Err(VmmError::Refused(status)),
            Either::Left(_) => Err(VmmError::Open),
            Either::Right(()) => Err(VmmError::Released),
        }
    }

    /// Posts what is seen now.
    pub fn publish(&self) {
        self.agent.post(self.vm, self.observation());
    }

    fn observation(&self) -> Option<Observation> {
        let current = self.machine.current()?;
        let sight = self.sight.as_ref().filter(|_| current.is_live());
        let mut observation = observe(current, sight);
        if self.silence >= SILENCE_MAX && current.phase == Phase::Active {
            observation.state = VmState::Unknown;
            observation.reason = "the VMM does not answer".to_owned();
        }
        Some(observation)
    }

    /// Writes the incarnation's record if it has changed; false if that failed.
    pub fn save_record(&mut self) -> bool {
        let (Some(body), Some(current)) = (&mut self.body, self.machine.current()) else {
            return true;
        };
        let record = Record {
            epoch: current.epoch,
            loaded: current.loaded,
            loading: current.loading,
            may_have_run: current.may_have_run,
            claiming: current.claiming,
            claimed_from: current.claimed_from,
            sealed: current.sealed.as_ref().map(|sealed| sealed.file.clone()),
            process: body.process.or(body.record.process),
            ..body.record.clone()
        };
        if record == body.record {
            return true;
        }
        let (vm, home) = (self.vm, record.home);
        let written = self.agent.world.runtime(self.agent.node, |runtime| {
            if !runtime.full {
                runtime.incarnations.insert((vm, home), record.clone());
            }
            !runtime.full
        });
        if written {
            body.record = record;
        }
        written
    }

    pub async fn wait_exit(&self, process: ProcId, at_most: Nanos) -> bool {
        let exit = self.agent.world.exit_of(process);
        within(&self.agent.world.kernel, self.agent.host(), at_most, exit).await.is_some()
    }

    pub fn recall(&self, order: &Order) -> Option<(u64, Epoch)> {
        Some((order.stamped.term, order.stamped.epoch))
    }

    pub fn starts(order: &Order) -> bool {
        matches!(order.stamped.order, What::Activate { .. } | What::ClaimBack { .. })
    }
}
