//! An agent: the core's machines, with the shell's order of durability around them.
//!
//! As in the product each VM has an owner, one task that executes one order at a time; the desk keeps
//! the lease and writes the pages; the renewal reports. What is admitted, what has to be durable
//! before what, what is told: from `bellwether-agent-core`.

mod execute;
mod heartbeat;
mod lifecycle;
mod owner;
mod renewal;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bellwether_agent_core::{Lease, LeaseAnswer, LeaseRequest, LeaseState};
use bellwether_agent_core::{
    Leftover, Observation, Order as What, Pulse, Refusal, RefusalKind, Stamp, Standing, Terms,
    is_recent,
};
use bellwether_core::fence::Promise;
use bellwether_lease::{Grant, LeaseView, grant};
use bellwether_types::{BootId, Epoch, NodeId, VmId};

use crate::kernel::{HostId, MS, Nanos, ProcId};
use crate::net::{Address, Responder};
use crate::sync::{Queue, Signal};
use crate::wire::{Code, Order, Request, Response, Status};
use crate::world::{Facts, Record, Shared};

/// Between two looks at the status of a VMM.
pub const STATUS_INTERVAL: Nanos = 250 * MS;
/// Orders that may wait for one VM.
const INBOX_MAX: usize = 32;

/// One agent's process.
pub struct Agent {
    pub world: Shared,
    pub process: ProcId,
    pub node: NodeId,
    pub boot: BootId,
    terms: RefCell<Terms>,
    desk: RefCell<Desk>,
    board: RefCell<BTreeMap<VmId, Observation>>,
    /// An observation has changed, or a renewal is wanted.
    hurry: Signal,
    answers: Signal,
    owners: RefCell<BTreeMap<VmId, Handle>>,
}

pub type This = Rc<Agent>;

/// This node's standing with the controllers.
struct Desk {
    lease: Lease,
    last_contact: Option<Stamp>,
    /// The same in true time, for the oracle.
    heard_at: Nanos,
    lease_ms: u64,
    /// The last that was heard of a quorum.
    pulse: Option<Pulse>,
    /// A registration has told the storage.
    knows_storage: bool,
    grants: BTreeMap<VmId, Epoch>,
    /// The newest request, and the newest that was answered.
    asked: u64,
    answered: u64,
    /// The page of each VM: the epoch that names its incarnation's directory.
    pages: BTreeMap<VmId, Epoch>,
}

/// How the owner of a VM is reached.
#[derive(Clone)]
pub struct Handle {
    inbox: Queue<Message>,
    /// The release that was accepted last: its term and epoch.
    pub released: Rc<RefCell<(u64, Epoch)>>,
    pub releases: Signal,
}

/// An order for an owner, and who waits for the answer.
pub struct Message {
    pub order: Order,
    pub responder: Responder,
}

/// Starts an agent on what an earlier one left.
pub fn start(world: &Shared, node: NodeId) {
    let process = world.kernel.start_process(HostId(node.0), format!("a{node}"));
    world.agents.borrow_mut().insert(node, process);
    let boot = world.boot(node);
    let first_nonce = world.kernel.boottime(HostId(node.0));
    let desk = Desk {
        lease: Lease::new(boot, first_nonce),
        last_contact: None,
        heard_at: 0,
        lease_ms: 0,
        pulse: None,
        knows_storage: false,
        grants: BTreeMap::new(),
        asked: 0,
        answered: 0,
        pages: BTreeMap::new(),
    };
    let agent = Rc::new(Agent {
        world: Rc::clone(world),
        process,
        node,
        boot,
        terms: RefCell::new(Terms::new(world.runtime(node, |runtime| runtime.term))),
        desk: RefCell::new(desk),
        board: RefCell::default(),
        hurry: Signal::new(&world.kernel),
        answers: Signal::new(&world.kernel),
        owners: RefCell::default(),
    });
    world.kernel.spawn(process, async move {
        // Before anything is served or told: what is answered must include what was left here.
        adopt(&agent).await;
        listen(&agent);
        let watching = heartbeat::run(Rc::clone(&agent));
        agent.world.kernel.spawn(agent.process, watching);
        renewal::run(agent).await;
    });
}

