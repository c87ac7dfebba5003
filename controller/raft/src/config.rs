//! What the caller decides: identity, place, timers and bounds.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::error::StartError;
use crate::store::FatalHook;

/// Everything that one controller's Raft needs to know before it starts.
#[derive(Clone)]
pub struct RaftConfig {
    /// The number of this controller; the database remembers it and refuses another.
    pub node_id: u64,
    /// The name of the cluster, for logs.
    pub cluster_name: String,
    /// The directory of `raft.redb`. It is created if it does not exist.
    pub data_dir: PathBuf,
    pub timers: Timers,
    pub limits: Limits,
    /// Called once, on the writer's thread, when a commit failed. What is on disk is then unknown,
    /// so the process is expected to abort: see [`crate::abort_process`].
    pub on_fatal: FatalHook,
}

impl RaftConfig {
    /// The defaults, with a fatal hook that aborts the process.
    pub fn new(node_id: u64, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            node_id,
            cluster_name: "bellwether".into(),
            data_dir: data_dir.into(),
            timers: Timers::default(),
            limits: Limits::default(),
            on_fatal: Arc::new(crate::store::abort_process),
        }
    }

    pub(crate) fn openraft(&self) -> Result<openraft::Config, StartError> {
        let config = openraft::Config {
            cluster_name: self.cluster_name.clone(),
            heartbeat_interval: millis(self.timers.heartbeat_interval),
            election_timeout_min: millis(self.timers.election_timeout_min),
            election_timeout_max: millis(self.timers.election_timeout_max),
            install_snapshot_timeout: millis(self.timers.snapshot_timeout),
            snapshot_policy: openraft::SnapshotPolicy::LogsSinceLast(self.limits.snapshot_entries),
            max_in_snapshot_log_to_keep: self.limits.kept_entries,
            // A follower within this distance is fed from the log. More than what a snapshot
            // leaves behind, or one snapshot would call for the next.
            replication_lag_threshold: self.limits.snapshot_entries + self.limits.kept_entries,
            max_payload_entries: self.limits.append_entries_max,
            purge_batch_size: 64,
            api_channel_size: Some(4096),
            notification_channel_size: Some(4096),
            // Followers are sent an entry while the leader's own disk still writes it.
            broadcast_submitted_on_append: Some(true),
            enable_pre_vote: Some(true),
            // Whoever led before a restart has lost what it knew in memory (leases granted, clocks),
            // so it must be elected again: one term is one uninterrupted leadership.
            enable_leader_restore: Some(false),
            ..openraft::Config::default()
        };
        config.validate().map_err(|error| StartError::Config(error.to_string()))
    }
}

/// How long things may take. The defaults suit machines that are shared with virtual machines;
/// openraft's own (50 ms, 150-300 ms) do not.
#[derive(Clone, Debug)]
pub struct Timers {
    pub heartbeat_interval: Duration,
    pub election_timeout_min: Duration,
    pub election_timeout_max: Duration,
    /// How long one `AppendEntries` that carries entries may take, the peer's disk included.
    pub append_timeout: Duration,
    /// How long making a connection may take; an RPC may give up earlier without ending it.
    pub connect_timeout: Duration,
    /// How long a whole snapshot may take, and how long its stream may stand still.
    pub snapshot_timeout: Duration,
    pub snapshot_idle_timeout: Duration,
    /// How long a proposal waits for its outcome before it is unknown.
    pub propose_timeout: Duration,
    /// How long a confirmation of leadership waits for a quorum.
    pub confirm_timeout: Duration,
    /// How long a change of membership or a transfer of leadership is waited for.
    pub admin_timeout: Duration,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(200),
            election_timeout_min: Duration::from_millis(1000),
            election_timeout_max: Duration::from_millis(2000),
            append_timeout: Duration::from_millis(2000),
            connect_timeout: Duration::from_secs(5),
            snapshot_timeout: Duration::from_secs(600),
            snapshot_idle_timeout: Duration::from_secs(30),
            propose_timeout: Duration::from_secs(10),
            confirm_timeout: Duration::from_secs(2),
            admin_timeout: Duration::from_secs(60),
        }
    }
}

/// How much things may be.
#[derive(Clone, Debug)]
pub struct Limits {
    /// A snapshot is taken every so many entries.
    pub snapshot_entries: u64,
    /// So many entries stay in the log although a snapshot covers them, for followers that lag a little.
    pub kept_entries: u64,
    /// Entries in one `AppendEntries`; its bytes are bounded by `message_bytes` besides.
    pub append_entries_max: u64,
    /// The largest RPC message, sent or received.
    pub message_bytes: usize,
    /// The largest snapshot, sent or received.
    pub snapshot_bytes: usize,
    /// Jobs that may wait for the writer.
    pub write_queue: usize,
    /// redb's page cache.
    pub cache_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            snapshot_entries: 5000,
            kept_entries: 1000,
            append_entries_max: 300,
            message_bytes: 16 << 20,
            snapshot_bytes: 1 << 30,
            write_queue: 1024,
            cache_bytes: 64 << 20,
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_pass_openrafts_checks() {
        let config = RaftConfig::new(1, "/nowhere").openraft().unwrap();
        assert_eq!(config.enable_pre_vote, Some(true));
        assert_eq!(config.enable_leader_restore, Some(false));
    }

    #[test]
    fn timers_that_cannot_work_are_refused() {
        let mut config = RaftConfig::new(1, "/nowhere");
        config.timers.election_timeout_min = config.timers.heartbeat_interval;
        assert!(matches!(config.openraft(), Err(StartError::Config(_))));
    }
}
