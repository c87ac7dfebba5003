//! How a message of an agent is taken in: a registration, or a request for the lease with a report.
//!
//! ```text
//!   unconfirmed --a quorum says that we lead--> confirmed --> noted --> heard --> settled
//!                                                  |            |         (commit: its watchdog)
//!                                                  |            (commit: registered, or online again)
//!                                                  \--> the node has to register first
//! ```
//!
//! A quorum has to say *after the message came in* that its receiver leads: only then is a grant
//! worth anything (protocol 1), and only then does a report count. The report is noted before the
//! node is committed as online: the planner must not find an online node that was never heard.
//!
//! Pure: the shell asks [`Contact::next`] what to do, does it, and asks again. It owns the record,
//! which ends with the message; an agent whose leader dies in between asks the next one.

use bellwether_types::{BootId, Epoch, NodeId, VmId};

use crate::command::{Change, Registration};
use crate::fence::{self, NodeWatchdog, Promise};
use crate::observe::{NodeReport, VmReport};
use crate::reconcile;
use crate::state::{Liveness, State};

/// What the shell does next.
// There is one at a time, and it is gone with the message.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, PartialEq, Debug)]
pub enum Next {
    /// Ask a quorum whether this controller leads, and call [`Contact::confirmed`].
    Confirm,
    /// Take note of the report.
    Note {
        node: NodeId,
        report: NodeReport,
    },
    Commit(Change),
    /// Answer that the cluster knows this boot of the node, which a registration has to name:
    /// whoever lives asks again, and a message of a dead boot that comes late does nothing.
    Known {
        boot_id: BootId,
    },
    /// Answer that the node has to register: nothing of what it said counts.
    Unregistered {
        term: u64,
    },
    /// Answer, with what the node may run.
    Done {
        term: u64,
        grants: Vec<(VmId, Epoch)>,
    },
}

#[derive(Clone, PartialEq, Debug)]
enum Message {
    Register(Registration),
    Renew { node: NodeId, boot_id: BootId, nonce: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Unconfirmed,
    Confirmed { term: u64 },
    Noted { term: u64 },
    Heard { term: u64 },
    Settled { term: u64 },
}

/// One message of one agent.
#[derive(Clone, PartialEq, Debug)]
pub struct Contact {
    message: Message,
    vms: Vec<VmReport>,
    promise: Option<Promise>,
    stage: Stage,
}

impl Contact {
    pub fn registration(registration: Registration, vms: Vec<VmReport>) -> Self {
        Self::new(Message::Register(registration), vms)
    }

    /// `nonce` grows with every report of one boot.
    pub fn renewal(node: NodeId, boot_id: BootId, nonce: u64, vms: Vec<VmReport>) -> Self {
        Self::new(Message::Renew { node, boot_id, nonce }, vms)
    }

    fn new(message: Message, vms: Vec<VmReport>) -> Self {
        Self { message, vms, promise: None, stage: Stage::Unconfirmed }
    }

    /// What the renewal says of its node's watchdog.
    pub fn with_promise(self, promise: Promise) -> Self {
        Self { promise: Some(promise), ..self }
    }

    /// A quorum has said, since the message came in, that this controller leads in `term`.
    pub fn confirmed(&mut self, term: u64) {
        self.stage = Stage::Confirmed { term };
    }

    /// What to do next, given the newest state here and this leader's clock in milliseconds.
    pub fn next(&mut self, state: &State, now: u64) -> Next {
        match self.stage {
            Stage::Unconfirmed => Next::Confirm,
            Stage::Confirmed { term } if !self.counts(state) => Next::Unregistered { term },
            Stage::Confirmed { term } => match self.unnamed(state) {
                Some(boot_id) => Next::Known { boot_id },
                None => {
                    self.stage = Stage::Noted { term };
                    self.note(now)
                }
            },
            Stage::Noted { term } => {
                self.stage = Stage::Heard { term };
                match self.change(state) {
                    Some(change) => Next::Commit(change),
                    None => self.next(state, now),
                }
            }
            Stage::Heard { term } => {
                self.stage = Stage::Settled { term };
                match self.news_of_watchdog(state) {
                    Some(change) => Next::Commit(change),
                    None => self.next(state, now),
                }
            }
            Stage::Settled { term } => Next::Done { term, grants: self.grants(state) },
        }
    }

