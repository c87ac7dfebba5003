//! The shared storage: locks, claims, disks and state files, as one kernel or an NFSv4 server has them.
//!
//! Each host sends its operations in order, and each takes its time. What differs:
//!
//! | | one kernel | network |
//! |---|---|---|
//! | a host is cut off | cannot be | its operations wait (a `hard` mount), and come late |
//! | a process ends | its locks are free | after its operations have gone through |
//! | a host loses power | as if its processes ended | what it had not sent is gone, what was on its way may be torn; its locks stay |
//! | a lock's holder is silent for longer than the lease | keeps it | keeps it until somebody asks for it, then it is revoked |
//! | a revoked holder comes back | | its operations fail, however late they arrive |
//!
//! The server applies a write only under a lock that stands. It tells the oracle of each one.

mod heartbeats;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use bellwether_agent_core::Pulse;
use bellwether_types::{BootId, Epoch, NodeId, VmId};

use crate::kernel::{HostId, Kernel, MS, Nanos, ProcId, SECOND};
use crate::rng::Rng;
use crate::sync::Promise;

/// What kind of storage a cluster has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StorageKind {
    /// All nodes are on one kernel, as in the demonstration.
    OneKernel,
    /// An NFSv4 server with this lease.
    Network { lease_ms: u64 },
}

/// Why an operation failed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum IoError {
    NotFound,
    Full,
    Eio,
}

/// A write that the guest's disk takes: the record, and by whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskRecord {
    pub number: u64,
    pub epoch: Epoch,
    pub by: ProcId,
}

/// A state file. The guest's memory is how far it has counted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StateFile {
    pub vm: VmId,
    pub epoch: Epoch,
    pub hash: [u8; 32],
    pub counter: u64,
}

#[derive(Clone, Debug)]
struct Lock {
    process: ProcId,
    host: HostId,
    boot: BootId,
    stamp: u64,
}

type Job = Box<dyn FnOnce(&mut Server)>;

struct Waiting {
    job: Job,
    /// What a power cut leaves of it: the first part of a write.
    torn: Option<Job>,
}

/// What the server has.
pub struct Server {
    kind: StorageKind,
    locks: BTreeMap<String, Lock>,
    next_stamp: u64,
    pub claims: BTreeMap<String, Vec<u8>>,
    pub disks: BTreeMap<String, Vec<DiskRecord>>,
    pub states: BTreeMap<String, StateFile>,
    /// State files that were written and not flushed yet, and by whom.
    unsynced: BTreeMap<String, HostId>,
    heartbeats: BTreeMap<NodeId, Option<Pulse>>,
    /// When the highest pulse in the heartbeats of all but this node has risen last.
    pub pulse_rose: BTreeMap<NodeId, Nanos>,
    pub full: bool,
    pub failing: bool,
    /// Since when a host has not been able to renew its lease.
    silent_since: BTreeMap<HostId, Nanos>,
    /// The boot that last spoke, per host: a new one ends what the old one held.
    boots: BTreeMap<HostId, BootId>,
    expelled: BTreeSet<ProcId>,
    /// Writes that were applied, and the highest record before each, until the oracle takes them.
    pub applied: Vec<(String, DiskRecord, u64)>,
    pub revoked: u64,
    pub late_refused: u64,
    pub torn: u64,
}

struct State {
    rng: Rng,
    server: Server,
    cut: BTreeSet<HostId>,
    queues: BTreeMap<HostId, VecDeque<Waiting>>,
    busy_until: BTreeMap<HostId, Nanos>,
}

/// The storage; clones are the same one.
#[derive(Clone)]
pub struct Storage {
    kernel: Kernel,
    state: Rc<RefCell<State>>,
}

impl Storage {
    pub fn new(kernel: &Kernel, seed: u64, kind: StorageKind) -> Self {
        let server = Server {
            kind,
            locks: BTreeMap::new(),
            next_stamp: 0,
            claims: BTreeMap::new(),
            disks: BTreeMap::new(),
            states: BTreeMap::new(),
            unsynced: BTreeMap::new(),
            heartbeats: BTreeMap::new(),
            pulse_rose: BTreeMap::new(),
            full: false,
            failing: false,
            silent_since: BTreeMap::new(),
            boots: BTreeMap::new(),
            expelled: BTreeSet::new(),
            applied: Vec::new(),
            revoked: 0,
            late_refused: 0,
            torn: 0,
        };
        let state = State {
            rng: Rng::of(seed, "storage"),
            server,
            cut: BTreeSet::new(),
            queues: BTreeMap::new(),
            busy_until: BTreeMap::new(),
        };
        Self { kernel: kernel.clone(), state: Rc::new(RefCell::new(state)) }
    }

    pub fn clear(&self) {
        let queues = std::mem::take(&mut self.state.borrow_mut().queues);
        drop(queues);
    }

