//! Consensus, modelled: the replicated log that the real core is applied from.
//!
//! This is the exact mode: a small Raft (Ongaro and Ousterhout 2014, with read index) on virtual time,
//! so that one seed is one run. It keeps what the core relies upon and no more: terms, elections,
//! commitment by a quorum of *synced* logs, a leader that goes on to believe it leads until it hears
//! of another, replay after a restart, and snapshots that serialize the real `State`. Membership is
//! fixed. openraft itself, which the product runs, is tested by its own suite on our store, and is not
//! in here.
//!
//! ```text
//!   follower --timeout--> candidate --quorum--> leader (its first entry is empty)
//!      ^                      |                    |
//!      +----- higher term ----+---------------------+
//! ```
//!
//! Nothing is sent that rests on something that is not synced: votes, acknowledgements, the leader's
//! own share of a quorum. A power cut takes everything that was not.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bellwether_core::{Command, Outcome, State};

use crate::kernel::{HostId, Kernel, MS, Nanos, ProcId};
use crate::net::{Address, Net};
use crate::rng::Rng;
use crate::sync::{Promise, Signal, within};
use crate::wire::Request;

const HEARTBEAT: Nanos = 200 * MS;
const ELECTION_MIN: Nanos = 1_000 * MS;
const ELECTION_MAX: Nanos = 2_000 * MS;
const PROPOSE_MAX: Nanos = 10_000 * MS;
const CONFIRM_MAX: Nanos = 2_000 * MS;
/// A snapshot is taken when the log has so many entries.
const SNAPSHOT_ENTRIES: usize = 96;

/// One entry; the first of each leadership is empty.
#[derive(Clone, PartialEq, Debug)]
pub struct Entry {
    pub term: u64,
    pub command: Option<Rc<Command>>,
}

/// A state that covers the log up to an index.
#[derive(Clone, Debug)]
pub struct Snapshot {
    index: u64,
    term: u64,
    image: Rc<[u8]>,
}

#[derive(Clone, Debug)]
pub enum Message {
    Vote {
        from: u64,
        term: u64,
        last: (u64, u64),
    },
    Voted {
        from: u64,
        term: u64,
        granted: bool,
    },
    Append {
        from: u64,
        term: u64,
        previous: (u64, u64),
        entries: Vec<Entry>,
        commit: u64,
        round: u64,
    },
    Appended {
        from: u64,
        term: u64,
        matched: Option<u64>,
        hint: u64,
        round: u64,
    },
    Install {
        from: u64,
        term: u64,
        snapshot: Snapshot,
        round: u64,
    },
}

/// What is on a controller's disk; it outlives the process.
#[derive(Clone, Debug, Default)]
pub struct Image {
    term: u64,
    voted: Option<u64>,
    snapshot: Option<Snapshot>,
    log: Vec<Entry>,
}

/// The disk of one controller.
#[derive(Debug, Default)]
pub struct Disk {
    synced: Image,
    /// Commits that are under way, the oldest first.
    under_way: BTreeMap<u64, Image>,
    next: u64,
    busy_until: Nanos,
}

impl Disk {
    /// The process has ended: a commit under way may have come through.
    pub fn crash(&mut self, rng: &mut Rng) {
        for (_, image) in std::mem::take(&mut self.under_way) {
            if rng.below(2) == 0 {
                break;
            }
            self.synced = image;
        }
    }
}

/// What became of a proposal, and where in the log it stands.
type Proposed = Result<(Outcome, u64), ProposeError>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Follower,
    Candidate,
    Leader,
}

/// Why a proposal has no outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProposeError {
    /// Nothing was done.
    NotLeader,
    Unknown,
}

struct Core {
    role: Role,
    leader: Option<u64>,
    image: Image,
    /// The last index that the own disk has.
    synced: u64,
    commit: u64,
    applied: u64,
    state: Rc<State>,
    /// By index: the term of the proposal, and who waits for its outcome.
    waiting: BTreeMap<u64, (u64, Promise<Proposed>)>,
    votes: BTreeSet<u64>,
    next: BTreeMap<u64, u64>,
    matched: BTreeMap<u64, u64>,
    /// Heartbeat rounds, and the last that each peer has answered.
    round: u64,
    answered: BTreeMap<u64, u64>,
    first_of_term: u64,
    heard_at: Nanos,
    patience: Nanos,
    beat_at: Nanos,
}

