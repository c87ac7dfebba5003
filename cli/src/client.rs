//! Asking the cluster: which controller, how long, and when to ask another.
//!
//! Each command tries the endpoints of its context in order and remembers nothing. A question may be
//! asked again anywhere. A deed is given to another controller only if it is certain that the one
//! before has not begun it; otherwise the outcome is unknown, and the administrator is told so.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bellwether_member::CallFailure;
use bellwether_pki::{IdentityFiles, Role, ServerIdentity, client_config, connect_channel};
use bellwether_proto::v1::admin_client::AdminClient;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::contexts::Context;
use crate::exit::{Exit, Failure, Subject};

pub type Client = AdminClient<Channel>;

/// How long an answer is awaited unless `--timeout` says otherwise: several election times.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// A controller that says nothing for so long is passed over when there is another to ask.
const QUESTION_SHARE_MIN: Duration = Duration::from_secs(3);
/// Between two rounds through the endpoints while the cluster elects a leader.
pub const ROUND_PAUSE: Duration = Duration::from_millis(200);

const NO_LEADER: &str = "more than half of the controllers must run and reach each other; \
    see `bell cluster status`";

/// Whether a request may be repeated when its outcome is unknown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Question,
    Deed,
}

/// The controllers of one context.
pub struct Cluster {
    endpoints: Vec<SocketAddr>,
    tls: Arc<rustls::ClientConfig>,
    /// When the whole command gives up, if `--timeout` was given.
    deadline: Option<Instant>,
}

/// What to do after one attempt.
enum Next {
    /// Ask the next controller; it has not begun, for this reason.
    Elsewhere(String),
    /// Like `Elsewhere`, and the controller itself says that it will be able to soon.
    Later(String),
    GiveUp(Failure),
}

impl Cluster {
    /// Reads the identity of the context; connects to nobody yet.
    pub fn open(name: &str, context: &Context, timeout: Option<Duration>) -> Result<Self, Failure> {
        let bad = |reason: String| {
            Failure::new(Exit::Forbidden, format!("context `{name}`: {reason}"))
                .remedy("repair the identity, or set another with `bell context add`")
        };
        let files =
            IdentityFiles::load(&context.identity).map_err(|error| bad(error.to_string()))?;
        if files.role() != Role::Admin {
            return Err(bad(format!(
                "the identity is of a {}; an admin's is needed",
                files.identity()
            )));
        }
        Ok(Self {
            endpoints: context.endpoints.clone(),
            tls: client_config(&files).map_err(|error| bad(error.to_string()))?,
            deadline: timeout.map(|time| Instant::now() + time),
        })
    }

    /// When the whole command gives up.
    pub const fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub fn endpoints(&self) -> &[SocketAddr] {
        &self.endpoints
    }

    /// A client of one controller, connecting on first use.
    pub fn client(&self, endpoint: SocketAddr) -> Client {
        let tls = Arc::clone(&self.tls);
        // Guests may print faster than a terminal reads, and lists may be long.
        AdminClient::new(connect_channel(endpoint, tls, ServerIdentity::AnyController))
            .max_decoding_message_size(64 << 20)
    }

    /// Asks something that changes nothing.
    pub async fn ask<T>(
        &self,
        what: &str,
        subject: &Subject,
        call: impl AsyncFn(Client) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        self.call(Kind::Question, what, subject, call).await
    }

    /// Has something done, once.
    pub async fn act<T>(
        &self,
        what: &str,
        subject: &Subject,
        call: impl AsyncFn(Client) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        self.call(Kind::Deed, what, subject, call).await
    }

    async fn call<T>(
        &self,
        kind: Kind,
        what: &str,
        subject: &Subject,
        call: impl AsyncFn(Client) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let until = self.deadline.unwrap_or(Instant::now() + ANSWER_TIMEOUT);
        loop {
            let (mut reasons, mut soon) = (Vec::new(), false);
            for (index, &endpoint) in self.endpoints.iter().enumerate() {
                let share = self.share(kind, until, index);
                let answer = timeout_at(share, call(self.client(endpoint))).await;
                let next = match answer {
                    Ok(Ok(reply)) => return Ok(reply.into_inner()),
                    Ok(Err(status)) => after(kind, what, subject, &status),
                    Err(_) => after_silence(kind, what, until),
                };
                let reason = match next {
                    Next::GiveUp(failure) => return Err(failure),
                    Next::Later(reason) => {
                        soon = true;
                        reason
                    }
                    Next::Elsewhere(reason) => reason,
                };
                reasons.push((endpoint, reason));
            }
            // Without a leader the controllers answer and cannot serve; that passes by itself.
            if !soon || Instant::now() + ROUND_PAUSE >= until {
                let failure = unreachable(what, &reasons);
                return Err(if soon { failure.remedy(NO_LEADER) } else { failure });
            }
            sleep(ROUND_PAUSE).await;
        }
    }

    /// Until when one controller may take. A deed gets all the time, as nobody else will be asked.
    fn share(&self, kind: Kind, until: Instant, index: usize) -> Instant {
        let left = until.saturating_duration_since(Instant::now());
        let others = u32::try_from(self.endpoints.len() - index).unwrap_or(1);
        match kind {
            Kind::Deed => until,
            Kind::Question => until.min(Instant::now() + (left / others).max(QUESTION_SHARE_MIN)),
        }
    }
}

fn after(kind: Kind, what: &str, subject: &Subject, status: &Status) -> Next {
    match CallFailure::of(status) {
        CallFailure::NotConnected(reason) | CallFailure::ServerRefused(reason) => {
            Next::Elsewhere(reason)
        }
        CallFailure::NotStarted(reason) => Next::Later(reason),
        CallFailure::ClientRefused(reason) => Next::GiveUp(
            Failure::new(Exit::Forbidden, format!("cannot {what}: {reason}"))
                .remedy("use another --context, or renew its identity"),
        ),
        CallFailure::Lost(reason) => match kind {
            Kind::Question => Next::Elsewhere(reason),
            Kind::Deed => Next::GiveUp(Failure::outcome_unknown(what, &reason)),
        },
        CallFailure::Answered => match (status.code(), kind) {
            (Code::Unavailable, Kind::Question) => Next::Later(status.message().to_owned()),
            (Code::Unavailable, Kind::Deed) => {
                Next::GiveUp(Failure::outcome_unknown(what, status.message()))
            }
            _ => Next::GiveUp(Failure::from_status(what, subject, status)),
        },
    }
}

fn after_silence(kind: Kind, what: &str, until: Instant) -> Next {
    match kind {
        Kind::Deed => Next::GiveUp(Failure::outcome_unknown(what, "no answer in time")),
        Kind::Question if Instant::now() >= until => Next::GiveUp(
            Failure::new(Exit::Unknown, format!("cannot {what}: no answer in time"))
                .remedy("give it longer with --timeout, or see `bell cluster status`"),
        ),
        Kind::Question => Next::Elsewhere("no answer".into()),
    }
}

/// Nobody could serve, and nothing was done.
pub fn unreachable(what: &str, reasons: &[(SocketAddr, String)]) -> Failure {
    let list: String =
        reasons.iter().map(|(endpoint, reason)| format!("\n  {endpoint}: {reason}")).collect();
    let message = match reasons.is_empty() {
        true => format!("cannot {what}: the context has no endpoints"),
        false => format!("cannot {what}: no controller can serve it:{list}"),
    };
    Failure::new(Exit::Unreachable, message)
        .remedy("check that controllers run at these addresses; `bell context add` sets others")
}