    /// Looks at or changes the server from outside the world.
    pub fn server<T>(&self, look: impl FnOnce(&mut Server) -> T) -> T {
        look(&mut self.state.borrow_mut().server)
    }

    pub fn kind(&self) -> StorageKind {
        self.state.borrow().server.kind
    }

    fn is_network(&self) -> bool {
        self.kind() != StorageKind::OneKernel
    }

    // --- faults ---

    pub fn cut(&self, host: HostId) {
        if self.is_network() {
            self.state.borrow_mut().cut.insert(host);
            self.silence(host);
        }
    }

    pub fn mend(&self, host: HostId) {
        self.state.borrow_mut().cut.remove(&host);
        self.speak(host);
    }

    /// The host cannot renew from now on.
    pub fn silence(&self, host: HostId) {
        let now = self.kernel.now();
        self.state.borrow_mut().server.silent_since.entry(host).or_insert(now);
    }

    /// It can again, if nothing else keeps it from that; what waits goes on its way.
    pub fn speak(&self, host: HostId) {
        if self.is_mute(host) {
            return;
        }
        self.state.borrow_mut().server.silent_since.remove(&host);
        self.pump(host);
    }

    /// A host that has booted mounts the storage: an NFS server hears of its new boot.
    pub fn mount(&self, host: HostId, boot: BootId) {
        self.speak(host);
        self.submit(host, Box::new(move |server| server.greet(host, boot)), None);
    }

    fn is_mute(&self, host: HostId) -> bool {
        let cut = self.state.borrow().cut.contains(&host);
        self.is_network() && (cut || self.kernel.is_frozen(host) || !self.kernel.is_up(host))
    }

    /// A host has lost power, its processes are gone.
    pub fn power_lost(&self, host: HostId, processes: &[ProcId]) {
        if !self.is_network() {
            for process in processes {
                self.unlock_all(host, *process, |_| {});
            }
            return;
        }
        self.silence(host);
        let mut state = self.state.borrow_mut();
        let mut queue = state.queues.remove(&host).unwrap_or_default();
        // What was on its way arrives whole, in part, or not at all; the rest never left.
        let first = queue.pop_front();
        let fate = state.rng.below(3);
        let server = &mut state.server;
        match (first, fate) {
            (Some(waiting), 0) => (waiting.job)(server),
            (Some(Waiting { torn: Some(torn), .. }), 1) => {
                torn(server);
                server.torn += 1;
            }
            (Some(_), _) => server.torn += 1,
            (None, _) => {}
        }
        state.server.lose_unsynced(host);
        drop(state);
        drop(queue);
    }

    // --- operations ---

    /// Sends an operation. It is applied in the order of its host, at some later time or never.
    fn submit(&self, host: HostId, job: Job, torn: Option<Job>) {
        let mut state = self.state.borrow_mut();
        state.queues.entry(host).or_default().push_back(Waiting { job, torn });
        let alone = state.queues.get(&host).is_some_and(|queue| queue.len() == 1);
        drop(state);
        if alone {
            self.pump(host);
        }
    }

    /// Lets the next operation of a host arrive after its time.
    fn pump(&self, host: HostId) {
        let mut state = self.state.borrow_mut();
        if state.queues.get(&host).is_none_or(VecDeque::is_empty) {
            return;
        }
        let now = self.kernel.now();
        if state.busy_until.get(&host).is_some_and(|until| *until > now) {
            return;
        }
        let takes = match state.server.kind {
            StorageKind::OneKernel => state.rng.within(5_000, 300_000),
            StorageKind::Network { .. } => state.rng.within(200_000, 3 * MS),
        };
        state.busy_until.insert(host, now + takes);
        drop(state);
        let storage = self.clone();
        self.kernel.after(takes, move |_| storage.arrive(host));
    }

    fn arrive(&self, host: HostId) {
        if self.is_mute(host) {
            return;
        }
        let mut state = self.state.borrow_mut();
        let waiting = state.queues.get_mut(&host).and_then(VecDeque::pop_front);
        if let Some(waiting) = waiting {
            (waiting.job)(&mut state.server);
        }
        drop(state);
        self.pump(host);
    }