/// What is told of each entry that is applied somewhere.
pub type Witness = Rc<dyn Fn(&Applied<'_>)>;

/// An entry that one controller has applied.
pub struct Applied<'a> {
    pub controller: u64,
    pub index: u64,
    pub entry: &'a Entry,
    pub after: &'a State,
    pub outcome: &'a Outcome,
}

/// One controller's Raft; clones are the same one.
#[derive(Clone)]
pub struct Raft {
    kernel: Kernel,
    net: Net,
    process: ProcId,
    me: u64,
    peers: Rc<Vec<u64>>,
    disk: Rc<RefCell<Disk>>,
    core: Rc<RefCell<Core>>,
    rng: Rc<RefCell<Rng>>,
    /// Changes with every change of the state, the role, the term, and every answer.
    pub changed: Signal,
    witness: Witness,
    /// How often it has taken a snapshot, and installed one.
    pub snapshots: Rc<Cell<(u64, u64)>>,
}

/// What one controller's Raft is made of.
pub struct Parts {
    pub process: ProcId,
    pub me: u64,
    pub all: Vec<u64>,
    pub disk: Rc<RefCell<Disk>>,
    pub rng: Rng,
    pub witness: Witness,
}

impl Raft {
    /// Starts from what the disk has.
    pub fn start(kernel: &Kernel, net: &Net, parts: Parts) -> Self {
        let image = parts.disk.borrow().synced.clone();
        let base = image.snapshot.clone();
        let state = match &base {
            Some(snapshot) => decode(&snapshot.image),
            None => State::default(),
        };
        let index = base.map_or(0, |snapshot| snapshot.index);
        let core = Core {
            role: Role::Follower,
            leader: None,
            synced: index + image.log.len() as u64,
            image,
            commit: index,
            applied: index,
            state: Rc::new(state),
            waiting: BTreeMap::new(),
            votes: BTreeSet::new(),
            next: BTreeMap::new(),
            matched: BTreeMap::new(),
            round: 0,
            answered: BTreeMap::new(),
            first_of_term: 0,
            heard_at: kernel.now(),
            patience: 0,
            beat_at: 0,
        };
        let raft = Self {
            kernel: kernel.clone(),
            net: net.clone(),
            process: parts.process,
            me: parts.me,
            peers: Rc::new(parts.all.into_iter().filter(|id| *id != parts.me).collect()),
            disk: parts.disk,
            core: Rc::new(RefCell::new(core)),
            rng: Rc::new(RefCell::new(parts.rng)),
            changed: Signal::new(kernel),
            witness: parts.witness,
            snapshots: Rc::default(),
        };
        raft.be_patient();
        raft
    }

    pub fn state(&self) -> Rc<State> {
        Rc::clone(&self.core.borrow().state)
    }

    pub fn term(&self) -> u64 {
        self.core.borrow().image.term
    }

    pub fn is_leader(&self) -> bool {
        self.core.borrow().role == Role::Leader
    }

    pub fn leader(&self) -> Option<u64> {
        self.core.borrow().leader
    }

    fn host(&self) -> HostId {
        HostId(self.me)
    }

    fn quorum(&self) -> usize {
        self.peers.len().div_ceil(2) + 1
    }

    fn be_patient(&self) {
        let patience = self.rng.borrow_mut().within(ELECTION_MIN, ELECTION_MAX);
        let mut core = self.core.borrow_mut();
        core.heard_at = self.kernel.boottime(self.host());
        core.patience = patience;
    }

