//! The network: who hears whom, how late, how often.
//!
//! A message between two hosts is delayed; while the way is cut it is dropped, or held up and
//! delivered long after the cut has healed, as a connection does that is retried. Under the fault
//! *lossy* messages vanish, come twice and overtake each other. An order that comes late is the
//! thing that epochs and terms exist for, so late ones are common here.
//!
//! A call is answered at most once. It ends without an answer when the other side's process ends
//! (its host resets the connection), when keep-alive finds nobody, or at its deadline; what it asked
//! for may happen all the same, later.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bellwether_types::NodeId;

use crate::kernel::{HostId, Kernel, Nanos, ProcId, SECOND};
use crate::rng::Rng;
use crate::sync::{Promise, within};
use crate::wire::{CallError, Request, Response, Status};

/// A silent connection is given up after this.
const KEEP_ALIVE: Nanos = 5 * SECOND;
/// A message that was held up by a cut comes through within this after the cut has healed.
const HELD_UP_MAX: Nanos = 2 * SECOND;
/// A repeated message comes this much later at most.
const REPEAT_MAX: Nanos = 8 * SECOND;

/// Where somebody listens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Address {
    Controller(u64),
    Agent(NodeId),
    /// The socket of a VMM, on its own host only.
    Vmm(ProcId),
}

/// Takes a request in. It is called while the process may stand still, so it only spawns.
pub type Handler = Rc<dyn Fn(Request, Responder)>;

/// What is wrong with the whole network.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Weather {
    pub loss_permille: u32,
    pub repeat_permille: u32,
    /// The longest extra delay, of one message in eight.
    pub extra_ns: Nanos,
}

struct State {
    rng: Rng,
    listening: BTreeMap<Address, (ProcId, Handler)>,
    /// From whom to whom nothing goes.
    cut: BTreeSet<(HostId, HostId)>,
    /// Somebody on the way has them, so that they outlive their senders.
    held_up: Vec<(HostId, HostId, Delivery)>,
    weather: Weather,
    /// Hosts whose answers to orders are lost.
    broken: BTreeSet<HostId>,
}

type Delivery = Rc<dyn Fn(bool)>;

/// The network; clones are the same one.
#[derive(Clone)]
pub struct Net {
    kernel: Kernel,
    state: Rc<RefCell<State>>,
}

impl Net {
    pub fn new(kernel: &Kernel, seed: u64) -> Self {
        let state = State {
            rng: Rng::of(seed, "net"),
            listening: BTreeMap::new(),
            cut: BTreeSet::new(),
            held_up: Vec::new(),
            weather: Weather::default(),
            broken: BTreeSet::new(),
        };
        Self { kernel: kernel.clone(), state: Rc::new(RefCell::new(state)) }
    }

    pub fn listen(&self, address: Address, process: ProcId, handler: Handler) {
        let old = self.state.borrow_mut().listening.insert(address, (process, handler));
        drop(old);
    }

    pub fn clear(&self) {
        let mut state = self.state.borrow_mut();
        let gone = (std::mem::take(&mut state.listening), std::mem::take(&mut state.held_up));
        drop(state);
        drop(gone);
    }

    pub fn set_weather(&self, weather: Weather) {
        self.state.borrow_mut().weather = weather;
    }

    /// The connections on which orders were given to this host break before they are answered; those on
    /// which it reports do not.
    pub fn lose_answers(&self, from: HostId, lost: bool) {
        let broken = &mut self.state.borrow_mut().broken;
        if lost {
            broken.insert(from)
        } else {
            broken.remove(&from)
        };
    }

    /// From now on nothing goes that way.
    pub fn cut(&self, from: HostId, to: HostId) {
        self.state.borrow_mut().cut.insert((from, to));
    }

    /// The way is open again; some of what was held up comes through now.
    pub fn mend(&self, from: HostId, to: HostId) {
        let mut state = self.state.borrow_mut();
        state.cut.remove(&(from, to));
        let held = std::mem::take(&mut state.held_up);
        let is_open = |(a, b, _): &(HostId, HostId, _)| (*a, *b) == (from, to);
        let (open, still): (Vec<_>, Vec<_>) = held.into_iter().partition(is_open);
        state.held_up = still;
        for (.., delivery) in open {
            let delay = state.rng.below(HELD_UP_MAX);
            self.kernel.after(delay, move |_| delivery(false));
        }
    }

    pub fn mend_all(&self) {
        let cut: Vec<_> = self.state.borrow().cut.iter().copied().collect();
        cut.into_iter().for_each(|(from, to)| self.mend(from, to));
        self.set_weather(Weather::default());
        self.state.borrow_mut().broken.clear();
    }

    fn is_cut(&self, from: HostId, to: HostId) -> bool {
        from != to && self.state.borrow().cut.contains(&(from, to))
    }

