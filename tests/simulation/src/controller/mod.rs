//! A controller: the core on top of the modelled log, with the shell's rules around it.
//!
//! The shell of the product is async code on tokio and gRPC; here are the same steps on virtual time.
//! What they decide comes from the same functions: `State::apply`, `reconcile`, `saga`, `contact`,
//! `answer`, `leading`.

mod executor;
mod lead;
mod orders;
mod strays;
mod switches;

use std::cell::RefCell;
use std::rc::Rc;

use bellwether_core::command::Change;
use bellwether_core::contact::{Contact, Next};
use bellwether_core::observe::NodeReport;
use bellwether_core::task::TaskRequest;
use bellwether_core::{Command, Observed, Outcome, Place, State};
use bellwether_types::{BootId, NodeId, VmId};

use crate::kernel::{HostId, MS, Nanos, ProcId, SECOND};
use crate::net::{Address, Responder};
use crate::raft::{Message, Parts, ProposeError, Raft};
use crate::sync::{Queue, Signal, within};
use crate::wire::{Api, ApiCall, ApiReply, Code, Details, Order, Request, Response, Status};
use crate::world::Shared;

/// How long a request waits for an election to end.
const ELECTION_PATIENCE: Nanos = 5 * SECOND;
/// How long a request that was passed on may take.
const PASSED_ON_MAX: Nanos = 30 * SECOND;

/// One controller's process.
pub struct Controller {
    world: Shared,
    process: ProcId,
    id: u64,
    raft: Raft,
    observed: RefCell<Observed>,
    reports: Signal,
    base_ms: u64,
    started: Nanos,
}

type This = Rc<Controller>;

/// Starts a controller from what its disk has.
pub fn start(world: &Shared, id: u64) {
    let kernel = &world.kernel;
    let process = kernel.start_process(HostId(id), format!("c{id}"));
    world.controllers.borrow_mut().insert(id, process);
    let witness = Rc::clone(world);
    let parts = Parts {
        process,
        me: id,
        all: (1..=world.cluster.controllers).collect(),
        disk: world.disk(id),
        rng: world.rng(&format!("raft {id}")),
        witness: Rc::new(move |applied| witness.applied(applied)),
    };
    let raft = Raft::start(kernel, &world.net, parts);
    let controller = Rc::new(Controller {
        world: Rc::clone(world),
        process,
        id,
        observed: RefCell::default(),
        reports: Signal::new(kernel),
        base_ms: kernel.wall_ms(HostId(id)),
        started: kernel.monotonic(HostId(id)),
        raft: raft.clone(),
    });
    let inbox: Queue<Message> = Queue::new(kernel);
    listen(&controller, &inbox);
    kernel.spawn(process, raft.clone().tick());
    let world = Rc::clone(world);
    kernel.spawn(process, async move {
        loop {
            let message = inbox.pop().await;
            let before = raft.snapshots.get();
            raft.receive(message);
            let after = raft.snapshots.get();
            (before.0..after.0).for_each(|_| world.hit("raft", "snapshot"));
            (before.1..after.1).for_each(|_| world.hit("raft", "installed"));
        }
    });
    kernel.spawn(process, lead::run(controller));
}

/// Ends a controller as SIGKILL does.
pub fn kill(world: &Shared, id: u64) {
    let process = world.controllers.borrow_mut().remove(&id);
    if let Some(process) = process
        && world.kernel.end_process(process)
    {
        world.disk(id).borrow_mut().crash(&mut world.chance.borrow_mut());
    }
}

fn listen(controller: &This, inbox: &Queue<Message>) {
    let (this, inbox) = (Rc::clone(controller), inbox.clone());
    let handler = move |request: Request, responder: Responder| match request {
        Request::Raft(message) => inbox.push(message),
        Request::Api(api) => {
            let serving = serve(Rc::clone(&this), *api, responder);
            this.world.kernel.spawn(this.process, serving);
        }
        _ => {}
    };
    let address = Address::Controller(controller.id);
    controller.world.net.listen(address, controller.process, Rc::new(handler));
}

