//! A VMM: one process, one VM. Its life is the product's (`hypervisor/src/lifecycle.rs`), the claim's
//! record and the lease page mean what the product's code says they mean.
//!
//! The guest counts. Every record that it writes carries the next number, and its memory is the number
//! that was last acknowledged after a flush; so a disk that lost something, and a memory that its disk
//! has left behind, show themselves at the next write.

mod guest;
mod lapse;
mod locks;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use bellwether_agent_core::{SaveTimings, SealedState, VmmSight, VmmState};
use bellwether_claim::record::Slot;
use bellwether_types::{Arbiter, Epoch, Handover, NodeId, StateFileRef, VmId};

use crate::kernel::{HostId, MS, Nanos, ProcId, SECOND};
use crate::net::{Address, Responder};
use crate::oracle::Fact;
use crate::storage::{IoError, StateFile};
use crate::sync::{Queue, Signal};
use crate::wire::{Code, Request, Response, Status, VmmCall, VmmReply, disk_path, state_path};
use crate::world::Shared;

/// How often the page is looked at while nothing is near.
const PAGE_POLL: Nanos = 400 * MS;
const PAGE_POLL_EXPIRED: Nanos = 50 * MS;
/// Between two tries to get a lock.
const LOCK_SLICE: Nanos = 50 * MS;
/// The guest writes this often, about.
const GUEST_PACE: Nanos = 300 * MS;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Empty,
    Created,
    Loaded,
    Running,
    Sealed,
}

/// Why the guest does not run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Hold {
    NotStarted,
    Superseded,
    Lease,
    /// The locks were let go after the lease had run out.
    Unlocked,
    Administrator,
    Save,
}

struct Locks {
    epoch: Epoch,
    claim: u64,
    disk: u64,
    slot: Slot,
    index: usize,
}

struct State {
    phase: Phase,
    arbiter: Arbiter,
    holds: BTreeSet<Hold>,
    locks: Option<Locks>,
    /// The epoch of those that were let go.
    unlocked: Option<Epoch>,
    nonce: u64,
    /// What the guest's memory holds: the last number that was acknowledged.
    counter: u64,
    /// A flush has failed: nothing is acknowledged any more.
    broken: bool,
    writing: bool,
    loaded: Option<StateFileRef>,
    memory_complete: bool,
    consume: bool,
    sealed: Option<(StateFileRef, u64)>,
}

struct Vmm {
    world: Shared,
    process: ProcId,
    node: NodeId,
    vm: VmId,
    home: Epoch,
    state: RefCell<State>,
    gate: Signal,
    stopping: Cell<bool>,
    driver_busy: Cell<bool>,
    driver: Queue<(VmmCall, Responder)>,
}

type This = Rc<Vmm>;

/// Starts a VMM process without a machine.
pub fn start(world: &Shared, fact: Fact) -> ProcId {
    let (kernel, node, home) = (&world.kernel, fact.node, fact.home);
    let name = world.committed(|state| state.vms.get(&fact.vm).map(|vm| vm.spec.name.clone()));
    let name = format!("{} on n{node} (epoch {home})", name.unwrap_or_default());
    let process = kernel.start_process(HostId(node.0), name);
    let state = State {
        phase: Phase::Empty,
        arbiter: Arbiter::Storage,
        holds: BTreeSet::from([Hold::NotStarted]),
        locks: None,
        unlocked: None,
        nonce: world.chance.borrow_mut().next(),
        counter: 0,
        broken: false,
        writing: false,
        loaded: None,
        memory_complete: true,
        consume: false,
        sealed: None,
    };
    let vmm = Rc::new(Vmm {
        world: Rc::clone(world),
        process,
        node,
        vm: fact.vm,
        home,
        state: RefCell::new(state),
        gate: Signal::new(kernel),
        stopping: Cell::new(false),
        driver_busy: Cell::new(false),
        driver: Queue::new(kernel),
    });
    world.oracle.borrow_mut().prepared(&fact);
    world.oracle.borrow_mut().vmms.insert(process, fact);
    listen(&vmm);
    kernel.spawn(process, drive(Rc::clone(&vmm)));
    kernel.spawn(process, guest::guest(Rc::clone(&vmm)));
    kernel.spawn(process, guest::watch_page(vmm));
    process
}