    /// Runs elections and heartbeats; the only task that looks at the clock.
    pub async fn tick(self) {
        loop {
            self.kernel.sleep(self.host(), HEARTBEAT / 4).await;
            let now = self.kernel.boottime(self.host());
            let (role, late, beat) = {
                let core = self.core.borrow();
                (core.role, now.saturating_sub(core.heard_at) > core.patience, now >= core.beat_at)
            };
            match role {
                Role::Leader if beat => {
                    self.core.borrow_mut().beat_at = now + HEARTBEAT;
                    self.replicate();
                }
                Role::Follower | Role::Candidate if late => self.stand(),
                _ => {}
            }
        }
    }

    fn send(&self, to: u64, message: Message) {
        self.net.send(self.host(), Address::Controller(to), Request::Raft(message));
    }

    // --- disk ---

    /// Syncs what is in memory, and then does what rests upon it.
    fn persist(&self, then: impl FnOnce(&Raft) + 'static) {
        let (at, number) = {
            let image = self.core.borrow().image.clone();
            let takes = self.rng.borrow_mut().within(MS / 2, 5 * MS);
            let mut disk = self.disk.borrow_mut();
            disk.next += 1;
            disk.busy_until = disk.busy_until.max(self.kernel.now()) + takes;
            let number = disk.next;
            disk.under_way.insert(number, image);
            (disk.busy_until, number)
        };
        let raft = self.clone();
        self.kernel.at(at, move |kernel| {
            // Whatever the dead process had under way has been decided at its death.
            if !kernel.lives(raft.process) {
                return;
            }
            let mut disk = raft.disk.borrow_mut();
            let Some(image) = disk.under_way.remove(&number) else { return };
            let end = image.snapshot.as_ref().map_or(0, |it| it.index) + image.log.len() as u64;
            disk.synced = image;
            drop(disk);
            raft.core.borrow_mut().synced = end;
            // The disk works on while the process stands still; the program does not.
            let process = raft.process;
            kernel.spawn(process, async move { then(&raft) });
        });
    }

    // --- elections ---

    fn stand(&self) {
        self.be_patient();
        let (term, last) = {
            let mut core = self.core.borrow_mut();
            core.role = Role::Candidate;
            core.leader = None;
            core.image.term += 1;
            core.image.voted = Some(self.me);
            core.votes = BTreeSet::from([self.me]);
            (core.image.term, core.last())
        };
        self.lose_waiting();
        self.changed.notify();
        self.persist(move |raft| {
            let candidate = raft.core.borrow().is(Role::Candidate, term);
            if candidate {
                let vote = Message::Vote { from: raft.me, term, last };
                raft.peers.iter().for_each(|peer| raft.send(*peer, vote.clone()));
                raft.count_votes();
            }
        });
    }

    fn count_votes(&self) {
        let won = {
            let core = self.core.borrow();
            core.role == Role::Candidate && core.votes.len() >= self.quorum()
        };
        if won {
            self.lead();
        }
    }

    fn lead(&self) {
        let mut core = self.core.borrow_mut();
        core.role = Role::Leader;
        core.leader = Some(self.me);
        let next = core.last().0 + 1;
        core.next = self.peers.iter().map(|peer| (*peer, next)).collect();
        core.matched = self.peers.iter().map(|peer| (*peer, 0)).collect();
        core.answered.clear();
        core.first_of_term = next;
        let term = core.image.term;
        core.image.log.push(Entry { term, command: None });
        drop(core);
        self.changed.notify();
        self.persist(|raft| raft.advance_commit());
        self.replicate();
    }

    /// Somebody has a higher term: whoever we were, we follow.
    fn step_down(&self, term: u64) {
        let mut core = self.core.borrow_mut();
        core.image.term = term;
        core.image.voted = None;
        core.role = Role::Follower;
        core.leader = None;
        drop(core);
        self.lose_waiting();
        self.changed.notify();
    }

    /// A leader that is deposed cannot say what becomes of its proposals.
    fn lose_waiting(&self) {
        let waiting = std::mem::take(&mut self.core.borrow_mut().waiting);
        waiting.into_values().for_each(|(_, promise)| promise.keep(Err(ProposeError::Unknown)));
    }

    // --- messages ---