/// Ends an agent as SIGKILL does; its VMMs go on.
pub fn kill(world: &Shared, node: NodeId) {
    if let Some(process) = world.agents.borrow_mut().remove(&node) {
        world.kernel.end_process(process);
    }
}

fn listen(agent: &This) {
    let this = Rc::clone(agent);
    let handler = move |request: Request, responder: Responder| {
        if let Request::Order(order) = request {
            let taking = take(Rc::clone(&this), *order, responder);
            this.world.kernel.spawn(this.process, taking);
        }
    };
    agent.world.net.listen(Address::Agent(agent.node), agent.process, Rc::new(handler));
}

/// Gives an order to the owner of its VM.
async fn take(this: This, order: Order, responder: Responder) {
    if let Err(refusal) = order.stamped.check_boot(order.vm, this.boot) {
        return responder.answer(Err(this.refuse(&refusal)));
    }
    if let Err(status) = this.check_term(&order).await {
        return responder.answer(Err(status));
    }
    let handle = this.handle(order.vm);
    if handle.inbox.waiting() >= INBOX_MAX {
        let text = "orders are waiting already; ask again";
        return responder.answer(Err(Status::new(Code::Unavailable, text)));
    }
    let release =
        (order.stamped.order == What::Release).then_some((order.stamped.term, order.stamped.epoch));
    handle.inbox.push(Message { order, responder });
    // Only now: a release that was refused calls nothing off.
    if let Some(release) = release
        && release > *handle.released.borrow()
    {
        *handle.released.borrow_mut() = release;
        handle.releases.notify();
    }
}

/// Reads all incarnations and keeps one for each VM; the others are ended.
async fn adopt(agent: &This) {
    let (world, node) = (&agent.world, agent.node);
    let left = world.runtime(node, |runtime| runtime.incarnations.clone());
    let floors = world.runtime(node, |runtime| runtime.floors.clone());
    let vms: BTreeSet<VmId> =
        left.keys().map(|(vm, _)| *vm).chain(floors.keys().copied()).collect();
    for vm in vms {
        let floor = floors.get(&vm).map_or(Epoch(0), |durable| durable.floor);
        let mut records: Vec<Record> = left
            .iter()
            .filter(|((of, _), _)| *of == vm)
            .map(|(_, record)| record.clone())
            .collect();
        records.sort_by(|one, other| {
            agent.leftover(one).rank(floor).cmp(&agent.leftover(other).rank(floor))
        });
        let kept = records.pop();
        for record in records {
            agent.end_leftover(vm, &record).await;
        }
        let durable = floors.get(&vm).cloned().unwrap_or_default();
        let (handle, mut owner) = agent.make(vm, durable);
        if let Some(record) = kept {
            world.hit("agent", "adopted");
            owner.adopt(record).await;
        }
        agent.owners.borrow_mut().insert(vm, handle);
        world.kernel.spawn(agent.process, owner.run());
    }
}

impl Agent {
    pub fn host(&self) -> HostId {
        HostId(self.node.0)
    }

    /// One reading of both clocks.
    pub fn stamp(&self) -> Stamp {
        let (kernel, host) = (&self.world.kernel, self.host());
        Stamp { boot_ns: kernel.boottime(host), raw_ns: kernel.monotonic(host) }
    }

    fn leftover(&self, record: &Record) -> Leftover {
        let lives = record.process.is_some_and(|process| !self.world.has_ended(process));
        Leftover { epoch: record.epoch, lives, may_have_run: record.may_have_run }
    }

    async fn end_leftover(&self, vm: VmId, record: &Record) {
        if let Some(process) = record.process {
            self.world.end_vmm(process, None);
            self.world.exit_of(process).await;
        }
        self.remove_home(vm, record.home);
    }

    pub fn remove_home(&self, vm: VmId, home: Epoch) {
        self.world.runtime(self.node, |runtime| {
            runtime.incarnations.remove(&(vm, home));
            runtime.pages.remove(&(vm, home));
            runtime.held.remove(&(vm, home));
            runtime.exits.remove(&(vm, home));
        });
    }

    fn make(
        self: &Rc<Self>,
        vm: VmId,
        durable: bellwether_agent_core::Durable,
    ) -> (Handle, owner::Owner) {
        let kernel = &self.world.kernel;
        let handle = Handle {
            inbox: Queue::new(kernel),
            released: Rc::new(RefCell::new((0, Epoch(0)))),
            releases: Signal::new(kernel),
        };
        let owner = owner::Owner::new(self, vm, durable, handle.clone());
        (handle, owner)
    }

