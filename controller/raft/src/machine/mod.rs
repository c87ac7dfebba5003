//! The replicated state machine: `bellwether_core::State` in memory, snapshots on disk.
//!
//! After a restart the last snapshot is loaded here, and openraft applies again what the log has
//! beyond it. Readers get whole states: each is the state at one index, whatever happens meanwhile.

mod replica;

use std::io;
use std::sync::Arc;

use bellwether_core::state::STATE_FORMAT;
use bellwether_core::{Command, Outcome, State};
use futures::{Stream, TryStreamExt};
use openraft::storage::{ApplyResponder, EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use tokio::sync::watch;

use self::replica::Replica;
use crate::codec;
use crate::store::{Store, StoreError};
use crate::types::{Applied, Entry, LogId, Snapshot, SnapshotMeta, StoredMembership, TypeConfig};

/// So many entries are applied between two publications at most.
const PUBLISH_ENTRIES: usize = 1024;

/// A consistent state, and the place in the log that it is the state of.
#[derive(Clone, Debug, Default)]
pub struct StateView {
    /// The index and the term of the last entry applied; `None` before the first.
    pub last_applied: Option<AppliedAt>,
    pub state: Arc<State>,
}

/// The place of the last entry applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AppliedAt {
    pub index: u64,
    pub term: u64,
}

impl StateView {
    fn new(last: Option<LogId>, state: Arc<State>) -> Self {
        let last_applied =
            last.map(|id| AppliedAt { index: id.index, term: id.committed_leader_id().term });
        Self { last_applied, state }
    }

    /// Whether this state has applied the entry with this index.
    pub fn includes(&self, index: u64) -> bool {
        self.last_applied.is_some_and(|at| at.index >= index)
    }
}

/// What openraft applies entries to.
pub struct StateMachine {
    store: Store,
    replica: Replica,
    applied: Option<LogId>,
    membership: StoredMembership,
    view: watch::Sender<StateView>,
}

/// An entry whose turn has come, and who waits for it.
enum Step {
    Command(Option<ApplyResponder<TypeConfig>>),
    Internal(Option<ApplyResponder<TypeConfig>>),
}

impl StateMachine {
    /// Loads the last snapshot.
    pub(crate) async fn load(store: Store) -> Result<Self, StoreError> {
        let mut machine = Self {
            replica: Replica::default(),
            applied: None,
            membership: StoredMembership::default(),
            view: watch::Sender::new(StateView::default()),
            store,
        };
        if let Some(snapshot) = machine.store.read_snapshot().await? {
            let (state, _) = decode(snapshot.snapshot).await?;
            machine.replace(&snapshot.meta, state);
        }
        Ok(machine)
    }

    /// Every published state from now on.
    pub(crate) fn watch(&self) -> watch::Receiver<StateView> {
        self.view.subscribe()
    }

    fn replace(&mut self, meta: &SnapshotMeta, state: State) {
        self.replica = Replica::new(state);
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.publish();
    }

    fn publish(&self) {
        self.view.send_replace(StateView::new(self.applied, self.replica.front()));
    }

    /// Applies what has gathered, publishes, and only then answers: whoever proposed finds the
    /// effect in the view.
    fn apply_batch(&mut self, commands: &mut Vec<Command>, steps: &mut Vec<Step>) {
        if steps.is_empty() {
            return;
        }
        let mut outcomes = self.replica.apply(std::mem::take(commands)).into_iter();
        self.publish();
        for step in steps.drain(..) {
            match step {
                Step::Command(responder) => answer(responder, outcomes.next()),
                Step::Internal(responder) => answer(responder, None),
            }
        }
    }

    fn note(&mut self, entry: Entry, commands: &mut Vec<Command>) -> bool {
        self.applied = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Normal(proposal) => {
                commands.push(proposal.0);
                return true;
            }
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
            }
            EntryPayload::Blank => {}
        }
        false
    }
}

fn answer(responder: Option<ApplyResponder<TypeConfig>>, outcome: Option<Outcome>) {
    if let Some(responder) = responder {
        responder.send(outcome.map_or(Applied::Internal, Applied::Outcome));
    }
}

/// Decodes a state away from the tasks that must not wait.
async fn decode(image: Vec<u8>) -> Result<(State, Vec<u8>), StoreError> {
    let decoded = tokio::task::spawn_blocking(move || {
        codec::decode_state(&image, STATE_FORMAT).map(|s| (s, image))
    });
    decoded
        .await
        .map_err(|_| StoreError::Closed)?
        .map_err(|source| StoreError::Corrupt { subject: "the snapshot".into(), source })
}

/// The state, the membership and the place that a snapshot is made of.
pub struct SnapshotBuilder {
    store: Store,
    state: Arc<State>,
    meta: SnapshotMeta,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let state = Arc::clone(&self.state);
        let encoded = tokio::task::spawn_blocking(move || codec::encode_snapshot(&*state)).await;
        let image = encoded
            .map_err(|_| StoreError::Closed)?
            .map_err(|source| StoreError::Encode { subject: "the snapshot".into(), source })?;
        self.store.write_snapshot(&self.meta, &image).await?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot: image })
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let (mut commands, mut steps) = (Vec::new(), Vec::new());
        while let Some((entry, responder)) = entries.try_next().await? {
            let is_command = self.note(entry, &mut commands);
            steps.push(match is_command {
                true => Step::Command(responder),
                false => Step::Internal(responder),
            });
            if steps.len() >= PUBLISH_ENTRIES {
                self.apply_batch(&mut commands, &mut steps);
            }
        }
        self.apply_batch(&mut commands, &mut steps);
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        let last_membership = self.membership.clone();
        SnapshotBuilder {
            store: self.store.clone(),
            state: self.replica.front(),
            meta: SnapshotMeta { last_log_id: self.applied, last_membership },
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Vec<u8>,
    ) -> Result<(), io::Error> {
        // Decoded before it is stored: an image that nobody can read must not replace a good one.
        // Stored before it is taken over: a crash in between leaves the old state, and its log.
        let (state, image) = decode(snapshot).await?;
        self.store.write_snapshot(meta, &image).await?;
        self.replace(meta, state);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        Ok(self.store.read_snapshot().await?)
    }
}
