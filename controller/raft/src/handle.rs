//! What the controller holds of Raft.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bellwether_core::{Command, Outcome};
use openraft::LinearizerOption;
use openraft::error::{InitializeError as OpenraftInitializeError, RaftError};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use crate::codec;
use crate::config::RaftConfig;
use crate::error::{
    ConfirmError, InitializeError, LeaderHint, ProposeError, StartError, TransferError, fatal_text,
};
use crate::machine::{StateMachine, StateView};
use crate::network::{Connect, NetworkFactory};
use crate::server::RaftService;
use crate::status::{RaftStatus, StatusWatch};
use crate::store::{Store, StoreOptions};
use crate::types::{Applied, ControllerNode, Proposal, TypeConfig};

/// What goes around a command in a message, generously.
const ENTRY_OVERHEAD_BYTES: usize = 64 << 10;

/// A quorum has said, after the question was asked, that this controller leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfirmedLeadership {
    /// The term names the leadership: no other controller ever leads in it.
    pub term: u64,
    /// The state here has applied at least this index, and so everything that was acknowledged to
    /// anyone before the question.
    pub read_index: u64,
}

/// One controller's Raft. Clones are the same Raft.
#[derive(Clone)]
pub struct RaftHandle {
    pub(crate) raft: openraft::Raft<TypeConfig, StateMachine>,
    store: Store,
    view: watch::Receiver<StateView>,
    pub(crate) config: Arc<RaftConfig>,
}

impl RaftHandle {
    /// Opens the database, recovers the state, and takes part in the group that the database
    /// remembers. A new database belongs to none: it waits for [`Self::initialize_single`], or for
    /// a leader that adds it.
    pub async fn start(config: RaftConfig, connector: impl Connect) -> Result<Self, StartError> {
        let options = StoreOptions {
            node_id: config.node_id,
            cache_bytes: config.limits.cache_bytes,
            write_queue: config.limits.write_queue,
            on_fatal: Arc::clone(&config.on_fatal),
        };
        let data_dir = config.data_dir.clone();
        let store = tokio::task::spawn_blocking(move || Store::open(&data_dir, options))
            .await
            .map_err(|error| StartError::Raft(error.to_string()))??;
        Self::start_on(config, connector, store).await
    }

    /// The same on a database that is open already.
    pub(crate) async fn start_on(
        config: RaftConfig,
        connector: impl Connect,
        store: Store,
    ) -> Result<Self, StartError> {
        let openraft = match config.openraft() {
            Ok(openraft) => Arc::new(openraft),
            Err(error) => return Err(give_up(&store, error).await),
        };
        let machine = match StateMachine::load(store.clone()).await {
            Ok(machine) => machine,
            Err(error) => return Err(give_up(&store, error.into()).await),
        };
        let view = machine.watch();
        let (timers, limits) = (config.timers.clone(), config.limits.clone());
        let network = NetworkFactory::new(config.node_id, Arc::new(connector), timers, limits);
        let directory = network.directory();
        let started =
            openraft::Raft::new(config.node_id, openraft, network, store.clone(), machine).await;
        match started {
            Ok(raft) => {
                directory.get_or_init(|| raft.metrics());
                Ok(Self { raft, store, view, config: Arc::new(config) })
            }
            Err(fatal) => Err(give_up(&store, StartError::Raft(fatal_text(&fatal))).await),
        }
    }

    /// The service for other controllers.
    pub fn service(&self) -> RaftService {
        let idle = self.config.timers.snapshot_idle_timeout;
        RaftService::new(self.raft.clone(), self.config.limits.clone(), idle)
    }

    /// Makes a cluster whose only controller is this one.
    pub async fn initialize_single(&self, node: ControllerNode) -> Result<(), InitializeError> {
        let members = BTreeMap::from([(self.config.node_id, node)]);
        self.raft.initialize(members).await.map_err(|error| match error {
            RaftError::APIError(OpenraftInitializeError::NotAllowed(_)) => {
                InitializeError::AlreadyInitialized
            }
            RaftError::APIError(error) => InitializeError::Rejected(error.to_string()),
            RaftError::Fatal(fatal) => InitializeError::Fatal(fatal_text(&fatal)),
        })
    }

    /// Whether this controller belongs, or belonged, to a cluster.
    pub async fn is_initialized(&self) -> Result<bool, InitializeError> {
        let known = self.raft.is_initialized().await;
        known.map_err(|fatal| InitializeError::Fatal(fatal_text(&fatal)))
    }

