//! Any controller takes a request; the leader answers it.
//!
//! A controller that does not lead passes the whole HTTP/2 request on to the leader, streams
//! included, over its own certificate, and says in a header on whose behalf. Only controllers may
//! use that header. A request is passed on once: a controller that is asked on somebody's behalf
//! and does not lead either answers UNAVAILABLE, and the caller tries again.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bellwether_member::not_started;
use bellwether_pki::{ConnectInfo, Identity, Role};
use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response};
use tonic::Status;
use tonic::body::Body;
use tonic::transport::Channel;
use tower::{Layer, Service, ServiceExt};

use crate::controller::Controller;

/// Who really asks, as the URI of the certificate.
const ON_BEHALF_OF: &str = "bellwether-on-behalf-of";

/// How long a request waits for an election to end.
const ELECTION_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub struct ForwardLayer {
    controller: Arc<Controller>,
}

impl ForwardLayer {
    pub fn new(controller: Arc<Controller>) -> Self {
        Self { controller }
    }
}

impl<S> Layer<S> for ForwardLayer {
    type Service = Forward<S>;

    fn layer(&self, inner: S) -> Forward<S> {
        Forward { inner, controller: Arc::clone(&self.controller) }
    }
}

#[derive(Clone)]
pub struct Forward<S> {
    inner: S,
    controller: Arc<Controller>,
}

impl<S> Service<Request<Body>> for Forward<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let controller = Arc::clone(&self.controller);
        Box::pin(async move {
            let forwarded = match adopt_identity(&controller, &mut request) {
                Ok(forwarded) => forwarded,
                Err(status) => return Ok(status.into_http()),
            };
            match route(&controller, forwarded).await {
                Ok(Route::Here) => inner.call(request).await,
                Ok(Route::To(channel)) => Ok(pass_on(channel, request).await),
                Err(status) => Ok(status.into_http()),
            }
        })
    }
}

enum Route {
    Here,
    To(Channel),
}

/// Takes over the identity that a controller vouches for. Returns whether the request was
/// passed on already.
fn adopt_identity(controller: &Controller, request: &mut Request<Body>) -> Result<bool, Status> {
    let Some(header) = request.headers_mut().remove(ON_BEHALF_OF) else {
        return Ok(false);
    };
    let info = request.extensions_mut().get_mut::<ConnectInfo>();
    let Some(info) = info.filter(|info| is_controller(info)) else {
        return Err(Status::permission_denied("only controllers speak on somebody's behalf"));
    };
    let uri = header.to_str().unwrap_or_default();
    let identity = Identity::from_uri(uri)
        .map_err(|error| Status::invalid_argument(format!("{ON_BEHALF_OF}: {error}")))?;
    if identity.cluster != controller.member.cluster_id {
        return Err(Status::permission_denied("the request is of another cluster"));
    }
    info.identity = Some(identity);
    Ok(true)
}

fn is_controller(info: &ConnectInfo) -> bool {
    info.identity.as_ref().is_some_and(|identity| identity.role == Role::Controller)
}

async fn route(controller: &Controller, forwarded: bool) -> Result<Route, Status> {
    let mut watch = controller.raft.watch_status();
    let known = watch.wait_for(|status| status.leader.is_some() || status.stopped.is_some());
    let status = match tokio::time::timeout(ELECTION_PATIENCE, known).await {
        Ok(Ok(status)) => status,
        Ok(Err(stopped)) => return Err(Status::unavailable(stopped.to_string())),
        Err(_) => {
            return Err(not_started(
                "the controllers have no leader: most of them are down or cannot reach each other; \
                 VMs go on",
            ));
        }
    };
    match status.leader {
        Some((id, _)) if id == status.node_id => Ok(Route::Here),
        Some((id, node)) if !forwarded => {
            let channel = controller.links.api(id, &node).map_err(Status::unavailable)?;
            Ok(Route::To(channel))
        }
        _ => Err(not_started("the leader has just changed")),
    }
}

async fn pass_on(mut channel: Channel, mut request: Request<Body>) -> Response<Body> {
    let identity = request.extensions().get::<ConnectInfo>().and_then(|info| info.identity.clone());
    let uri = identity.map(|identity| identity.uri()).unwrap_or_default();
    match HeaderValue::from_str(&uri) {
        Ok(value) if !uri.is_empty() => request.headers_mut().insert(ON_BEHALF_OF, value),
        _ => return Status::unauthenticated("the connection shows no certificate").into_http(),
    };
    let sent = match channel.ready().await {
        Ok(ready) => ready.call(request).await,
        Err(error) => Err(error),
    };
    sent.unwrap_or_else(|error| unreachable_leader(&error).into_http())
}

/// Without a connection nothing was sent; afterwards nobody can know.
fn unreachable_leader(error: &tonic::transport::Error) -> Status {
    let mut causes = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
    match causes.any(|cause| cause.is::<tonic::ConnectError>()) {
        true => not_started("the leader cannot be reached"),
        false => Status::unknown("the connection to the leader broke: the outcome is unknown"),
    }
}