fn listen(vmm: &This) {
    let this = Rc::clone(vmm);
    let handler = move |request: Request, responder: Responder| {
        let Request::Vmm(call) = request else { return };
        let this = Rc::clone(&this);
        let (kernel, process) = (this.world.kernel.clone(), this.process);
        kernel.spawn(process, async move {
            match call {
                // Nothing that the VMM does holds a status up.
                VmmCall::Status => {
                    responder.answer(Ok(Response::Vmm(VmmReply::Status(this.sight()))))
                }
                // A thread of its own writes, while the guest runs and the driver serves.
                VmmCall::PreCopy => responder.answer(this.pre_copy().await.map(Response::Vmm)),
                VmmCall::Stop => {
                    this.stopping.set(true);
                    this.driver.push((VmmCall::Stop, responder));
                }
                call => this.driver.push((call, responder)),
            }
        });
    };
    vmm.world.net.listen(Address::Vmm(vmm.process), vmm.process, Rc::new(handler));
}

/// The driver: one command at a time.
async fn drive(this: This) {
    loop {
        let (call, responder) = this.driver.pop().await;
        this.begin().await;
        if matches!(call, VmmCall::Stop) {
            this.settle().await;
            responder.answer(Ok(Response::Vmm(VmmReply::Done)));
            // The answer is on its way before the process is gone.
            this.sleep(MS).await;
            return this.exit("stopped");
        }
        let result = this.serve(call).await;
        this.done();
        responder.answer(result.map(Response::Vmm));
    }
}

fn status(code: Code, text: impl Into<String>) -> Status {
    Status::new(code, text)
}

fn io(error: IoError) -> Status {
    let code = match error {
        IoError::NotFound => Code::NotFound,
        IoError::Full => Code::ResourceExhausted,
        IoError::Eio => Code::Internal,
    };
    let text = match error {
        IoError::NotFound => "no such file on the storage",
        IoError::Full => "no space left on the storage",
        IoError::Eio => "an I/O error of the storage",
    };
    status(code, text)
}

impl Vmm {
    fn host(&self) -> HostId {
        HostId(self.node.0)
    }

    async fn sleep(&self, duration: Nanos) {
        self.world.sleep(self.host(), duration).await;
    }

    async fn takes(&self, low: Nanos, high: Nanos) {
        let duration = self.world.chance.borrow_mut().within(low, high);
        self.sleep(duration).await;
    }

    /// Records why, and ends the process.
    fn exit(self: &Rc<Self>, reason: &str) {
        let why = (self.node, self.vm, self.home, reason.to_owned());
        self.world.end_vmm(self.process, Some(why));
    }

    async fn serve(self: &Rc<Self>, call: VmmCall) -> Result<VmmReply, Status> {
        match call {
            VmmCall::Create { arbiter } => {
                self.require(&[Phase::Empty])?;
                self.takes(5 * MS, 40 * MS).await;
                let mut state = self.state.borrow_mut();
                (state.arbiter, state.phase) = (arbiter, Phase::Created);
                Ok(VmmReply::Done)
            }
            VmmCall::Lock { epoch, wait_ms } => {
                self.require(&[Phase::Created, Phase::Loaded])?;
                self.ensure_locks(epoch, wait_ms).await?;
                Ok(VmmReply::Status(self.sight()))
            }
            VmmCall::Load { file } => self.load(file).await,
            VmmCall::Start { epoch, wait_ms, consume } => self.start(epoch, wait_ms, consume).await,
            VmmCall::Pause => self.pause(true).await,
            VmmCall::Resume => self.pause(false).await,
            VmmCall::Save { generation } => self.save(generation).await,
            VmmCall::HandOver => self.hand_over().await,
            VmmCall::Shutdown => self.shutdown(),
            VmmCall::PreCopy | VmmCall::Stop | VmmCall::Status => Ok(VmmReply::Done),
        }
    }

