//! The scheduler: virtual time, hosts, processes and their tasks, all on one thread.
//!
//! ```text
//!   queue (time, sequence) --> wake a task --> poll it --> it sleeps, sends, waits, ends
//!                         \--> deliver, heal, ... (a closure)
//! ```
//!
//! A task is a future that belongs to a process, and a process belongs to a host. Killing a process
//! drops its tasks where they stand, so it dies at whatever await it had come to. A process that is
//! paused and a host that is frozen keep their tasks, whose wake-ups wait. Every wake-up has a little
//! delay of its own from the schedule's generator, so that each seed interleaves differently. There
//! is no clock, no thread and no hash map here: one seed is one run.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bellwether_types::BootId;

use crate::rng::Rng;

/// Virtual time, nanoseconds since the beginning.
pub type Nanos = u64;
pub const MS: Nanos = 1_000_000;
pub const SECOND: Nanos = 1_000 * MS;

pub type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct TaskNo(u64);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct ProcId(pub u64);

/// A machine of the world; by convention the number of the node or controller on it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct HostId(pub u64);

type Job = Box<dyn FnOnce(&Kernel)>;

enum Event {
    Wake(TaskNo),
    Run(Job),
}

struct Task {
    process: ProcId,
    /// None while it is being polled.
    future: Option<LocalFuture<()>>,
    queued: bool,
}

/// One running program.
struct Process {
    host: HostId,
    name: String,
    paused: bool,
    /// Tasks whose wake-up waits for the process to go on.
    deferred: BTreeSet<TaskNo>,
    tasks: BTreeSet<TaskNo>,
}

/// One machine.
#[derive(Clone, Debug)]
pub struct Host {
    pub up: bool,
    pub frozen: bool,
    pub boot_id: BootId,
    pub booted_at: Nanos,
    /// How much faster than true time its oscillator runs, parts per million.
    pub drift_ppm: i64,
    /// What its wall clock is ahead of true time, milliseconds.
    pub wall_ahead_ms: i64,
    /// Time that CLOCK_MONOTONIC_RAW has not counted, because the host was suspended.
    pub suspended_ns: u64,
    /// Since when it is suspended now.
    pub suspended_since: Option<Nanos>,
}

#[derive(Default)]
struct Core {
    queue: BTreeMap<(Nanos, u64), Event>,
    tasks: BTreeMap<TaskNo, Task>,
    processes: BTreeMap<ProcId, Process>,
    hosts: BTreeMap<HostId, Host>,
    next_task: u64,
    next_process: u64,
}

/// The world's scheduler; clones are the same one.
#[derive(Clone)]
pub struct Kernel {
    core: Rc<RefCell<Core>>,
    now: Rc<Cell<Nanos>>,
    sequence: Rc<Cell<u64>>,
    current: Rc<Cell<TaskNo>>,
    schedule: Rc<RefCell<Rng>>,
    events: Rc<Cell<u64>>,
    trace: Rc<Cell<u64>>,
}

impl Kernel {
    pub fn new(seed: u64) -> Self {
        Self {
            core: Rc::default(),
            now: Rc::default(),
            sequence: Rc::default(),
            current: Rc::default(),
            schedule: Rc::new(RefCell::new(Rng::of(seed, "schedule"))),
            events: Rc::default(),
            trace: Rc::new(Cell::new(seed)),
        }
    }

    pub fn now(&self) -> Nanos {
        self.now.get()
    }

    /// How many events have happened.
    pub fn events(&self) -> u64 {
        self.events.get()
    }

    /// The hash of everything that has happened so far, in its order.
    pub fn trace_hash(&self) -> u64 {
        self.trace.get()
    }

    /// Takes a number into the trace.
    pub fn note(&self, what: u64) {
        let mixed = (self.trace.get() ^ what).wrapping_mul(0x0000_0100_0000_01B3);
        self.trace.set(mixed.rotate_left(23).wrapping_add(what));
    }

