//! What the tests of this crate share.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bellwether_core::command::Change;
use bellwether_core::{Command, State};
use bellwether_types::MemberRole;
use openraft::EntryPayload;
use openraft::vote::RaftLeaderId;

use crate::StateView;
use crate::store::{Store, StoreOptions};
use crate::types::{Entry, LogId, Proposal};

/// No test waits longer than this for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A command that leaves a trace in the state.
pub fn command(number: u64) -> Command {
    let change =
        Change::CreateToken { hash: trace(number), role: MemberRole::Agent, expires_at: 1 };
    Command { at: 1, change }
}

fn trace(number: u64) -> [u8; 32] {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    hash
}

/// Whether a state has applied [`command`] with this number.
pub fn has(state: &State, number: u64) -> bool {
    state.tokens.contains_key(&trace(number))
}

/// The first of these numbers that a view has not applied.
pub fn first_missing(view: &StateView, numbers: std::ops::Range<u64>) -> Option<u64> {
    numbers.into_iter().find(|number| !has(&view.state, *number))
}

pub fn log_id(term: u64, index: u64) -> LogId {
    let leader = openraft::impls::leader_id_std::LeaderId { term, voted_for: 1 };
    LogId::new(leader.to_committed(), index)
}

pub fn blank(term: u64, index: u64) -> Entry {
    Entry { log_id: log_id(term, index), payload: EntryPayload::Blank }
}

pub fn normal(term: u64, index: u64) -> Entry {
    let payload = EntryPayload::Normal(Proposal(command(index)));
    Entry { log_id: log_id(term, index), payload }
}

pub fn store_options(node_id: u64) -> StoreOptions {
    StoreOptions { node_id, cache_bytes: 4 << 20, write_queue: 64, on_fatal: Arc::new(|_| {}) }
}

pub fn open_store(dir: &Path) -> Store {
    Store::open(dir, store_options(1)).unwrap()
}

/// Waits for something that must happen.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not happen within {PATIENCE:?}"),
    }
}