fn not_started(text: &str) -> Status {
    Status::new(Code::Unavailable, format!("{text}; nothing was done"))
}

/// Any controller takes a request; the leader answers it.
async fn serve(this: This, api: Api, responder: Responder) {
    let host = this.host();
    let raft = this.raft.clone();
    let known = this.raft.changed.until(move || raft.leader());
    match within(&this.world.kernel, host, ELECTION_PATIENCE, known).await {
        None => responder.answer(Err(not_started("the controllers have no leader"))),
        Some(leader) if leader == this.id => {
            let answer = this.answer(api.call, api.operation).await;
            responder.answer(answer.map(Response::Api));
        }
        Some(leader) if !api.forwarded => {
            let request = Request::Api(Box::new(Api { forwarded: true, ..api }));
            let net = this.world.net.clone();
            let to = Address::Controller(leader);
            responder.relay(net.call(host, to, request, PASSED_ON_MAX).await);
        }
        Some(_) => responder.answer(Err(not_started("the leader has just changed"))),
    }
}

impl Controller {
    fn host(&self) -> HostId {
        HostId(self.id)
    }

    fn state(&self) -> Rc<State> {
        self.raft.state()
    }

    /// The boot of a node that this controller knows of; no agent is in the nil one.
    fn boot_of(&self, node: NodeId) -> BootId {
        let known = self.state().nodes.get(&node).and_then(|node| node.boot_id);
        known.unwrap_or(BootId::from_uuid(uuid::Uuid::nil()))
    }

    /// Milliseconds since 1970 as they were at the start, carried on by the monotonic clock.
    fn now_ms(&self) -> u64 {
        self.base_ms + (self.world.kernel.monotonic(self.host()) - self.started) / MS
    }

    fn note(&self, change: impl FnOnce(&mut Observed)) {
        change(&mut self.observed.borrow_mut());
        self.reports.notify();
    }

    /// Takes note of a report; who waits is woken when it says something new.
    fn take_report(&self, node: NodeId, report: NodeReport) {
        if self.observed.borrow_mut().take(node, report, &self.state()) {
            self.reports.notify();
        }
    }

    async fn propose(&self, change: Change) -> Result<(Outcome, u64), ProposeError> {
        self.propose_for(change, None).await
    }

    /// Commits a change on behalf of somebody's operation.
    async fn propose_for(
        &self,
        change: Change,
        operation: Option<u64>,
    ) -> Result<(Outcome, u64), ProposeError> {
        let command = Command { at: self.now_ms(), change };
        let proposed = self.raft.propose(command, operation).await;
        if proposed == Err(ProposeError::Unknown) {
            self.world.hit("raft", "unknown proposal");
        }
        proposed
    }

    async fn sleep(&self, duration: Nanos) {
        self.world.kernel.sleep(self.host(), duration).await;
    }

    async fn commit(&self, change: Change) -> Result<(Outcome, u64), Status> {
        self.commit_for(change, None).await
    }

    async fn commit_for(
        &self,
        change: Change,
        operation: Option<u64>,
    ) -> Result<(Outcome, u64), Status> {
        self.propose_for(change, operation).await.map_err(|error| match error {
            ProposeError::NotLeader => not_started("the leader has just changed"),
            ProposeError::Unknown => Status::new(Code::Unknown, "the outcome is unknown"),
        })
    }