    /// Takes a text into the trace.
    pub fn note_text(&self, text: &str) {
        for bytes in text.as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.note(u64::from_le_bytes(word));
        }
    }

    fn push(&self, at: Nanos, event: Event) -> (Nanos, u64) {
        let key = (at.max(self.now()), self.sequence.get());
        self.sequence.set(key.1 + 1);
        self.core.borrow_mut().queue.insert(key, event);
        key
    }

    fn cancel(&self, key: (Nanos, u64)) {
        let event = self.core.borrow_mut().queue.remove(&key);
        drop(event);
    }

    /// Runs a closure at a time to come.
    pub fn at(&self, at: Nanos, job: impl FnOnce(&Kernel) + 'static) {
        self.push(at, Event::Run(Box::new(job)));
    }

    pub fn after(&self, delay: Nanos, job: impl FnOnce(&Kernel) + 'static) {
        self.at(self.now().saturating_add(delay), job);
    }

    /// Lets everything happen up to a time.
    pub fn run_until(&self, end: Nanos) {
        loop {
            let next = self.core.borrow().queue.first_key_value().map(|(key, _)| *key);
            let Some(key) = next.filter(|(at, _)| *at <= end) else { break };
            let Some(event) = self.core.borrow_mut().queue.remove(&key) else { break };
            self.now.set(key.0);
            self.events.set(self.events.get() + 1);
            self.note(key.0 ^ key.1.rotate_left(40));
            match event {
                Event::Wake(task) => self.poll(task),
                Event::Run(job) => job(self),
            }
        }
        self.now.set(end);
    }

    /// Forgets everything, so that nothing holds on to itself.
    pub fn clear(&self) {
        let mut core = self.core.borrow_mut();
        let gone = (std::mem::take(&mut core.queue), std::mem::take(&mut core.tasks));
        core.processes.clear();
        drop(core);
        drop(gone);
        let late = std::mem::take(&mut self.core.borrow_mut().queue);
        drop(late);
    }

    // --- tasks ---

    /// The task that is being polled.
    pub fn current(&self) -> TaskNo {
        self.current.get()
    }

    /// Starts a task in a process, if that lives.
    pub fn spawn(&self, process: ProcId, future: impl Future<Output = ()> + 'static) -> TaskNo {
        let mut core = self.core.borrow_mut();
        core.next_task += 1;
        let no = TaskNo(core.next_task);
        let Some(owner) = core.processes.get_mut(&process) else { return no };
        owner.tasks.insert(no);
        let task = Task { process, future: Some(Box::pin(future)), queued: false };
        core.tasks.insert(no, task);
        drop(core);
        self.wake(no);
        no
    }

    /// Drops a task where it stands.
    pub fn abort(&self, no: TaskNo) {
        let mut core = self.core.borrow_mut();
        let task = core.tasks.remove(&no);
        if let Some(task) = &task
            && let Some(process) = core.processes.get_mut(&task.process)
        {
            process.tasks.remove(&no);
            process.deferred.remove(&no);
        }
        drop(core);
        // Its destructors may schedule.
        drop(task);
    }

    /// Lets a task be polled soon.
    pub fn wake(&self, no: TaskNo) {
        let mut core = self.core.borrow_mut();
        let Some(task) = core.tasks.get_mut(&no) else { return };
        if !std::mem::replace(&mut task.queued, true) {
            drop(core);
            let delay = self.schedule.borrow_mut().below(20_000);
            self.push(self.now() + delay, Event::Wake(no));
        }
    }

    fn poll(&self, no: TaskNo) {
        let taken = {
            let mut core = self.core.borrow_mut();
            let Some(process) = core.tasks.get(&no).map(|task| task.process) else { return };
            if core.is_standing(process) {
                if let Some(process) = core.processes.get_mut(&process) {
                    process.deferred.insert(no);
                }
                return;
            }
            let Some(task) = core.tasks.get_mut(&no) else { return };
            task.queued = false;
            task.future.take()
        };
        let Some(mut future) = taken else { return };
        let before = self.current.replace(no);
        let polled = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        self.current.set(before);
        let mut core = self.core.borrow_mut();
        // It may have been killed by its own doing.
        if let (Poll::Pending, Some(task)) = (polled, core.tasks.get_mut(&no)) {
            task.future = Some(future);
            return;
        }
        drop(core);
        self.abort(no);
        drop(future);
    }

    // --- processes ---

    pub fn start_process(&self, host: HostId, name: impl Into<String>) -> ProcId {
        let mut core = self.core.borrow_mut();
        core.next_process += 1;
        let id = ProcId(core.next_process);
        let name = name.into();
        let (deferred, tasks) = Default::default();
        core.processes.insert(id, Process { host, name, paused: false, deferred, tasks });
        id
    }

    /// Ends a process where it stands. What follows from its end is its owner's business.
    pub fn end_process(&self, id: ProcId) -> bool {
        let mut core = self.core.borrow_mut();
        let Some(process) = core.processes.remove(&id) else { return false };
        let tasks: Vec<_> = process.tasks.iter().filter_map(|no| core.tasks.remove(no)).collect();
        drop(core);
        drop(tasks);
        true
    }

    pub fn lives(&self, id: ProcId) -> bool {
        self.core.borrow().processes.contains_key(&id)
    }

    pub fn host_of(&self, id: ProcId) -> Option<HostId> {
        self.core.borrow().processes.get(&id).map(|process| process.host)
    }

    pub fn name_of(&self, id: ProcId) -> String {
        let core = self.core.borrow();
        core.processes.get(&id).map_or_else(String::new, |process| process.name.clone())
    }

    pub fn processes_on(&self, host: HostId) -> Vec<ProcId> {
        let core = self.core.borrow();
        let here = core.processes.iter().filter(|(_, process)| process.host == host);
        here.map(|(id, _)| *id).collect()
    }

    /// Stops a process as SIGSTOP does, or lets it go on.
    pub fn pause_process(&self, id: ProcId, paused: bool) {
        if let Some(process) = self.core.borrow_mut().processes.get_mut(&id) {
            process.paused = paused;
        }
        if !paused {
            self.resume(id);
        }
    }

    /// The process exists and does not run: it is stopped, or its host stands.
    pub fn is_standing(&self, id: ProcId) -> bool {
        self.core.borrow().is_standing(id)
    }

    fn resume(&self, id: ProcId) {
        if self.is_standing(id) {
            return;
        }
        let mut core = self.core.borrow_mut();
        let deferred = core.processes.get_mut(&id).map(|it| std::mem::take(&mut it.deferred));
        drop(core);
        for no in deferred.into_iter().flatten() {
            let delay = self.schedule.borrow_mut().below(200_000);
            self.push(self.now() + delay, Event::Wake(no));
        }
    }

    // --- hosts ---

    pub fn add_host(&self, id: HostId, host: Host) {
        self.core.borrow_mut().hosts.insert(id, host);
    }

    pub fn host(&self, id: HostId) -> Option<Host> {
        self.core.borrow().hosts.get(&id).cloned()
    }

    pub fn change_host(&self, id: HostId, change: impl FnOnce(&mut Host)) {
        if let Some(host) = self.core.borrow_mut().hosts.get_mut(&id) {
            change(host);
        }
    }

    /// Lets the processes of a host that was frozen go on.
    pub fn thaw(&self, id: HostId) {
        let now = self.now();
        self.change_host(id, |host| {
            host.frozen = false;
            host.suspended_ns += host.suspended_since.take().map_or(0, |since| now - since);
        });
        for process in self.processes_on(id) {
            self.resume(process);
        }
    }

    pub fn is_up(&self, id: HostId) -> bool {
        self.core.borrow().hosts.get(&id).is_some_and(|host| host.up)
    }

    pub fn is_frozen(&self, id: HostId) -> bool {
        self.core.borrow().hosts.get(&id).is_some_and(|host| host.frozen)
    }

    /// CLOCK_BOOTTIME of a host: it counts suspension.
    pub fn boottime(&self, id: HostId) -> Nanos {
        let core = self.core.borrow();
        let Some(host) = core.hosts.get(&id) else { return 0 };
        scaled(self.now().saturating_sub(host.booted_at), host.drift_ppm) + SECOND
    }

    /// CLOCK_MONOTONIC_RAW of a host: it does not.
    pub fn monotonic(&self, id: HostId) -> Nanos {
        let core = self.core.borrow();
        let Some(host) = core.hosts.get(&id) else { return 0 };
        // What is counted stands still together with the host.
        let until = host.suspended_since.unwrap_or(self.now());
        let counted = until.saturating_sub(host.booted_at).saturating_sub(host.suspended_ns);
        scaled(counted, host.drift_ppm) + SECOND
    }

    /// The wall clock of a host, milliseconds since 1970.
    pub fn wall_ms(&self, id: HostId) -> u64 {
        let ahead = self.core.borrow().hosts.get(&id).map_or(0, |host| host.wall_ahead_ms);
        (1_700_000_000_000 + self.now() / MS).saturating_add_signed(ahead)
    }

    /// Waits for a time by the clock of a host.
    pub fn sleep(&self, host: HostId, duration: Nanos) -> Sleep {
        let drift = self.core.borrow().hosts.get(&host).map_or(0, |host| host.drift_ppm);
        let until = self.now().saturating_add(scaled(duration, -drift));
        Sleep { kernel: self.clone(), until, timer: None }
    }
}

impl Core {
    fn is_standing(&self, id: ProcId) -> bool {
        let Some(process) = self.processes.get(&id) else { return false };
        process.paused || self.hosts.get(&process.host).is_some_and(|host| host.frozen)
    }
}

/// A duration as a clock that drifts shows it.
pub fn scaled(duration: Nanos, ppm: i64) -> Nanos {
    let more = i128::from(duration) * i128::from(ppm) / 1_000_000;
    u64::try_from(i128::from(duration) + more).unwrap_or(duration)
}

/// See [`Kernel::sleep`].
pub struct Sleep {
    kernel: Kernel,
    until: Nanos,
    timer: Option<(Nanos, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.kernel.now() >= self.until {
            return Poll::Ready(());
        }
        if self.timer.is_none() {
            let task = self.kernel.current();
            let job: Job = Box::new(move |kernel| kernel.wake(task));
            self.timer = Some(self.kernel.push(self.until, Event::Run(job)));
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer.take() {
            self.kernel.cancel(timer);
        }
    }
}
