//! The Raft service that other controllers call. Who may call is decided before this, by TLS.

use std::sync::Arc;
use std::time::Duration;

use bellwether_proto::v1::raft_server::{Raft as RaftApi, RaftServer};
use bellwether_proto::v1::{RaftEnvelope, SnapshotChunk};
use futures::Stream;
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest, VoteRequest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};

use crate::codec;
use crate::config::Limits;
use crate::machine::StateMachine;
use crate::types::{LogId, Snapshot, SnapshotMeta, TypeConfig, Vote};

type Raft = openraft::Raft<TypeConfig, StateMachine>;
type Answer = Result<Response<RaftEnvelope>, Status>;

/// Decodes what peers send, hands it to openraft, and encodes what openraft answers.
#[derive(Clone)]
pub struct RaftService {
    raft: Raft,
    limits: Limits,
    idle_timeout: Duration,
    /// One snapshot at a time is received: each may be as large as memory allows.
    receiving: Arc<Semaphore>,
}

impl RaftService {
    pub(crate) fn new(raft: Raft, limits: Limits, idle_timeout: Duration) -> Self {
        Self { raft, limits, idle_timeout, receiving: Arc::new(Semaphore::new(1)) }
    }

    /// The tonic service, with bounded messages.
    pub fn into_server(self) -> RaftServer<Self> {
        let bytes = self.limits.message_bytes;
        RaftServer::new(self).max_decoding_message_size(bytes).max_encoding_message_size(bytes)
    }
}

fn decode<T: DeserializeOwned>(what: &str, payload: &[u8]) -> Result<T, Status> {
    codec::decode_envelope(payload)
        .map_err(|error| Status::invalid_argument(format!("decode {what}: {error}")))
}

/// openraft's answer, or the reason why it can give none: it has stopped.
fn answer<T: Serialize, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> Answer {
    let value = result.map_err(|error| Status::unavailable(format!("{what}: {error}")))?;
    let payload = codec::encode_envelope(&value)
        .map_err(|error| Status::internal(format!("encode the answer to {what}: {error}")))?;
    Ok(Response::new(RaftEnvelope { payload }))
}

/// openraft trusts that entries follow each other; a log with a hole would be the price.
fn check_consecutive(request: &AppendEntriesRequest<TypeConfig>) -> Result<(), Status> {
    let mut previous: Option<LogId> = request.prev_log_id;
    for entry in &request.entries {
        let expected = previous.map_or(0, |id| id.index + 1);
        let found = entry.log_id.index;
        if found != expected {
            let text = format!("append entries: entry {found} where {expected} belongs");
            return Err(Status::invalid_argument(text));
        }
        previous = Some(entry.log_id);
    }
    Ok(())
}

#[tonic::async_trait]
impl RaftApi for RaftService {
    async fn append_entries(&self, request: Request<RaftEnvelope>) -> Answer {
        let payload = request.into_inner().payload;
        let request: AppendEntriesRequest<TypeConfig> = decode("append entries", &payload)?;
        check_consecutive(&request)?;
        answer("append entries", self.raft.append_entries(request).await)
    }

    async fn vote(&self, request: Request<RaftEnvelope>) -> Answer {
        let request: VoteRequest<TypeConfig> = decode("vote", &request.into_inner().payload)?;
        answer("vote", self.raft.vote(request).await)
    }

    async fn pre_vote(&self, request: Request<RaftEnvelope>) -> Answer {
        let request: VoteRequest<TypeConfig> = decode("pre-vote", &request.into_inner().payload)?;
        answer("pre-vote", self.raft.pre_vote(request).await)
    }

    async fn transfer_leader(&self, request: Request<RaftEnvelope>) -> Answer {
        let payload = request.into_inner().payload;
        let request: TransferLeaderRequest<TypeConfig> = decode("transfer leader", &payload)?;
        answer("transfer leader", self.raft.handle_transfer_leader(request).await)
    }

    async fn install_snapshot(&self, request: Request<Streaming<SnapshotChunk>>) -> Answer {
        let Ok(_turn) = self.receiving.try_acquire() else {
            return Err(Status::resource_exhausted("another snapshot is being received"));
        };
        let max = self.limits.snapshot_bytes;
        let (vote, snapshot) = receive(request.into_inner(), max, self.idle_timeout).await?;
        codec::verify_snapshot(&snapshot.snapshot)
            .map_err(|error| Status::invalid_argument(format!("snapshot: {error}")))?;
        answer("install snapshot", self.raft.install_full_snapshot(vote, snapshot).await)
    }
}

/// Gathers a snapshot: bounded in size, and in how long the stream may stand still.
async fn receive(
    stream: impl Stream<Item = Result<SnapshotChunk, Status>>,
    max_bytes: usize,
    idle: Duration,
) -> Result<(Vote, Snapshot), Status> {
    let mut stream = std::pin::pin!(stream);
    let mut head: Option<(Vote, SnapshotMeta)> = None;
    let mut image = Vec::new();
    loop {
        let next = tokio::time::timeout(idle, stream.next()).await;
        let next = next.map_err(|_| Status::deadline_exceeded("the snapshot stands still"))?;
        let Some(chunk) = next.transpose()? else { break };
        if head.is_none() {
            let vote = decode("the snapshot's vote", &chunk.vote)?;
            head = Some((vote, decode("the snapshot's metadata", &chunk.meta)?));
        }
        if image.len() + chunk.data.len() > max_bytes {
            let text = format!("the snapshot has more than {max_bytes} bytes");
            return Err(Status::resource_exhausted(text));
        }
        image.extend_from_slice(&chunk.data);
    }
    let Some((vote, meta)) = head else {
        return Err(Status::invalid_argument("the snapshot is empty"));
    };
    Ok((vote, Snapshot { meta, snapshot: image }))
}
