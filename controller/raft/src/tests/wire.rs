//! The wire: what a peer may send, and how large things travel.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bellwether_proto::v1::raft_client::RaftClient;
use bellwether_proto::v1::{RaftEnvelope, SnapshotChunk};
use openraft::network::RPCOption;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest};
use openraft::{RaftNetworkFactory, RaftNetworkV2};
use tonic::Code;
use tonic::transport::Channel;

use super::cluster::Cluster;
use super::gate::connect;
use super::plain;
use crate::codec::{encode_envelope, encode_snapshot};
use crate::config::{Limits, Timers};
use crate::network::NetworkFactory;
use crate::testing::{blank, has, log_id, soon};
use crate::types::{ControllerNode, SnapshotMeta, TypeConfig, Vote};

/// A controller that belongs to no group yet, and a client of it.
async fn lonely(tune: fn(&mut crate::RaftConfig)) -> (Cluster, RaftClient<Channel>) {
    let mut cluster = Cluster::new(tune);
    cluster.start(1).await;
    let authority = cluster.members[&1].node.raft_authority();
    let client = RaftClient::connect(format!("http://{authority}")).await.unwrap();
    (cluster, client)
}

fn envelope<T: serde::Serialize>(value: &T) -> RaftEnvelope {
    RaftEnvelope { payload: encode_envelope(value).unwrap() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_payload_is_an_invalid_argument() {
    let (_cluster, mut client) = lonely(plain).await;
    for payload in [vec![], vec![1], vec![2, 0, 0], vec![1, 0xff, 0xff, 0xff]] {
        let envelope = RaftEnvelope { payload };
        let status = client.append_entries(envelope.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with("decode append entries: "), "{}", status.message());
        assert_eq!(client.vote(envelope.clone()).await.unwrap_err().code(), Code::InvalidArgument);
        let status = client.transfer_leader(envelope.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let status = client.pre_vote(envelope).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let good = VoteRequest::<TypeConfig>::new(Vote::new(1, 2), None);
    client.pre_vote(envelope(&good)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_with_a_hole_are_refused() {
    let (_cluster, mut client) = lonely(plain).await;
    let mut request = AppendEntriesRequest::<TypeConfig> {
        vote: Vote::new_committed(1, 2),
        prev_log_id: None,
        entries: vec![blank(1, 0), blank(1, 2)],
        leader_commit: None,
    };
    let status = client.append_entries(envelope(&request)).await.unwrap_err();
    assert_eq!(status.message(), "append entries: entry 2 where 1 belongs");
    request.entries = vec![blank(1, 0), blank(1, 1)];
    client.append_entries(envelope(&request)).await.unwrap();
}

/// The messages of a snapshot, with the image cut into small pieces.
fn messages(image: &[u8]) -> Vec<SnapshotChunk> {
    let meta = SnapshotMeta { last_log_id: Some(log_id(1, 7)), ..SnapshotMeta::default() };
    let first = SnapshotChunk {
        vote: encode_envelope(&Vote::new_committed(1, 2)).unwrap(),
        meta: encode_envelope(&meta).unwrap(),
        data: Vec::new(),
    };
    let rest = image
        .chunks(100)
        .map(|data| SnapshotChunk { data: data.to_vec(), ..SnapshotChunk::default() });
    std::iter::once(first).chain(rest).collect()
}

fn image() -> Vec<u8> {
    let mut state = bellwether_core::State::default();
    for number in 0..100 {
        state.apply(crate::testing::command(number));
    }
    encode_snapshot(&state).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_in_pieces_is_installed() {
    let (cluster, mut client) = lonely(plain).await;
    let answer = client.install_snapshot(tokio_stream::iter(messages(&image()))).await.unwrap();
    let payload = answer.into_inner().payload;
    let answer: SnapshotResponse<TypeConfig> = crate::codec::decode_envelope(&payload).unwrap();
    assert_eq!(answer.vote, Vote::new_committed(1, 2));
    let view = cluster[1].view();
    assert!(view.includes(7) && (0..100).all(|number| has(&view.state, number)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_snapshot_is_refused_and_changes_nothing() {
    let (cluster, mut client) = lonely(|config| config.limits.snapshot_bytes = 1 << 20).await;
    let mut send = async |messages: Vec<SnapshotChunk>| {
        client.install_snapshot(tokio_stream::iter(messages)).await.unwrap_err()
    };
    let mut flipped = image();
    *flipped.last_mut().unwrap() ^= 1;
    let status = send(messages(&flipped)).await;
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("checksum"), "{}", status.message());
    let cut = &image()[..image().len() - 1];
    assert_eq!(send(messages(cut)).await.code(), Code::InvalidArgument);
    assert_eq!(send(Vec::new()).await.code(), Code::InvalidArgument);
    let large = send(messages(&vec![0; (1 << 20) + 1])).await;
    assert_eq!(large.code(), Code::ResourceExhausted);
    assert_eq!(cluster[1].view().last_applied, None);
}

/// A part of the entries is sent, and the answer says which part.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_exceed_a_message_are_sent_in_part() {
    let (cluster, _) = lonely(plain).await;
    let node = cluster.members[&1].node.clone();
    let connector = |_: u64, node: ControllerNode| {
        let address = SocketAddr::from(([127, 0, 0, 1], node.raft_port));
        connect(address, Default::default())
    };
    let limits = Limits { message_bytes: 7_000, ..Limits::default() };
    let mut factory = NetworkFactory::new(2, Arc::new(connector), Timers::default(), limits);
    let mut network = factory.new_client(1, &node).await;
    let request = AppendEntriesRequest::<TypeConfig> {
        vote: Vote::new_committed(1, 2),
        prev_log_id: None,
        entries: (0..1000).map(|index| blank(1, index)).collect(),
        leader_commit: None,
    };
    let option = RPCOption::new(Duration::from_secs(1));
    let answer = network.append_entries(request, option).await.unwrap();
    let AppendEntriesResponse::PartialSuccess(Some(last)) = answer else { panic!("{answer}") };
    assert!(last.index < 999, "{last}");
    let mut status = cluster[1].watch_status();
    let reached = status.wait_for(|status| status.last_log == Some(last.index));
    soon("the part", reached).await.unwrap();
}

/// Entries that do not fit into one message together arrive in several.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_entries_are_split_over_messages() {
    let small = |config: &mut crate::RaftConfig| {
        config.limits.message_bytes = 70 << 10;
        config.limits.append_entries_max = 5000;
    };
    let mut cluster = Cluster::of(3, small).await;
    let node = cluster.kill(3).await;
    let together = (0..2500).map(|number| cluster[1].propose(crate::testing::command(number)));
    for result in futures::future::join_all(together).await {
        result.unwrap();
    }
    // All that it lacks is offered to it at once.
    cluster.restart(3, &node).await;
    cluster.applied(3, 0..2500).await;
}