    fn handle(self: &Rc<Self>, vm: VmId) -> Handle {
        if let Some(handle) = self.owners.borrow().get(&vm) {
            return handle.clone();
        }
        let (handle, owner) = self.make(vm, Default::default());
        self.owners.borrow_mut().insert(vm, handle.clone());
        self.world.kernel.spawn(self.process, owner.run());
        handle
    }

    /// A deposed leader is refused before its order has any effect.
    async fn check_term(&self, order: &Order) -> Result<(), Status> {
        let (term, word) = (order.stamped.term, order.stamped.order.word());
        let seen = self.hear(term).await.map_err(|()| {
            Status::new(
                Code::Unavailable,
                "the term cannot be written; nothing was done, ask again",
            )
        })?;
        match term < seen {
            true => Err(self.refuse(&Refusal::OldTerm { vm: order.vm, order: word, term, seen })),
            false => Ok(()),
        }
    }

    /// Takes in a term, and gives the highest, which is durable then.
    pub async fn hear(&self, term: u64) -> Result<u64, ()> {
        let due = self.terms.borrow_mut().hear(term);
        if let Some(highest) = due {
            self.sync().await?;
            self.world.runtime(self.node, |runtime| runtime.term = runtime.term.max(highest));
            self.terms.borrow_mut().note(highest);
        }
        let highest = self.terms.borrow().highest();
        self.world.oracle.borrow_mut().heard(self.node, self.boot, highest);
        Ok(highest)
    }

    /// The time that a durable write takes; an error if the disk refuses it.
    pub async fn sync(&self) -> Result<(), ()> {
        let takes = self.world.chance.borrow_mut().within(MS, 6 * MS);
        self.world.sleep(self.host(), takes).await;
        match self.world.runtime(self.node, |runtime| runtime.full) {
            true => Err(()),
            false => Ok(()),
        }
    }

    /// A refusal under the code that tells the controller what to make of it.
    pub fn refuse(&self, refusal: &Refusal) -> Status {
        let word = match refusal {
            Refusal::OtherBoot { .. } => "other boot",
            Refusal::OldTerm { .. } => "old term",
            Refusal::OldTask { .. } => "old task",
            Refusal::Released { .. } => "released",
            Refusal::NeverRan { .. } => "never ran",
            Refusal::NoVmm { .. } => "no VMM",
            Refusal::OtherEpoch { .. } => "other epoch",
            Refusal::LowerLives { .. } => "lower lives",
            Refusal::WrongPhase { .. } => "wrong phase",
            Refusal::Ended { .. } => "ended",
            Refusal::OtherFile { .. } => "other file",
            Refusal::NotLoaded { .. } => "not loaded",
            Refusal::Uncertain { .. } => "uncertain",
            Refusal::NoLease { .. } => "no lease",
            Refusal::NotRegistered { .. } => "not registered",
        };
        self.world.hit("agent", format!("refused: {word}"));
        let code = match refusal.kind() {
            RefusalKind::NeverRan => Code::Aborted,
            RefusalKind::Passing => Code::Unavailable,
            RefusalKind::Lasting => Code::FailedPrecondition,
        };
        Status::new(code, refusal.to_string())
    }

    pub fn post(&self, vm: VmId, observation: Option<Observation>) {
        let mut board = self.board.borrow_mut();
        let key = |it: &Observation| (it.epoch, it.state, it.reason.clone());
        let new = observation.as_ref().map(key);
        let old = match observation {
            Some(observation) => board.insert(vm, observation),
            None => board.remove(&vm),
        };
        drop(board);
        if old.as_ref().map(key) != new {
            self.hurry.notify();
        }
    }

    // --- the desk ---

    pub fn standing(&self) -> Standing {
        let (desk, now) = (self.desk.borrow(), self.stamp());
        Standing {
            term: self.terms.borrow().highest(),
            lease_live: desk.lease.is_live(now),
            contact_recent: is_recent(desk.last_contact, now, desk.lease_ms),
        }
    }

