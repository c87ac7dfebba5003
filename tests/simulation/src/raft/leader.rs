//! The leader's part: replication, commitment, proposals, and the question whether it still leads.

use std::rc::Rc;

use bellwether_core::{Command, Outcome};

use super::{Applied, CONFIRM_MAX, Entry, Message, PROPOSE_MAX, ProposeError, Raft, Role};
use crate::sync::{Promise, within};

impl Raft {
    pub(super) fn replicate(&self) {
        self.core.borrow_mut().round += 1;
        self.peers.iter().for_each(|peer| self.replicate_to(*peer));
    }

    pub(super) fn replicate_to(&self, peer: u64) {
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
    pub(super) fn advance_commit(&self) {
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

    pub(super) fn commit_to(&self, index: u64) {
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
    pub async fn propose(
        &self,
        command: Command,
        by: Option<u64>,
    ) -> Result<(Outcome, u64), ProposeError> {
        let promise = {
            let mut core = self.core.borrow_mut();
            if core.role != Role::Leader {
                return Err(ProposeError::NotLeader);
            }
            let term = core.image.term;
            core.image.log.push(Entry { term, command: Some(Rc::new(command)), by });
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