    /// Commits a command and returns what applying it gave. When this returns, [`Self::view`] shows
    /// the effect. If the future is dropped, the outcome is unknown.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        self.check_size(&command)?;
        let begun = Instant::now();
        let deadline = begun + self.config.timers.propose_timeout;
        let patience = begun + self.config.timers.election_timeout_max;
        loop {
            let write = self.raft.client_write(Proposal(command.clone()));
            let error = match timeout_at(deadline, write).await {
                Ok(Ok(response)) => return outcome(response.data),
                Ok(Err(error)) => ProposeError::from(error),
                Err(_) => {
                    let waited = self.config.timers.propose_timeout;
                    let reason = format!("no commit after {waited:?}");
                    return Err(ProposeError::OutcomeUnknown { reason });
                }
            };
            let settling =
                matches!(&error, ProposeError::NotLeader { leader } if self.may_lead(leader));
            if !settling || Instant::now() >= patience.min(deadline) {
                return Err(error);
            }
            self.wait_for_news().await;
        }
    }

    /// An entry that fits into no message would stop replication for ever.
    fn check_size(&self, command: &Command) -> Result<(), ProposeError> {
        let max = self.config.limits.message_bytes.saturating_sub(ENTRY_OVERHEAD_BYTES);
        match codec::encode_envelope(command) {
            Ok(bytes) if bytes.len() <= max => Ok(()),
            Ok(bytes) => Err(ProposeError::TooLarge { bytes: bytes.len(), max }),
            Err(error) => Err(ProposeError::Encode(error)),
        }
    }

    /// Whether a refusal to write may end soon: nobody else is known to lead, so either this leader
    /// waits for its (first) quorum, or an election is on.
    pub(crate) fn may_lead(&self, leader: &LeaderHint) -> bool {
        leader.as_ref().is_none_or(|(id, _)| *id == self.config.node_id)
    }

    /// Waits until the metrics change, but not long: not everything that matters shows there.
    pub(crate) async fn wait_for_news(&self) {
        let mut status = self.watch_status();
        let patience = self.config.timers.heartbeat_interval / 4;
        // Both ends of the wait lead to the same next question.
        let _ = timeout(patience, status.changed()).await;
    }

    /// Asks a quorum, after this call began, whether this controller still leads, and waits until
    /// the state here is as new as the answer. Clock-based lease reads are never used for this.
    pub async fn confirm_leadership(&self) -> Result<ConfirmedLeadership, ConfirmError> {
        let waited = self.config.timers.confirm_timeout;
        let option = LinearizerOption::new(Some(Duration::ZERO), true).with_wait_timeout(waited);
        let confirmed = timeout(waited, self.raft.ensure_linearizable(option)).await;
        let Ok(confirmed) = confirmed else { return Err(ConfirmError::NoQuorum { waited }) };
        let read = confirmed.map_err(|error| ConfirmError::from_read(error, waited))?;
        Ok(ConfirmedLeadership { term: read.committed_leader_id().term, read_index: read.index() })
    }

    /// The controller that leads, as far as this one knows.
    pub fn leader(&self) -> LeaderHint {
        self.status().leader
    }

    /// What this controller knows of the group.
    pub fn status(&self) -> RaftStatus {
        self.watch_status().current()
    }

    /// Follows the status.
    pub fn watch_status(&self) -> StatusWatch {
        StatusWatch::new(self.raft.metrics())
    }

    /// The state as of the last entry applied here. It may be older than the cluster's.
    pub fn view(&self) -> StateView {
        self.view.borrow().clone()
    }

    /// Follows the state. Hold no view for longer than needed: it is a whole state.
    pub fn watch_state(&self) -> watch::Receiver<StateView> {
        self.view.clone()
    }

    /// Hands the leadership to a voter and waits until it leads.
    pub async fn transfer_leadership(&self, to: u64) -> Result<(), TransferError> {
        let status = self.status();
        if !status.is_leader() {
            return Err(TransferError::NotLeader { to, leader: status.leader });
        }
        if to == status.node_id {
            return Ok(());
        }
        if !status.voters.contains_key(&to) {
            return Err(TransferError::NotVoter { to });
        }
        let fatal = |reason: String| TransferError::Fatal { to, reason };
        self.raft.trigger().transfer_leader(to).await.map_err(|e| fatal(fatal_text(&e)))?;
        let waited = 2 * self.config.timers.election_timeout_max;
        let mut watch = self.watch_status();
        let taken =
            watch.wait_for(|now| now.leader.as_ref().is_some_and(|(leader, _)| *leader == to));
        match timeout(waited, taken).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(stopped)) => Err(fatal(stopped.to_string())),
            Err(_) => Err(TransferError::NotTaken { to, waited }),
        }
    }

    /// Takes a snapshot now, without waiting for it.
    pub async fn trigger_snapshot(&self) -> Result<(), String> {
        self.raft.trigger().snapshot().await.map_err(|fatal| fatal_text(&fatal))
    }

    /// Returns when Raft has stopped, and says why. A controller without Raft must end.
    pub async fn stopped(&self) -> String {
        match self.watch_status().wait_for(|status| status.stopped.is_some()).await {
            Ok(status) => status.stopped.unwrap_or_default(),
            Err(stopped) => stopped.to_string(),
        }
    }

    /// Stops Raft, writes what waits, and closes the database.
    pub async fn shutdown(&self) -> Result<(), StartError> {
        self.raft.shutdown().await.map_err(|error| StartError::Raft(error.to_string()))?;
        match self.store.close().await {
            Ok(()) | Err(crate::StoreError::Closed) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn outcome(applied: Applied) -> Result<Outcome, ProposeError> {
    match applied {
        Applied::Outcome(outcome) => Ok(outcome),
        Applied::Internal => Err(ProposeError::OutcomeUnknown {
            reason: "the entry was applied as an entry of raft itself".into(),
        }),
    }
}

/// Frees the database's lock before a start that failed is reported.
async fn give_up(store: &Store, error: StartError) -> StartError {
    if let Err(close) = store.close().await {
        tracing::warn!(error = %close, "the raft database did not close");
    }
    error
}