    fn require(&self, phases: &[Phase]) -> Result<(), Status> {
        let phase = self.state.borrow().phase;
        match phases.contains(&phase) {
            true => Ok(()),
            false => Err(status(Code::FailedPrecondition, format!("the VMM is {phase:?}"))),
        }
    }

    fn set_hold(&self, hold: Hold, held: bool) {
        if !held && hold == Hold::Lease {
            self.tell_held(false);
        }
        let changed = {
            let mut state = self.state.borrow_mut();
            if held { state.holds.insert(hold) } else { state.holds.remove(&hold) }
        };
        if changed {
            let holds = self.state.borrow().holds.clone();
            if let Some(fact) = self.world.oracle.borrow_mut().vmms.get_mut(&self.process) {
                fact.open = holds.is_empty();
                fact.paused = holds == BTreeSet::from([Hold::Administrator]);
            }
            self.gate.notify();
        }
    }

    /// Tells the fencer whether there is nothing to kill.
    fn tell_held(&self, held: bool) {
        self.world.runtime(self.node, |runtime| match held {
            true => runtime.held.insert((self.vm, self.home)),
            false => runtime.held.remove(&(self.vm, self.home)),
        });
    }

    async fn load(self: &Rc<Self>, file: StateFileRef) -> Result<VmmReply, Status> {
        self.require(&[Phase::Created])?;
        let path = file.path.display().to_string();
        let found = self.world.storage.read_state(self.host(), path).await.map_err(io)?;
        self.takes(MS, 60 * MS).await;
        if found.vm != self.vm || found.epoch != file.epoch || found.hash != file.hash {
            return Err(status(Code::DataLoss, "the state file is another one"));
        }
        let mut state = self.state.borrow_mut();
        state.counter = found.counter;
        state.loaded = Some(file);
        state.memory_complete = false;
        state.phase = Phase::Loaded;
        drop(state);
        let this = Rc::clone(self);
        self.world.kernel.spawn(self.process, async move {
            this.takes(50 * MS, 4 * SECOND).await;
            this.state.borrow_mut().memory_complete = true;
            this.gate.notify();
            this.consume().await;
        });
        Ok(VmmReply::Done)
    }

    /// Removes the file that memory came from, once nobody needs it.
    async fn consume(&self) {
        let path = {
            let mut state = self.state.borrow_mut();
            match state.memory_complete && state.consume {
                true => state.loaded.take().map(|file| file.path.display().to_string()),
                false => None,
            }
        };
        if let Some(path) = path {
            let _stays_behind = self.world.storage.remove_state(self.host(), path).await;
        }
    }

    async fn start(
        self: &Rc<Self>,
        epoch: Epoch,
        wait_ms: u64,
        consume: bool,
    ) -> Result<VmmReply, Status> {
        self.require(&[Phase::Created, Phase::Loaded, Phase::Sealed])?;
        let (phase, held) = {
            let state = self.state.borrow();
            (state.phase, state.locks.as_ref().map_or(Epoch(0), |locks| locks.epoch))
        };
        // A sealed VM needs a higher epoch: its file may have been promised to somebody else.
        if phase == Phase::Sealed && epoch <= held {
            return Err(status(Code::Aborted, format!("it is sealed at epoch {held}")));
        }
        let had_locks = self.state.borrow().locks.is_some();
        self.ensure_locks(epoch, wait_ms).await?;
        let file = match phase {
            Phase::Created => {
                self.boot(had_locks).await?;
                None
            }
            Phase::Loaded => self.state.borrow().loaded.as_ref().map(|file| file.hash),
            _ => self.state.borrow().sealed.as_ref().map(|(file, _)| file.hash),
        };
        if let Err(error) = self.consume_handover().await {
            self.give_back(had_locks);
            return Err(error);
        }
        self.run(file);
        let sealed = {
            let mut state = self.state.borrow_mut();
            state.phase = Phase::Running;
            state.consume = consume;
            state.sealed.take()
        };
        // The VM runs, so the file from which it could have been resumed is worth nothing.
        if let Some((file, _)) = sealed {
            let path = file.path.display().to_string();
            let _stays_behind = self.world.storage.remove_state(self.host(), path).await;
        }
        self.consume().await;
        Ok(VmmReply::Done)
    }