    /// An operation whose caller waits for its result.
    async fn ask<T: 'static>(
        &self,
        host: HostId,
        work: impl FnOnce(&mut Server) -> T + 'static,
    ) -> T {
        let promise = Promise::new(&self.kernel);
        let answer = promise.clone();
        self.submit(host, Box::new(move |server| answer.keep(work(server))), None);
        promise.wait().await
    }

    /// Tries to lock a file, once. The stamp of the lock, or none if somebody holds it.
    pub async fn lock(&self, process: ProcId, path: String) -> Result<Option<u64>, IoError> {
        let host = self.kernel.host_of(process).unwrap_or_default();
        let boot = self
            .kernel
            .host(host)
            .map(|it| it.boot_id)
            .unwrap_or(BootId::from_uuid(uuid::Uuid::nil()));
        let kernel = self.kernel.clone();
        self.ask(host, move |server| {
            // A process that was killed meanwhile holds nothing.
            if !kernel.lives(process) {
                return Ok(None);
            }
            server.lock(kernel.now(), path, Lock { process, host, boot, stamp: 0 })
        })
        .await
    }

    /// Whether the storage answers at all.
    pub async fn look(&self, host: HostId) -> Result<(), IoError> {
        self.ask(host, |server| server.check()).await
    }

    pub async fn read_claim(&self, host: HostId, path: String) -> Result<Vec<u8>, IoError> {
        self.ask(host, move |server| {
            server.check()?;
            server.claims.get(&path).cloned().ok_or(IoError::NotFound)
        })
        .await
    }

    /// Makes a claim file, whole, unless there is one.
    pub async fn create_claim(
        &self,
        host: HostId,
        path: String,
        bytes: Vec<u8>,
    ) -> Result<(), IoError> {
        self.ask(host, move |server| {
            server.check_space()?;
            server.claims.entry(path).or_insert(bytes);
            Ok(())
        })
        .await
    }

    pub async fn remove_claim(&self, host: HostId, path: String) -> Result<(), IoError> {
        self.ask(host, move |server| {
            server.check()?;
            server.claims.remove(&path);
            server.locks.remove(&path);
            Ok(())
        })
        .await
    }

    /// Writes into a claim file under its lock; durable when this returns.
    pub async fn write_claim(
        &self,
        host: HostId,
        at: (String, u64),
        offset: usize,
        bytes: Vec<u8>,
    ) -> Result<(), IoError> {
        let promise = Promise::new(&self.kernel);
        let (answer, (path, stamp)) = (promise.clone(), at);
        let (torn_path, part) = (path.clone(), bytes[..bytes.len() / 2].to_vec());
        let whole = move |server: &mut Server| {
            answer.keep(server.check_space().and_then(|()| {
                server.check_lock(&path, stamp)?;
                server.patch(&path, offset, &bytes)
            }));
        };
        let torn = move |server: &mut Server| {
            let _power_is_gone = server.patch(&torn_path, offset, &part);
        };
        self.submit(host, Box::new(whole), Some(Box::new(torn)));
        promise.wait().await
    }

    /// The highest record on a disk.
    pub async fn read_disk(&self, host: HostId, path: String) -> Result<u64, IoError> {
        self.ask(host, move |server| {
            server.check()?;
            Ok(server.top(&path))
        })
        .await
    }

    /// Writes a record; once in a while the network brings it a second time, much later, but no later
    /// than `under_way`.
    pub async fn write_disk(
        &self,
        host: HostId,
        at: (String, u64),
        record: DiskRecord,
        under_way: Nanos,
    ) -> Result<(), IoError> {
        let again = self.is_network() && self.state.borrow_mut().rng.permille(20);
        if again && !self.is_mute(host) {
            let (storage, (path, stamp)) = (self.clone(), at.clone());
            let late = self.state.borrow_mut().rng.below(20 * SECOND).min(under_way);
            self.kernel.after(late, move |_| {
                let mut state = storage.state.borrow_mut();
                let _refused = state.server.write_disk(path, stamp, record);
            });
        }
        let (path, stamp) = at;
        self.ask(host, move |server| server.write_disk(path, stamp, record)).await
    }

    /// Writes a state file under its name; it is durable when it was flushed.
    pub async fn write_state(
        &self,
        host: HostId,
        path: String,
        file: StateFile,
    ) -> Result<(), IoError> {
        self.ask(host, move |server| {
            server.check_space()?;
            server.unsynced.insert(path.clone(), host);
            server.states.insert(path, file);
            Ok(())
        })
        .await
    }

    pub async fn sync_state(&self, host: HostId, path: String) -> Result<(), IoError> {
        self.ask(host, move |server| {
            server.check_space()?;
            server.unsynced.remove(&path);
            Ok(())
        })
        .await
    }

    pub async fn read_state(&self, host: HostId, path: String) -> Result<StateFile, IoError> {
        self.ask(host, move |server| {
            server.check()?;
            server.states.get(&path).cloned().ok_or(IoError::NotFound)
        })
        .await
    }

    pub async fn remove_state(&self, host: HostId, path: String) -> Result<bool, IoError> {
        self.ask(host, move |server| {
            server.check()?;
            Ok(server.states.remove(&path).is_some())
        })
        .await
    }

    pub async fn list_states(
        &self,
        host: HostId,
        vm: VmId,
    ) -> Result<Vec<(String, Epoch)>, IoError> {
        self.ask(host, move |server| {
            server.check()?;
            let of_vm = server.states.iter().filter(|(_, file)| file.vm == vm);
            Ok(of_vm.map(|(path, file)| (path.clone(), file.epoch)).collect())
        })
        .await
    }

    /// Lets all locks of a process go, after everything that its host has sent before.
    pub fn unlock_all(&self, host: HostId, process: ProcId, then: impl FnOnce(&Kernel) + 'static) {
        let kernel = self.kernel.clone();
        let job = move |server: &mut Server| {
            server.locks.retain(|_, lock| lock.process != process);
            kernel.after(0, then);
        };
        self.submit(host, Box::new(job), None);
    }
}

