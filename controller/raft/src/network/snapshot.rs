//! Sending a snapshot: a stream of small pieces, which goes only as fast as the peer takes them.

use std::future::Future;
use std::pin::pin;

use bellwether_proto::v1::SnapshotChunk;
use openraft::RPCTypes;
use openraft::error::{NetworkError, ReplicationClosed, StreamingError, Unreachable};
use openraft::raft::SnapshotResponse;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{Network, refused};
use crate::codec;
use crate::types::{Snapshot, TypeConfig, Vote};

/// The size of a piece, and how many may wait for the peer.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;
const CHUNKS_WAITING: usize = 2;

type Failure = StreamingError<TypeConfig>;

impl Network {
    /// Sends a snapshot and waits until the peer has installed it.
    pub(super) async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed>,
    ) -> Result<SnapshotResponse<TypeConfig>, Failure> {
        let (bytes, max) = (snapshot.snapshot.len(), self.limits.snapshot_bytes);
        if bytes > max {
            let text = format!("the snapshot has {bytes} bytes, and {max} are allowed");
            return Err(NetworkError::from_string(text).into());
        }
        let ttl = self.timers.snapshot_timeout;
        let work = tokio::time::timeout(ttl, self.transmit(vote, snapshot));
        tokio::select! {
            biased;
            closed = cancel => Err(closed.into()),
            result = work => {
                result.unwrap_or_else(|_| Err(self.timeout(RPCTypes::InstallSnapshot, ttl).into()))
            }
        }
    }

    async fn transmit(
        &self,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<SnapshotResponse<TypeConfig>, Failure> {
        let link = self.link();
        let lease = link.lease().await.map_err(Unreachable::from_string)?;
        let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
        let mut client = self.client(&lease);
        let mut call = pin!(client.install_snapshot(ReceiverStream::new(receiver)));
        let mut feed = pin!(self.feed(sender, vote, snapshot));
        let idle = self.timers.snapshot_idle_timeout;
        let answer = tokio::select! {
            biased;
            // The peer may answer before the end, for instance because it has seen a later leader.
            answer = &mut call => answer,
            fed = &mut feed => {
                fed?;
                match tokio::time::timeout(idle, call).await {
                    Ok(answer) => answer,
                    Err(_) => return Err(self.timeout(RPCTypes::InstallSnapshot, idle).into()),
                }
            }
        };
        match answer {
            Ok(answer) => codec::decode_envelope(&answer.into_inner().payload)
                .map_err(|error| NetworkError::new(&error).into()),
            Err(status) => Err(refused(&link, &lease, &status).into()),
        }
    }

    async fn feed(
        &self,
        sender: mpsc::Sender<SnapshotChunk>,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<(), Failure> {
        let idle = self.timers.snapshot_idle_timeout;
        for chunk in chunks(&vote, &snapshot)? {
            match tokio::time::timeout(idle, sender.send(chunk)).await {
                Ok(Ok(())) => {}
                // The call has ended, and its answer says why.
                Ok(Err(_)) => return Ok(()),
                Err(_) => return Err(self.timeout(RPCTypes::InstallSnapshot, idle).into()),
            }
        }
        Ok(())
    }
}

/// The messages of a snapshot: the first says what it is, all of them carry data.
fn chunks<'a>(
    vote: &Vote,
    snapshot: &'a Snapshot,
) -> Result<impl Iterator<Item = SnapshotChunk> + Send + 'a, Failure> {
    let encode = |result: Result<Vec<u8>, codec::CodecError>| {
        result.map_err(|error| Failure::from(NetworkError::new(&error)))
    };
    let first = SnapshotChunk {
        vote: encode(codec::encode_envelope(vote))?,
        meta: encode(codec::encode_envelope(&snapshot.meta))?,
        data: Vec::new(),
    };
    let data = snapshot.snapshot.chunks(CHUNK_BYTES);
    let rest = data.map(|data| SnapshotChunk { data: data.to_vec(), ..SnapshotChunk::default() });
    Ok(std::iter::once(first).chain(rest))
}