    pub fn receive(&self, message: Message) {
        let term = message.term();
        if term > self.term() {
            self.step_down(term);
        }
        match message {
            Message::Vote { from, term, last } => self.vote(from, term, last),
            Message::Voted { from, term, granted } => {
                let mut core = self.core.borrow_mut();
                if granted && core.is(Role::Candidate, term) {
                    core.votes.insert(from);
                    drop(core);
                    self.count_votes();
                }
            }
            Message::Append { from, term, previous, entries, commit, round } => {
                self.append(from, term, Batch { previous, entries, commit, round });
            }
            Message::Appended { from, term, matched, hint, round } => {
                self.appended(from, term, matched, hint, round);
            }
            Message::Install { from, term, snapshot, round } => {
                self.install(from, term, snapshot, round);
            }
        }
    }

    fn vote(&self, from: u64, term: u64, last: (u64, u64)) {
        let mut core = self.core.borrow_mut();
        let own = core.last();
        let fresh = (last.1, last.0) >= (own.1, own.0);
        let free = core.image.voted.is_none_or(|voted| voted == from);
        let granted = term == core.image.term && core.role == Role::Follower && free && fresh;
        if granted {
            core.image.voted = Some(from);
        }
        let term = core.image.term;
        drop(core);
        if granted {
            self.be_patient();
        }
        self.persist(move |raft| {
            raft.send(from, Message::Voted { from: raft.me, term, granted });
        });
    }

    fn append(&self, from: u64, term: u64, batch: Batch) {
        let me = self.me;
        let current = self.term();
        if term < current {
            let hint = 0;
            return self.send(
                from,
                Message::Appended { from: me, term: current, matched: None, hint, round: 0 },
            );
        }
        self.follow(from);
        let round = batch.round;
        let mut core = self.core.borrow_mut();
        let Some((matched, changed)) = core.take(&batch) else {
            let hint = core.last().0.min(batch.previous.0.saturating_sub(1));
            drop(core);
            return self
                .send(from, Message::Appended { from: me, term, matched: None, hint, round });
        };
        let commit = batch.commit.min(matched);
        drop(core);
        let acknowledge = move |raft: &Raft| {
            if raft.term() == term {
                raft.send(
                    from,
                    Message::Appended { from: me, term, matched: Some(matched), hint: 0, round },
                );
                raft.commit_to(commit);
            }
        };
        match changed {
            true => self.persist(acknowledge),
            false => acknowledge(self),
        }
    }

    fn follow(&self, leader: u64) {
        self.be_patient();
        let mut core = self.core.borrow_mut();
        core.role = Role::Follower;
        let news = core.leader.replace(leader) != Some(leader);
        drop(core);
        if news {
            self.changed.notify();
        }
    }

    fn appended(&self, from: u64, term: u64, matched: Option<u64>, hint: u64, round: u64) {
        let mut core = self.core.borrow_mut();
        if !core.is(Role::Leader, term) {
            return;
        }
        let answered = core.answered.entry(from).or_default();
        *answered = (*answered).max(round);
        match matched {
            Some(matched) => {
                let known = core.matched.entry(from).or_default();
                *known = (*known).max(matched);
                let next = *known + 1;
                core.next.insert(from, next);
            }
            None => {
                core.next.insert(from, hint + 1);
            }
        }
        let behind = core.next.get(&from).copied().unwrap_or(1) <= core.last().0;
        drop(core);
        self.advance_commit();
        self.changed.notify();
        if behind && matched.is_none() {
            self.replicate_to(from);
        }
    }

    fn install(&self, from: u64, term: u64, snapshot: Snapshot, round: u64) {
        if term < self.term() {
            return;
        }
        self.follow(from);
        let mut core = self.core.borrow_mut();
        let matched = snapshot.index;
        if snapshot.index > core.commit {
            core.state = Rc::new(decode(&snapshot.image));
            (core.commit, core.applied) = (snapshot.index, snapshot.index);
            core.image.log.clear();
            core.image.snapshot = Some(snapshot);
            let (taken, before) = self.snapshots.get();
            self.snapshots.set((taken, before + 1));
        }
        drop(core);
        self.changed.notify();
        self.persist(move |raft| {
            if raft.term() == term {
                let me = raft.me;
                raft.send(
                    from,
                    Message::Appended { from: me, term, matched: Some(matched), hint: 0, round },
                );
            }
        });
    }