    /// Sends something on its way. It is delivered never (then this is false), once, or twice (then
    /// with `true`).
    fn transmit(&self, from: HostId, to: HostId, delivery: Delivery) -> bool {
        let mut state = self.state.borrow_mut();
        if from == to {
            let delay = state.rng.within(10_000, 60_000);
            self.kernel.after(delay, move |_| delivery(false));
            return true;
        }
        if state.cut.contains(&(from, to)) {
            let held = state.rng.permille(500);
            if held {
                state.held_up.push((from, to, delivery));
            }
            return held;
        }
        let Weather { loss_permille, repeat_permille, extra_ns } = state.weather;
        if state.rng.permille(loss_permille) {
            return false;
        }
        let mut delay = state.rng.within(100_000, 600_000);
        if extra_ns > 0 && state.rng.below(8) == 0 {
            delay += state.rng.below(extra_ns);
        }
        if state.rng.permille(repeat_permille) {
            let (again, later) = (Rc::clone(&delivery), state.rng.below(REPEAT_MAX));
            self.kernel.after(delay + later, move |_| again(true));
        }
        self.kernel.after(delay, move |_| delivery(false));
        true
    }

    /// A connection on which something was lost for good breaks.
    fn break_off(&self, promise: Promise<Result<Response, CallError>>) {
        self.kernel.after(KEEP_ALIVE, move |_| promise.keep(Err(CallError::Lost)));
    }

    pub fn host_of(&self, address: Address) -> HostId {
        match address {
            Address::Controller(id) => HostId(id),
            Address::Agent(node) => HostId(node.0),
            Address::Vmm(process) => self.kernel.host_of(process).unwrap_or_default(),
        }
    }

    /// Sends a message that has no answer.
    pub fn send(&self, from: HostId, to: Address, request: Request) {
        let (net, target) = (self.clone(), self.host_of(to));
        let delivery = move |_| {
            let responder = Responder::nobody(&net, target);
            net.deliver(to, request.clone(), responder);
        };
        self.transmit(from, target, Rc::new(delivery));
    }

    /// Asks and waits for the answer.
    pub async fn call(
        &self,
        from: HostId,
        to: Address,
        request: Request,
        at_most: Nanos,
    ) -> Result<Response, CallError> {
        let target = self.host_of(to);
        let promise = Promise::new(&self.kernel);
        let (net, answer) = (self.clone(), promise.clone());
        let delivery = move |again: bool| {
            let answer = (!again).then(|| answer.clone());
            let responder = Responder { net: net.clone(), from: target, to: from, promise: answer };
            let request = if again { request.repeated() } else { request.clone() };
            net.deliver(to, request, responder);
        };
        if !self.transmit(from, target, Rc::new(delivery)) {
            self.break_off(promise.clone());
        }
        let mut left = at_most;
        loop {
            let slice = left.min(KEEP_ALIVE);
            if let Some(answer) = within(&self.kernel, from, slice, promise.clone().wait()).await {
                return answer;
            }
            left -= slice;
            if left == 0 {
                return Err(CallError::Timeout);
            }
            if from != target && !self.hears(from, to) {
                return Err(CallError::Lost);
            }
        }
    }

    /// Whether the other side's program would answer a ping.
    pub fn hears(&self, from: HostId, to: Address) -> bool {
        let target = self.host_of(to);
        let process = self.state.borrow().listening.get(&to).map(|(process, _)| *process);
        let runs = process.is_some_and(|it| self.kernel.lives(it) && !self.kernel.is_standing(it));
        runs && !self.is_cut(from, target) && !self.is_cut(target, from)
    }

    fn deliver(&self, to: Address, request: Request, responder: Responder) {
        if !self.kernel.is_up(responder.from) {
            return;
        }
        let listener = self.state.borrow().listening.get(&to).cloned();
        // Without a process the host refuses the connection: the responder says so as it goes.
        if let Some((process, handler)) = listener
            && self.kernel.lives(process)
        {
            self.kernel.note(process.0);
            handler(request, responder);
        }
    }
}

/// The way back to a caller. Dropped without an answer, it tells the caller that the connection is
/// gone.
pub struct Responder {
    net: Net,
    /// The host that answers.
    from: HostId,
    to: HostId,
    promise: Option<Promise<Result<Response, CallError>>>,
}

impl Responder {
    /// For a message that nobody waits for.
    fn nobody(net: &Net, from: HostId) -> Self {
        Self { net: net.clone(), from, to: from, promise: None }
    }

    pub fn answer(mut self, answer: Result<Response, Status>) {
        self.reply(answer.map_err(CallError::Status));
    }

    /// The server passes on what another one said, or that it did not.
    pub fn relay(mut self, answer: Result<Response, CallError>) {
        self.reply(answer);
    }

    fn reply(&mut self, answer: Result<Response, CallError>) {
        let Some(promise) = self.promise.take() else { return };
        let is_broken = self.net.state.borrow().broken.contains(&self.from);
        if is_broken && matches!(answer, Ok(Response::Order(_))) {
            return self.net.break_off(promise);
        }
        let lost = promise.clone();
        let delivery = move |_| promise.keep(answer.clone());
        if !self.net.transmit(self.from, self.to, Rc::new(delivery)) {
            self.net.break_off(lost);
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        match self.net.kernel.is_up(self.from) {
            true => self.reply(Err(CallError::Lost)),
            // Nobody is there to say so.
            false => self.promise.take().into_iter().for_each(|lost| self.net.break_off(lost)),
        }
    }
}