impl Server {
    fn check(&self) -> Result<(), IoError> {
        if self.failing { Err(IoError::Eio) } else { Ok(()) }
    }

    /// Of what a host had not flushed a power cut leaves a name and nothing that can be loaded.
    fn lose_unsynced(&mut self, host: HostId) {
        let lost = self.unsynced.iter().filter(|(_, by)| **by == host);
        for path in lost.map(|(path, _)| path) {
            if let Some(file) = self.states.get_mut(path) {
                file.hash = [0; 32];
                self.torn += 1;
            }
        }
        self.unsynced.retain(|_, by| *by != host);
    }

    fn check_space(&self) -> Result<(), IoError> {
        self.check()?;
        if self.full { Err(IoError::Full) } else { Ok(()) }
    }

    fn check_lock(&self, path: &str, stamp: u64) -> Result<(), IoError> {
        match self.locks.get(path).is_some_and(|lock| lock.stamp == stamp) {
            true => Ok(()),
            false => Err(IoError::Eio),
        }
    }

    fn lock(&mut self, now: Nanos, path: String, ours: Lock) -> Result<Option<u64>, IoError> {
        self.check()?;
        self.greet(ours.host, ours.boot);
        if let Some(held) = self.locks.get(&path) {
            if held.process == ours.process {
                return Ok(Some(held.stamp));
            }
            if !self.has_expired(now, held.host) {
                return Ok(None);
            }
            self.expel(held.host);
        }
        self.next_stamp += 1;
        let stamp = self.next_stamp;
        self.locks.insert(path, Lock { stamp, ..ours });
        Ok(Some(stamp))
    }

    /// A host that comes back in another boot has given up what it held.
    fn greet(&mut self, host: HostId, boot: BootId) {
        let before = self.boots.insert(host, boot);
        if self.kind != StorageKind::OneKernel && before.is_some_and(|before| before != boot) {
            self.locks.retain(|_, lock| lock.host != host || lock.boot == boot);
        }
    }

    fn has_expired(&self, now: Nanos, host: HostId) -> bool {
        let StorageKind::Network { lease_ms } = self.kind else { return false };
        self.silent_since.get(&host).is_some_and(|since| now - since > lease_ms * MS)
    }

    /// The server gives up everything that a silent client held.
    fn expel(&mut self, host: HostId) {
        let lost = self.locks.values().filter(|lock| lock.host == host);
        self.expelled.extend(lost.map(|lock| lock.process));
        self.locks.retain(|_, lock| lock.host != host);
        self.revoked += 1;
    }

    /// The highest record on a disk.
    pub fn top_of(&self, path: &str) -> u64 {
        self.top(path)
    }

    /// Whether the server took a process' locks away from it.
    pub fn was_expelled(&self, process: ProcId) -> bool {
        self.expelled.contains(&process)
    }

    fn top(&self, path: &str) -> u64 {
        self.disks.get(path).and_then(|disk| disk.last()).map_or(0, |record| record.number)
    }

    fn patch(&mut self, path: &str, offset: usize, bytes: &[u8]) -> Result<(), IoError> {
        let file = self.claims.get_mut(path).ok_or(IoError::NotFound)?;
        let place = file.get_mut(offset..offset + bytes.len()).ok_or(IoError::Eio)?;
        place.copy_from_slice(bytes);
        Ok(())
    }

    fn write_disk(&mut self, path: String, stamp: u64, record: DiskRecord) -> Result<(), IoError> {
        self.check_space()?;
        self.check_lock(&path, stamp).inspect_err(|_| self.late_refused += 1)?;
        let top = self.top(&path);
        let disk = self.disks.entry(path.clone()).or_default();
        // The same block again.
        if disk.iter().rev().take(128).any(|known| *known == record) {
            return Ok(());
        }
        disk.push(record);
        self.applied.push((path, record, top));
        Ok(())
    }

    /// Whether a process holds a lock that the server still honours.
    pub fn holds(&self, process: ProcId, path: &str) -> bool {
        self.locks.get(path).is_some_and(|lock| lock.process == process)
    }

    pub fn is_locked(&self, path: &str) -> bool {
        self.locks.contains_key(path)
    }
}