    // --- the leader's part ---

    fn replicate(&self) {
        self.core.borrow_mut().round += 1;
        self.peers.iter().for_each(|peer| self.replicate_to(*peer));
    }

    fn replicate_to(&self, peer: u64) {
        let core = self.core.borrow();
        if core.role != Role::Leader {
            return;
        }
        let (from, term, round) = (self.me, core.image.term, core.round);
        let next = core.next.get(&peer).copied().unwrap_or(1).max(1);
        let message = match core.term_at(next - 1) {
            Some(previous) => {
                let entries = core.entries_from(next);
                let previous = (next - 1, previous);
                Message::Append { from, term, previous, entries, commit: core.commit, round }
            }
            None => match core.image.snapshot.clone() {
                Some(snapshot) => Message::Install { from, term, snapshot, round },
                None => return,
            },
        };
        drop(core);
        self.send(peer, message);
    }

    /// What a quorum has synced, in this term, is committed.
    fn advance_commit(&self) {
        let core = self.core.borrow();
        if core.role != Role::Leader {
            return;
        }
        let mut known: Vec<u64> = core.matched.values().copied().collect();
        known.push(core.synced.min(core.last().0));
        known.sort_unstable();
        let index = known[known.len() - self.quorum()];
        let fits = core.term_at(index) == Some(core.image.term);
        drop(core);
        if fits {
            self.commit_to(index);
        }
    }

    fn commit_to(&self, index: u64) {
        let mut core = self.core.borrow_mut();
        if index <= core.commit {
            return;
        }
        core.commit = index;
        while core.applied < core.commit {
            let index = core.applied + 1;
            let Some(entry) = core.entry(index).cloned() else { break };
            core.applied = index;
            let outcome = match &entry.command {
                Some(command) => Rc::make_mut(&mut core.state).apply((**command).clone()),
                None => Outcome::Unchanged,
            };
            let after = Rc::clone(&core.state);
            let waiting = core.waiting.remove(&index);
            drop(core);
            (self.witness)(&Applied {
                controller: self.me,
                index,
                entry: &entry,
                after: &after,
                outcome: &outcome,
            });
            if let Some((term, promise)) = waiting {
                promise.keep(match term == entry.term {
                    true => Ok((outcome, index)),
                    false => Err(ProposeError::Unknown),
                });
            }
            core = self.core.borrow_mut();
        }
        let taken = u64::from(core.compact());
        drop(core);
        let (before, installed) = self.snapshots.get();
        self.snapshots.set((before + taken, installed));
        self.changed.notify();
    }

    /// Commits a command. If nobody says what became of it, it may still be committed.
    pub async fn propose(&self, command: Command) -> Result<(Outcome, u64), ProposeError> {
        let promise = {
            let mut core = self.core.borrow_mut();
            if core.role != Role::Leader {
                return Err(ProposeError::NotLeader);
            }
            let term = core.image.term;
            core.image.log.push(Entry { term, command: Some(Rc::new(command)) });
            let promise = Promise::new(&self.kernel);
            let index = core.last().0;
            core.waiting.insert(index, (term, promise.clone()));
            promise
        };
        self.persist(|raft| raft.advance_commit());
        self.replicate();
        let answer = within(&self.kernel, self.host(), PROPOSE_MAX, promise.wait()).await;
        answer.unwrap_or(Err(ProposeError::Unknown))
    }

