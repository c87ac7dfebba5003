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

/// Calls off what waits for a VMM when its epoch is to be released.
#[derive(Clone, Debug)]
pub struct Recall {
    pub releases: watch::Receiver<Epoch>,
    pub epoch: Epoch,
}

impl Recall {
    async fn called(&mut self) {
        let epoch = self.epoch;
        if self.releases.wait_for(|released| *released >= epoch).await.is_err() {
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

/// A status that the VMM sent has no source; one that the transport made up has, and then the VMM
/// may have done what it was asked.
fn classify(what: &'static str, status: Status) -> CallError {
    let lost = status.source().is_some() || status.code() == Code::Cancelled;
    match lost {
        true => CallError::Lost { what, detail: status.message().to_owned() },
        false => CallError::Refused(status),
    }
}
