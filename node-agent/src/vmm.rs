//! Talking to one VMM over its unix socket.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bellwether_agent_core::VmmSight;
use bellwether_proto::v1;
use bellwether_proto::v1::vmm_client::VmmClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tower::service_fn;

use bellwether_types::Epoch;

use crate::process::Process;
use crate::wire;

/// Between two tries to connect to a VMM that is about to open its socket.
const CONNECT_INTERVAL: Duration = Duration::from_millis(2);
/// Loading the executable and opening a socket takes milliseconds; a busy host may need longer.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long a status may take. Nothing a VMM does holds it up.
const STATUS_MAX: Duration = Duration::from_secs(2);

/// Why a call to a VMM has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The VMM refused or failed: it says that nothing changed.
    #[error("{}", .0.message())]
    Refused(Status),
    #[error("{what}: the VMM gave no answer within {} ms", after.as_millis())]
    Timeout { what: &'static str, after: Duration },
    #[error("{what}: a release of this epoch came in between")]
    Released { what: &'static str },
    #[error("{what}: the connection to the VMM was lost ({detail})")]
    Lost { what: &'static str, detail: String },
    #[error("connect to the VMM at `{}`: {source}", path.display())]
    Connect { path: PathBuf, source: io::Error },
}

/// The control connection to one VMM.
#[derive(Clone, Debug)]
pub struct Vmm {
    client: VmmClient<Channel>,
}

impl Vmm {
    /// Connects as soon as the VMM has opened its socket, and checks that it is this process which
    /// serves there.
    pub async fn connect(socket: &Path, process: &Process) -> Result<Self, CallError> {
        let refuse = |source| CallError::Connect { path: socket.into(), source };
        let deadline = Instant::now() + CONNECT_MAX;
        let mut tick = interval(CONNECT_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stream = loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline || !is_early(&error) => {
                    return Err(refuse(error));
                }
                Err(_) => {}
            }
            tokio::select! {
                _ = tick.tick() => {}
                _ = process.exited() => {
                    return Err(refuse(io::Error::other("the VMM ended; see vmm.log beside it")));
                }
            }
        };
        let server = stream.peer_cred().map_err(refuse)?.pid();
        if server.and_then(|pid| u32::try_from(pid).ok()) != Some(process.pid()) {
            return Err(refuse(io::Error::other("another process serves there")));
        }
        drop(stream);
        Ok(Self { client: VmmClient::new(channel(socket)) })
    }

    /// What the VMM says of itself.
    pub async fn status(&self) -> Result<(v1::VmmStatus, VmmSight), CallError> {
        let mut client = self.client();
        let call = client.status(v1::StatusRequest {});
        let status = bounded("status", STATUS_MAX, None, call).await?;
        let sight = wire::sight(&status)
            .map_err(|error| CallError::Lost { what: "status", detail: error.to_string() })?;
        Ok((status, sight))
    }

    pub fn client(&self) -> VmmClient<Channel> {
        self.client.clone()
    }
}

/// The socket is not there yet, or nobody listens on it yet.
fn is_early(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connector = service_fn(move |_uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://vmm.internal").connect_with_connector_lazy(connector)
}

/// The release that was accepted last: of the newest leader's, the one of the highest epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct LastRelease {
    /// Compared first.
    pub term: u64,
    pub epoch: Epoch,
}

/// Calls off what waits for a VMM when its epoch is to be released. Not by the release of an older
/// leader than the one who gave the order: that one will be refused.
#[derive(Clone, Debug)]
pub struct Recall {
    pub releases: watch::Receiver<LastRelease>,
    pub term: u64,
    pub epoch: Epoch,
}

impl Recall {
    async fn called(&mut self) {
        let (term, epoch) = (self.term, self.epoch);
        let counts = |last: &LastRelease| last.term >= term && last.epoch >= epoch;
        if self.releases.wait_for(counts).await.is_err() {
            // The sender lives as long as the owner; without it nobody can release.
            std::future::pending::<()>().await;
        }
    }
}

/// Waits for a VMM's answer, but not for ever, and not against a release.
pub async fn bounded<T>(
    what: &'static str,
    after: Duration,
    recall: Option<Recall>,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, CallError> {
    let recalled = async {
        match recall {
            Some(mut recall) => recall.called().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        answer = timeout_at(Instant::now() + after, call) => match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(classify(what, status)),
            Err(_) => Err(CallError::Timeout { what, after }),
        },
        () = recalled => Err(CallError::Released { what }),
    }
}

/// What the transport made up says nothing of the VMM, which may have done what it was asked,
/// whatever the code: a reset stream arrives as INTERNAL or RESOURCE_EXHAUSTED. A status that the
/// VMM sent has no source, and has headers; an answer that ends too early has neither.
fn classify(what: &'static str, status: Status) -> CallError {
    let unsent = status.source().is_some() || status.metadata().is_empty();
    let lost = unsent || status.code() == Code::Cancelled;
    match lost {
        true => CallError::Lost { what, detail: status.message().to_owned() },
        false => CallError::Refused(status),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut bytes = vec![len[1], len[2], len[3], kind, flags];
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    /// Speaks just enough HTTP/2 to answer the first request with one frame.
    async fn answer_once(listener: UnixListener, kind: u8, flags: u8, payload: Vec<u8>) {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        stream.read_exact(&mut [0; 24]).await.unwrap();
        loop {
            let mut head = [0; 9];
            if stream.read_exact(&mut head).await.is_err() {
                return;
            }
            let len = usize::from(head[1]) << 8 | usize::from(head[2]);
            stream.read_exact(&mut vec![0; len]).await.unwrap();
            if head[3] == HEADERS {
                let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                stream.write_all(&frame(kind, flags, id, &payload)).await.unwrap();
            }
        }
    }

    async fn save_against(kind: u8, flags: u8, payload: Vec<u8>) -> CallError {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = tokio::spawn(answer_once(listener, kind, flags, payload));
        let mut client = VmmClient::new(channel(&socket));
        let call = client.save(v1::SaveRequest::default());
        let error = bounded("save", STATUS_MAX, None, call).await.unwrap_err();
        server.abort();
        error
    }

    /// NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, STREAM_CLOSED, REFUSED_STREAM, CANCEL,
    /// ENHANCE_YOUR_CALM and INADEQUATE_SECURITY.
    #[tokio::test]
    async fn a_reset_stream_is_no_refusal() {
        for reason in [0, 1, 2, 5, 7, 8, 11, 12_u32] {
            let error = save_against(RST_STREAM, 0, reason.to_be_bytes().to_vec()).await;
            assert!(matches!(error, CallError::Lost { .. }), "{reason}: {error:?}");
        }
    }

    /// `:status 200` and the end of the stream: no message, no status.
    #[tokio::test]
    async fn an_answer_that_ends_too_early_is_no_refusal() {
        let error = save_against(HEADERS, 5, vec![0x88]).await;
        assert!(matches!(error, CallError::Lost { .. }), "{error:?}");
    }

    #[test]
    fn an_older_leaders_release_calls_nothing_off() {
        let release = LastRelease { term: 5, epoch: Epoch(9) };
        assert!(release > LastRelease { term: 5, epoch: Epoch(8) });
        assert!(release > LastRelease { term: 4, epoch: Epoch(10) });
        let (_sender, releases) = watch::channel(release);
        let called = |term, epoch| {
            let mut recall = Recall { releases: releases.clone(), term, epoch: Epoch(epoch) };
            futures::FutureExt::now_or_never(async move { recall.called().await }).is_some()
        };
        assert!(called(5, 9) && called(4, 1));
        assert!(!called(6, 9) && !called(5, 10));
    }
}