    /// A guest that boots reads its disk.
    async fn boot(&self, had_locks: bool) -> Result<(), Status> {
        let read = self.world.storage.read_disk(self.host(), disk_path(self.vm)).await;
        match read {
            Ok(top) => {
                self.state.borrow_mut().counter = top;
                Ok(())
            }
            Err(error) => {
                self.give_back(had_locks);
                Err(io(error))
            }
        }
    }

    /// Gives back locks that a failed start took.
    fn give_back(&self, had_locks: bool) {
        if !had_locks {
            self.state.borrow_mut().locks = None;
            self.unlock();
            self.set_epoch(Epoch(0));
        }
    }

    /// Opens the gate: the first instruction.
    fn run(&self, file: Option<[u8; 32]>) {
        let counter = self.state.borrow().counter;
        self.set_hold(Hold::NotStarted, false);
        self.world.take_writes();
        self.world.oracle.borrow_mut().started(self.process, file, counter);
        self.check_record();
        self.enforce();
    }

    /// Whoever adopts this VMM has to know that its guest may have run.
    fn check_record(&self) {
        let record = self.world.runtime(self.node, |runtime| {
            runtime.incarnations.get(&(self.vm, self.home)).map(|record| record.may_have_run)
        });
        if record != Some(true) {
            let name = self.world.kernel.name_of(self.process);
            let text =
                format!("1: the guest of {name} begins, and no record says that it may have");
            self.world.oracle.borrow_mut().fail(text);
        }
    }

    async fn pause(&self, paused: bool) -> Result<VmmReply, Status> {
        self.require(&[Phase::Running])?;
        self.set_hold(Hold::Administrator, paused);
        Ok(VmmReply::Done)
    }

    fn shutdown(self: &Rc<Self>) -> Result<VmmReply, Status> {
        self.require(&[Phase::Running])?;
        let (this, process) = (Rc::clone(self), self.process);
        self.world.kernel.spawn(process, async move {
            // A guest takes its time, and one in eight does not listen.
            if this.world.chance.borrow_mut().below(8) == 0 {
                return;
            }
            this.takes(200 * MS, 4 * SECOND).await;
            let open = this.state.borrow().holds.is_empty();
            if open {
                this.settle().await;
                this.exit("guest-shutdown");
            }
        });
        Ok(VmmReply::Done)
    }

    /// Closes the gate, waits for what the guest has under way, and lets the locks go.
    async fn settle(&self) {
        self.set_hold(Hold::NotStarted, true);
        self.drain().await;
    }

    async fn drain(&self) {
        let state = &self.state;
        self.gate.until(|| (!state.borrow().writing).then_some(())).await;
    }

    /// Rounds that take their time and change nothing of who may run the VM: what they write counts
    /// only with the seal.
    async fn pre_copy(self: &Rc<Self>) -> Result<VmmReply, Status> {
        self.require(&[Phase::Running])?;
        self.takes(10 * MS, 2 * SECOND).await;
        self.require(&[Phase::Running])?;
        Ok(VmmReply::Done)
    }