    /// Asks a quorum, after this call began, whether this controller still leads, and waits until the
    /// state here is as new as the answer. The term names the leadership.
    pub async fn confirm(&self) -> Option<u64> {
        let (term, read, round) = {
            let core = self.core.borrow();
            if core.role != Role::Leader {
                return None;
            }
            (core.image.term, core.commit.max(core.first_of_term), core.round + 1)
        };
        self.replicate();
        let raft = self.clone();
        let confirmed = self.changed.until(move || {
            let core = raft.core.borrow();
            if !core.is(Role::Leader, term) {
                return Some(None);
            }
            let acks = core.answered.values().filter(|answered| **answered >= round).count();
            (acks + 1 >= raft.quorum() && core.applied >= read).then_some(Some(term))
        });
        within(&self.kernel, self.host(), CONFIRM_MAX, confirmed).await.flatten()
    }
}

impl Message {
    fn term(&self) -> u64 {
        match self {
            Self::Vote { term, .. }
            | Self::Voted { term, .. }
            | Self::Append { term, .. }
            | Self::Appended { term, .. }
            | Self::Install { term, .. } => *term,
        }
    }
}

struct Batch {
    previous: (u64, u64),
    entries: Vec<Entry>,
    commit: u64,
    round: u64,
}

impl Core {
    fn is(&self, role: Role, term: u64) -> bool {
        self.role == role && self.image.term == term
    }

    fn base(&self) -> (u64, u64) {
        self.image.snapshot.as_ref().map_or((0, 0), |snapshot| (snapshot.index, snapshot.term))
    }

    /// Index and term of the last entry.
    fn last(&self) -> (u64, u64) {
        let (base, base_term) = self.base();
        let term = self.image.log.last().map_or(base_term, |entry| entry.term);
        (base + self.image.log.len() as u64, term)
    }

    fn place(&self, index: u64) -> Option<usize> {
        usize::try_from(index.checked_sub(self.base().0 + 1)?).ok()
    }

    fn entry(&self, index: u64) -> Option<&Entry> {
        self.image.log.get(self.place(index)?)
    }

    fn term_at(&self, index: u64) -> Option<u64> {
        let (base, term) = self.base();
        match index == base {
            true => Some(term),
            false => self.entry(index).map(|entry| entry.term),
        }
    }

    fn entries_from(&self, index: u64) -> Vec<Entry> {
        let from = self.place(index).unwrap_or(0).min(self.image.log.len());
        self.image.log[from..].to_vec()
    }

    /// Takes entries in. Answers up to where the log now agrees, and whether it changed; nothing if
    /// it does not fit to what is here.
    fn take(&mut self, batch: &Batch) -> Option<(u64, bool)> {
        let (previous, term) = batch.previous;
        let base = self.base().0;
        // What a snapshot covers is committed, so it agrees.
        if previous >= base && self.term_at(previous) != Some(term) {
            return None;
        }
        let mut changed = false;
        for (index, entry) in (previous + 1..).zip(&batch.entries) {
            if index <= base {
                continue;
            }
            match self.term_at(index) {
                Some(term) if term == entry.term => {}
                known => {
                    if known.is_some() {
                        let keep = self.place(index).unwrap_or(0);
                        self.image.log.truncate(keep);
                    }
                    self.image.log.push(entry.clone());
                    changed = true;
                }
            }
        }
        Some(((previous + batch.entries.len() as u64).max(base), changed))
    }

    /// Replaces a long log by the state that it led to.
    fn compact(&mut self) -> bool {
        let base = self.base().0;
        let covered = usize::try_from(self.applied - base).unwrap_or(0);
        let term = self.term_at(self.applied).filter(|_| covered >= SNAPSHOT_ENTRIES);
        let Some(term) = term else { return false };
        let image: Rc<[u8]> = encode(&self.state).into();
        debug_assert_eq!(decode(&image), *self.state, "a snapshot must be the state");
        self.image.log.drain(..covered);
        self.image.snapshot = Some(Snapshot { index: self.applied, term, image });
        true
    }
}

fn encode(state: &State) -> Vec<u8> {
    match postcard::to_allocvec(state) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("a state that cannot be encoded: {error}"),
    }
}

fn decode(bytes: &[u8]) -> State {
    match postcard::from_bytes(bytes) {
        Ok(state) => state,
        Err(error) => unreachable!("a snapshot that cannot be read: {error}"),
    }
}