    /// Creates the page of a VMM, or takes up the one that an earlier agent left.
    pub fn add_page(&self, vm: VmId, home: Epoch) {
        self.world.runtime(self.node, |runtime| {
            runtime.pages.entry((vm, home)).or_default();
        });
        self.desk.borrow_mut().pages.insert(vm, home);
    }

    pub fn drop_page(&self, vm: VmId) {
        self.desk.borrow_mut().pages.remove(&vm);
    }

    pub fn show_epoch(&self, vm: VmId, epoch: Epoch) {
        let deadline_ns = self.deadline_ns();
        self.write_page(vm, epoch, deadline_ns);
    }

    fn deadline_ns(&self) -> u64 {
        match self.desk.borrow().lease.state(self.stamp()) {
            LeaseState::GrantedUntil { deadline_ns } => deadline_ns,
            LeaseState::NeverGranted | LeaseState::Expired { .. } => 0,
        }
    }

    fn write_page(&self, vm: VmId, epoch: Epoch, deadline_ns: u64) {
        let Some(home) = self.desk.borrow().pages.get(&vm).copied() else { return };
        self.world.runtime(self.node, |runtime| {
            let page: &mut LeaseView = runtime.pages.entry((vm, home)).or_default();
            if let Grant::Write(view) = grant(*page, epoch.0, deadline_ns) {
                *page = view;
            }
        });
    }

    /// An answer has come: extends the lease and writes the pages of the VMs that are granted.
    fn answered(&self, nonce: u64, lease_ms: u64, grants: BTreeMap<VmId, Epoch>) -> LeaseAnswer {
        let mut desk = self.desk.borrow_mut();
        let answer = desk.lease.answer(nonce, lease_ms);
        if answer == LeaseAnswer::NotAsked {
            return answer;
        }
        desk.last_contact = Some(self.stamp());
        desk.heard_at = self.world.kernel.now();
        desk.lease_ms = lease_ms;
        desk.grants = grants.clone();
        desk.answered = nonce;
        let live = desk.lease.is_live(self.stamp());
        drop(desk);
        if live {
            let deadline_ns = self.deadline_ns();
            for (vm, epoch) in grants {
                self.write_page(vm, epoch, deadline_ns);
            }
        }
        self.answers.notify();
        answer
    }

    /// A new request, stamped before it is sent.
    pub fn request(&self) -> LeaseRequest {
        let now = self.stamp();
        let mut desk = self.desk.borrow_mut();
        let request = desk.lease.request(now);
        desk.asked = request.nonce;
        request
    }

    /// Waits until a lease that names this VM and epoch is live, by the answer to a request that is
    /// made from now on.
    pub async fn granted(self: &Rc<Self>, vm: VmId, epoch: Epoch, at_most: Nanos) -> bool {
        let (this, after) = (Rc::clone(self), self.desk.borrow().asked);
        let granted = self.answers.until(move || {
            let desk = this.desk.borrow();
            let named = desk.answered > after && desk.grants.get(&vm) == Some(&epoch);
            (named && desk.lease.is_live(this.stamp())).then_some(())
        });
        crate::sync::within(&self.world.kernel, self.host(), at_most, granted).await.is_some()
    }
}

/// The fencer of this node.
impl Agent {
    /// What it has written down, as it is promised to the controllers.
    pub fn promise(&self) -> Promise {
        match self.world.runtime(self.node, |runtime| runtime.facts) {
            None => Err("no fencer runs".to_owned()),
            Some(Facts { hardware: false, .. }) => {
                Err("its watchdog is the kernel's own".to_owned())
            }
            Some(Facts { bound, .. }) => Ok(bound),
        }
    }

    /// A quorum has confirmed, after this stamp, that the leader of a term leads.
    pub fn grant_fencer(&self, term: u64, stamp: Stamp) {
        self.world.runtime(self.node, |runtime| {
            let Some(facts) = runtime.facts else { return };
            let deadline_ns = stamp.boot_ns + facts.bound.pet_ms * MS;
            if let Grant::Write(view) = grant(runtime.grant, term, deadline_ns) {
                runtime.grant = view;
            }
        });
    }
}

/// What an answer to an order looks like on the wire.
pub fn reply(result: Result<crate::wire::OrderReply, Status>) -> Result<Response, Status> {
    result.map(Response::Order)
}