    /// A report of a boot that is not the node's, or of a fenced node, says nothing.
    fn counts(&self, state: &State) -> bool {
        match &self.message {
            Message::Register(_) => true,
            Message::Renew { node, boot_id, .. } => {
                let known = state.nodes.get(node).filter(|node| node.boot_id == Some(*boot_id));
                known.is_some_and(|node| !matches!(node.liveness, Liveness::Fenced { .. }))
            }
        }
    }

    /// The boot that a registration would replace without naming it.
    fn unnamed(&self, state: &State) -> Option<BootId> {
        let Message::Register(new) = &self.message else { return None };
        let known = state.nodes.get(&new.node)?.boot_id?;
        (known != new.boot_id && new.replaces != Some(known)).then_some(known)
    }

    fn note(&mut self, heard_at: u64) -> Next {
        let (node, boot_id, nonce) = match &self.message {
            Message::Register(it) => (it.node, it.boot_id, 0),
            Message::Renew { node, boot_id, nonce } => (*node, *boot_id, *nonce),
        };
        let vms = std::mem::take(&mut self.vms);
        Next::Note { node, report: NodeReport { boot_id, heard_at, nonce, vms } }
    }

    fn change(&self, state: &State) -> Option<Change> {
        match &self.message {
            Message::Register(registration) => Some(Change::RegisterNode(registration.clone())),
            Message::Renew { node, boot_id, .. } => {
                let liveness = state.nodes.get(node).map(|node| &node.liveness);
                let back = matches!(liveness, Some(Liveness::Unknown { .. }));
                back.then_some(Change::NodeOnline { node: *node, boot_id: *boot_id })
            }
        }
    }

    /// What was promised has to be known to every later leader before anything is granted on it.
    fn news_of_watchdog(&self, state: &State) -> Option<Change> {
        let Message::Renew { node, boot_id, nonce } = self.message else { return None };
        let promise = self.promise.clone()?;
        let known = state.nodes.get(&node)?;
        fence::is_news(known, boot_id, nonce, &promise).then_some(Change::NoteWatchdog {
            node,
            said: NodeWatchdog { boot_id, nonce, promise },
        })
    }

    fn grants(&self, state: &State) -> Vec<(VmId, Epoch)> {
        match &self.message {
            Message::Register(_) => Vec::new(),
            Message::Renew { node, boot_id, .. } => reconcile::grants(state, *node, *boot_id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::model::Model;

    const NODE: NodeId = NodeId(1);

    #[test]
    fn nothing_counts_before_a_quorum_has_confirmed() {
        let model = Model::new(1);
        let boot = model.hosts[&NODE].boot;
        let mut contact = Contact::renewal(NODE, boot, 7, vec![]);
        for _ in 0..3 {
            assert_eq!(contact.next(&model.state, 5), Next::Confirm);
        }
        contact.confirmed(4);
        assert!(
            matches!(contact.next(&model.state, 5), Next::Note { report, .. } if report.nonce == 7)
        );
        assert_eq!(contact.next(&model.state, 5), Next::Done { term: 4, grants: vec![] });
    }

    #[test]
    fn a_node_is_heard_before_it_is_online_again() {
        let mut model = Model::new(1);
        let boot_id = model.hosts[&NODE].boot;
        model.apply(Change::NodeUnknown { node: NODE, boot_id });
        let mut contact = Contact::renewal(NODE, boot_id, 7, vec![]);
        contact.confirmed(4);
        assert!(matches!(contact.next(&model.state, 5), Next::Note { .. }));
        let online = Change::NodeOnline { node: NODE, boot_id };
        assert_eq!(contact.next(&model.state, 5), Next::Commit(online));
        assert!(matches!(contact.next(&model.state, 5), Next::Done { .. }));
    }

    #[test]
    fn a_renewal_of_another_boot_says_nothing() {
        let model = Model::new(1);
        let other = BootId::from_uuid(uuid::Uuid::from_u128(99));
        let mut contact = Contact::renewal(NODE, other, 7, vec![]);
        contact.confirmed(4);
        assert_eq!(contact.next(&model.state, 5), Next::Unregistered { term: 4 });
    }
}
