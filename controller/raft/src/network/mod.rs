//! The way to other controllers: openraft's network over the generated tonic client.

mod link;
mod snapshot;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bellwether_proto::v1::RaftEnvelope;
use bellwether_proto::v1::raft_client::RaftClient;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::error::{
    NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::transport::Channel;
use tonic::{Code, Status};

pub use self::link::{Connect, ConnectError};
use self::link::{Lease, Link};
use crate::codec;
use crate::config::{Limits, Timers};
use crate::status::MetricsReceiver;
use crate::types::{ControllerNode, Snapshot, TypeConfig, Vote};

/// What protobuf and HTTP/2 put around a payload, generously.
const FRAME_BYTES: usize = 4096;

/// Each lane is a TCP connection of its own: entries must not wait behind a snapshot, and a
/// heartbeat must wait behind neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Lane {
    Replication,
    Heartbeat,
    Snapshot,
}

/// What this controller's Raft tells about itself, once it runs.
pub(crate) type Directory = Arc<OnceLock<MetricsReceiver>>;

/// The connections of one controller.
struct Links {
    connector: Arc<dyn Connect>,
    connect_timeout: Duration,
    directory: Directory,
    links: Mutex<HashMap<(u64, Lane), Arc<Link>>>,
}

impl Links {
    /// The connection to a controller, at the address that the membership gives it now. openraft
    /// keeps the clients that it made when a member moves.
    fn link(&self, target: u64, known: &ControllerNode, lane: Lane) -> Arc<Link> {
        let metrics = self.directory.get().map(WatchReceiver::borrow_watched);
        let membership = metrics.as_ref().map(|metrics| metrics.membership_config.membership());
        let node = membership.and_then(|members| members.get_node(&target)).unwrap_or(known);
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || {
            let connector = Arc::clone(&self.connector);
            Arc::new(Link::new(target, node.clone(), connector, self.connect_timeout))
        };
        let link = links.entry((target, lane)).or_insert_with(fresh);
        if link.node != *node {
            *link = fresh();
        }
        Arc::clone(link)
    }
}

/// Makes clients for openraft, which share connections.
pub(crate) struct NetworkFactory {
    id: u64,
    links: Arc<Links>,
    timers: Timers,
    limits: Limits,
}

impl NetworkFactory {
    pub fn new(id: u64, connector: Arc<dyn Connect>, timers: Timers, limits: Limits) -> Self {
        let links = Links {
            connector,
            connect_timeout: timers.connect_timeout,
            directory: Directory::default(),
            links: Mutex::default(),
        };
        Self { id, links: Arc::new(links), timers, limits }
    }

    /// Where to put what Raft tells about itself.
    pub fn directory(&self) -> Directory {
        Arc::clone(&self.links.directory)
    }

