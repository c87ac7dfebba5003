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

mod leader;
mod log;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bellwether_core::{Command, Outcome, State};
use log::{Batch, decode};

use crate::kernel::{HostId, Kernel, MS, Nanos, ProcId};
use crate::net::{Address, Net};
use crate::rng::Rng;
use crate::sync::{Promise, Signal};
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
    /// Whose operation it is; the product has no such field, it is for the oracle.
    pub by: Option<u64>,
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

    /// The last entry that the state here has applied.
    pub fn applied(&self) -> u64 {
        self.core.borrow().applied
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
        core.image.log.push(Entry { term, command: None, by: None });
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