    async fn save(self: &Rc<Self>, generation: u64) -> Result<VmmReply, Status> {
        self.require(&[Phase::Running, Phase::Sealed])?;
        self.take_back().await?;
        if let Some((file, sealed)) = self.state.borrow().sealed.clone() {
            return match sealed == generation {
                true => Ok(VmmReply::Saved { file }),
                false => Err(status(Code::FailedPrecondition, "sealed as another generation")),
            };
        }
        if self.state.borrow().holds.contains(&Hold::Superseded) {
            return Err(status(Code::Aborted, "the page shows a higher epoch"));
        }
        // A VM that was restored a moment ago is saved when its memory is here.
        let state = &self.state;
        let stopping = &self.stopping;
        let whole = self.gate.until(|| match stopping.get() {
            true => Some(false),
            false => state.borrow().memory_complete.then_some(true),
        });
        if !whole.await {
            return Err(status(Code::FailedPrecondition, "the VMM is to stop"));
        }
        self.set_hold(Hold::Save, true);
        let saved = self.seal(generation).await;
        if saved.is_ok() {
            self.set_hold(Hold::NotStarted, true);
        }
        self.set_hold(Hold::Save, false);
        saved
    }

    /// Records in the claim that this runner has sealed the VM and lets go of it.
    async fn hand_over(&self) -> Result<VmmReply, Status> {
        self.require(&[Phase::Sealed])?;
        let sealed = self.state.borrow().sealed.clone();
        let Some((StateFileRef { hash, epoch, bytes, .. }, generation)) = sealed else {
            return Err(status(Code::Internal, "it is sealed into no file"));
        };
        let handover = Handover { epoch, generation, bytes, hash };
        self.record_handover(Some(handover)).await?;
        self.world.oracle.borrow_mut().handed_over(self.vm, epoch);
        Ok(VmmReply::Done)
    }

    async fn seal(&self, generation: u64) -> Result<VmmReply, Status> {
        self.drain().await;
        if self.state.borrow().broken {
            return Err(status(Code::Internal, "the disk does not sync"));
        }
        self.takes(20 * MS, 1_500 * MS).await;
        let (counter, epoch) = {
            let state = self.state.borrow();
            (state.counter, state.locks.as_ref().map_or(Epoch(0), |locks| locks.epoch))
        };
        let path = state_path(self.vm, epoch, generation);
        let mut hash = [0; 32];
        hash[..16].copy_from_slice(self.vm.uuid().as_bytes());
        hash[16..24].copy_from_slice(&self.world.chance.borrow_mut().next().to_le_bytes());
        hash[24..].copy_from_slice(&epoch.0.to_le_bytes());
        let file = StateFile { vm: self.vm, epoch, hash, counter };
        let name = path.display().to_string();
        let (storage, host) = (&self.world.storage, self.host());
        storage.write_state(host, name.clone(), file).await.map_err(io)?;
        storage.sync_state(host, name).await.map_err(io)?;
        let file = StateFileRef { path, hash, epoch, bytes: 1 << 20 };
        let mut state = self.state.borrow_mut();
        state.sealed = Some((file.clone(), generation));
        state.phase = Phase::Sealed;
        Ok(VmmReply::Saved { file })
    }

    fn sight(&self) -> VmmSight {
        let state = self.state.borrow();
        let word = match state.phase {
            Phase::Empty => VmmState::Empty,
            Phase::Created => VmmState::Created,
            Phase::Loaded => VmmState::Loaded,
            Phase::Running if state.holds.is_empty() => VmmState::Running,
            Phase::Running => VmmState::Paused,
            Phase::Sealed => VmmState::Sealed,
        };
        let sealed = state
            .sealed
            .as_ref()
            .map(|(file, _)| SealedState { file: file.clone(), timings: SaveTimings::default() });
        VmmSight {
            state: word,
            epoch: self.epoch(),
            locked: state.locks.is_some(),
            reason: String::new(),
            memory_loaded_bytes: u64::from(state.memory_complete),
            memory_total_bytes: 1,
            sealed,
            handover: state.locks.as_ref().and_then(|locks| locks.slot.handover),
        }
    }
}

/// What a guest does to itself, by the fault that makes it.
pub fn end_guest(world: &Shared, process: ProcId, fact: &Fact, reason: &str) {
    world.end_vmm(process, Some((fact.node, fact.vm, fact.home, reason.to_owned())));
}