    fn network(&self, target: u64, node: &ControllerNode, lane: Lane) -> Network {
        Network {
            id: self.id,
            target,
            node: node.clone(),
            lane,
            links: Arc::clone(&self.links),
            timers: self.timers.clone(),
            limits: self.limits.clone(),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for NetworkFactory {
    type Network = Network;

    async fn new_client(&mut self, target: u64, node: &ControllerNode) -> Network {
        self.network(target, node, Lane::Replication)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &ControllerNode) -> Network {
        self.network(target, node, Lane::Heartbeat)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &ControllerNode) -> Network {
        self.network(target, node, Lane::Snapshot)
    }
}

/// The way to one controller.
pub(crate) struct Network {
    id: u64,
    target: u64,
    /// Where the controller was when openraft asked for this.
    node: ControllerNode,
    lane: Lane,
    links: Arc<Links>,
    timers: Timers,
    limits: Limits,
}

/// The calls that are one message each way.
#[derive(Clone, Copy)]
enum Method {
    AppendEntries,
    Vote,
    PreVote,
    TransferLeader,
}

impl Method {
    fn action(self) -> RPCTypes {
        match self {
            Self::AppendEntries => RPCTypes::AppendEntries,
            Self::Vote | Self::PreVote => RPCTypes::Vote,
            Self::TransferLeader => RPCTypes::TransferLeader,
        }
    }
}

impl Network {
    fn link(&self) -> Arc<Link> {
        self.links.link(self.target, &self.node, self.lane)
    }

    fn client(&self, lease: &Lease) -> RaftClient<Channel> {
        RaftClient::new(lease.channel.clone())
            .max_decoding_message_size(self.limits.message_bytes)
            .max_encoding_message_size(self.limits.message_bytes)
    }

    /// Sends one message and waits for its answer, all within `ttl`.
    async fn call<R: DeserializeOwned>(
        &self,
        method: Method,
        payload: Vec<u8>,
        ttl: Duration,
    ) -> Result<R, RPCError<TypeConfig>> {
        let deadline = tokio::time::Instant::now() + ttl;
        let timed_out = || self.timeout(method.action(), ttl).into();
        let link = self.link();
        let lease = match tokio::time::timeout_at(deadline, link.lease()).await {
            Ok(lease) => lease.map_err(Unreachable::from_string)?,
            Err(_) => return Err(timed_out()),
        };
        let sent = self.send(method, &lease, RaftEnvelope { payload });
        match tokio::time::timeout_at(deadline, sent).await {
            Ok(Ok(answer)) => {
                link.succeeded();
                codec::decode_envelope(&answer.payload).map_err(|e| NetworkError::new(&e).into())
            }
            Ok(Err(status)) => Err(refused(&link, &lease, &status)),
            Err(_) => {
                link.timed_out(&lease);
                Err(timed_out())
            }
        }
    }

    async fn send(
        &self,
        method: Method,
        lease: &Lease,
        message: RaftEnvelope,
    ) -> Result<RaftEnvelope, Status> {
        let mut client = self.client(lease);
        let answer = match method {
            Method::AppendEntries => client.append_entries(message).await,
            Method::Vote => client.vote(message).await,
            Method::PreVote => client.pre_vote(message).await,
            Method::TransferLeader => client.transfer_leader(message).await,
        };
        Ok(answer?.into_inner())
    }

    fn timeout(&self, action: RPCTypes, timeout: Duration) -> Timeout<TypeConfig> {
        Timeout { action, id: self.id, target: self.target, timeout }
    }

    /// Encodes a request, with fewer entries if all of them do not fit into a message.
    fn fit(
        &self,
        request: &mut AppendEntriesRequest<TypeConfig>,
    ) -> Result<Vec<u8>, RPCError<TypeConfig>> {
        let room = self.limits.message_bytes.saturating_sub(FRAME_BYTES);
        loop {
            let payload = encode(request)?;
            if payload.len() <= room {
                return Ok(payload);
            }
            if request.entries.len() <= 1 {
                let text = format!("one log entry of {} bytes exceeds a message", payload.len());
                return Err(NetworkError::from_string(text).into());
            }
            request.entries.truncate(request.entries.len() / 2);
        }
    }
}

/// What an error of the transport, or an answer that is an error, means to openraft.
fn refused(link: &Link, lease: &Lease, status: &Status) -> RPCError<TypeConfig> {
    let (id, node, code) = (link.id, &link.node, status.code());
    let text = format!("raft call to {id} {node}: {code:?}: {}", status.message());
    match code {
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal => {
            link.broken(lease);
            Unreachable::from_string(text).into()
        }
        _ => NetworkError::from_string(text).into(),
    }
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, RPCError<TypeConfig>> {
    codec::encode_envelope(value).map_err(|error| NetworkError::new(&error).into())
}

impl RaftNetworkV2<TypeConfig> for Network {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        mut request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let wanted = request.entries.len();
        let payload = self.fit(&mut request)?;
        // openraft allows one heartbeat interval, which a disk may need for itself.
        let ttl = if wanted == 0 { option.soft_ttl() } else { self.timers.append_timeout };
        let answer = self.call(Method::AppendEntries, payload, ttl).await?;
        match (answer, request.entries.last()) {
            (AppendEntriesResponse::Success, Some(last)) if request.entries.len() < wanted => {
                Ok(AppendEntriesResponse::PartialSuccess(Some(last.log_id)))
            }
            (answer, _) => Ok(answer),
        }
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(Method::Vote, encode(&request)?, option.soft_ttl()).await
    }

    // openraft's default grants every pre-vote without asking anyone.
    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(Method::PreVote, encode(&request)?, option.soft_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        self.send_snapshot(vote, snapshot, cancel).await
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(Method::TransferLeader, encode(&request)?, option.soft_ttl()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    fn network(message_bytes: usize) -> Network {
        let nowhere = |_: u64, _: ControllerNode| async {
            Err::<Channel, ConnectError>("nobody is connected to".into())
        };
        let limits = Limits { message_bytes, ..Limits::default() };
        let factory = NetworkFactory::new(1, Arc::new(nowhere), Timers::default(), limits);
        factory.network(2, &ControllerNode::default(), Lane::Replication)
    }

    fn request(entries: u64) -> AppendEntriesRequest<TypeConfig> {
        AppendEntriesRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: None,
            entries: (0..entries).map(|index| normal(1, index)).collect(),
            leader_commit: None,
        }
    }

    #[test]
    fn as_many_entries_go_into_a_message_as_fit() {
        let mut all = request(1000);
        let whole = network(1 << 20).fit(&mut all).unwrap();
        assert_eq!(all.entries.len(), 1000);
        let mut some = request(1000);
        let part = network(FRAME_BYTES + whole.len() / 3).fit(&mut some).unwrap();
        assert_eq!(some.entries.len(), 250);
        assert!(part.len() <= whole.len() / 3);
        let error = network(FRAME_BYTES + 10).fit(&mut request(2)).unwrap_err();
        assert!(error.to_string().contains("one log entry of"), "{error}");
    }

    #[tokio::test]
    async fn a_controller_that_cannot_be_reached_grants_no_pre_vote() {
        let rpc = VoteRequest::new(Vote::new(2, 1), None);
        let option = RPCOption::new(Duration::from_secs(1));
        let error = network(1 << 20).pre_vote(rpc, option).await.unwrap_err();
        assert!(error.to_string().contains("nobody is connected to"), "{error}");
    }
}