    async fn answer(&self, call: ApiCall, operation: Option<u64>) -> Result<ApiReply, Status> {
        match call {
            ApiCall::Register { registration, vms } => {
                match self.take(Contact::registration(registration, vms)).await? {
                    Next::Known { boot_id } => Ok(ApiReply::Known { boot_id }),
                    _ => Ok(ApiReply::Registered { lease_ms: self.world.timing.lease_ms }),
                }
            }
            ApiCall::Renew { node, boot_id, nonce, vms, watchdog } => {
                let lease_ms = self.world.timing.lease_ms;
                let sent = self.world.leases_sent.borrow().get(&(boot_id, nonce)).copied();
                let contact = Contact::renewal(node, boot_id, nonce, vms).with_promise(watchdog);
                let (term, grants, register) = match self.take(contact).await? {
                    Next::Done { term, grants } => (term, grants, false),
                    Next::Unregistered { term } => (term, Vec::new(), true),
                    _ => return Err(not_started("a renewal has no such answer")),
                };
                let (pulse_ms, leads_in) = (self.now_ms(), self.raft.term());
                self.world.oracle.borrow_mut().counted(node, leads_in, sent.unwrap_or(0));
                Ok(ApiReply::Renewed { nonce, lease_ms, term, pulse_ms, grants, register })
            }
            ApiCall::Change(change) => self.done(change, operation).await,
            ApiCall::Begin { vm, kind, node } => {
                let by = "admin".to_owned();
                let change = Change::BeginTask(TaskRequest { vm, kind, node, by });
                self.done(change, operation).await
            }
            ApiCall::SetPaused { vm, paused } => self.set_paused(vm, paused).await,
            ApiCall::Show { vm } => self.show(vm).await,
        }
    }

    async fn done(&self, change: Change, operation: Option<u64>) -> Result<ApiReply, Status> {
        let (outcome, index) = self.commit_for(change, operation).await?;
        Ok(ApiReply::Done { outcome, index })
    }

    /// A quorum says, after the question came in, that the state here is as new as anything told.
    async fn show(&self, vm: VmId) -> Result<ApiReply, Status> {
        self.raft.confirm().await.ok_or_else(|| not_started("no quorum"))?;
        let vm = self.state().vms.get(&vm).cloned().map(Box::new);
        Ok(ApiReply::Shown { vm, index: self.raft.applied() })
    }

    /// Takes a message of an agent in, as the core says, until there is an answer.
    async fn take(&self, mut contact: Contact) -> Result<Next, Status> {
        loop {
            match contact.next(&self.state(), self.now_ms()) {
                Next::Confirm => {
                    let confirmed = self.raft.confirm().await;
                    contact.confirmed(confirmed.ok_or_else(|| not_started("no quorum"))?);
                }
                Next::Note { node, report } => self.take_report(node, report),
                Next::Commit(change) => {
                    if let (Outcome::Rejected(error), _) = self.commit(change).await? {
                        return Err(Status::new(Code::FailedPrecondition, error.text));
                    }
                }
                answer => return Ok(answer),
            }
        }
    }

    /// Intent first: should this leader die in between, asking again does the rest.
    async fn set_paused(&self, vm: VmId, paused: bool) -> Result<ApiReply, Status> {
        let (outcome, index) = self.commit(Change::SetPaused { vm, paused }).await?;
        if matches!(outcome, Outcome::Rejected(_)) {
            return Ok(ApiReply::Done { outcome, index });
        }
        if let Err(status) = self.pause_guest(vm, paused).await {
            self.commit(Change::SetPaused { vm, paused: !paused }).await?;
            return Err(status);
        }
        Ok(ApiReply::Done { outcome, index })
    }

    async fn pause_guest(&self, vm: VmId, paused: bool) -> Result<(), Status> {
        use bellwether_agent_core::{Order as What, Stamped};
        let runner = match self.state().vms.get(&vm).map(|vm| vm.place.clone()) {
            Some(Place::Runner(runner)) => runner,
            _ => return Err(Status::new(Code::FailedPrecondition, "it is not running")),
        };
        let term = self.raft.confirm().await.ok_or_else(|| not_started("no quorum"))?;
        let order = if paused { What::Pause } else { What::Resume };
        let boot = self.boot_of(runner.node);
        let stamped = Stamped { term, task: 0, epoch: runner.epoch, boot, order };
        let order = Order { vm, stamped, details: Details::Plain };
        let to = Address::Agent(runner.node);
        let request = Request::Order(Box::new(order));
        let net = self.world.net.clone();
        let answer = net.call(self.host(), to, request, 15 * SECOND).await;
        answer.map(drop).map_err(crate::wire::CallError::status)
    }
}
