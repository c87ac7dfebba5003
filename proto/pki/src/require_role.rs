//! Which roles may call which service.

use std::future::{Ready, ready};
use std::task::{Context, Poll};

use futures::TryFutureExt;
use futures::future::{Either, MapOk};
use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tonic::service::Interceptor;
use tower::{Layer, Service};

use crate::identity::{Identity, Role};
use crate::serve::ConnectInfo;

/// Lets only callers of these roles pass, and says to the others why not.
///
/// As a [`tower::Layer`] it guards a whole server, as an [`Interceptor`] one service of it.
#[derive(Clone, Debug)]
pub struct RequireRole {
    allowed: Box<[Role]>,
}

impl RequireRole {
    /// Any of these roles is enough.
    pub fn any_of(allowed: &[Role]) -> Self {
        Self { allowed: allowed.into() }
    }

    /// The caller's identity, if its role is allowed.
    pub fn check<'a>(&self, info: Option<&'a ConnectInfo>) -> Result<&'a Identity, Status> {
        let identity = info.and_then(|info| info.identity.as_ref()).ok_or_else(unauthenticated)?;
        if self.allowed.contains(&identity.role) {
            return Ok(identity);
        }
        Err(Status::permission_denied(wrong_role(&self.allowed, identity)))
    }
}

/// Who calls. A handler uses it to compare the caller with what the request says.
pub fn caller<T>(request: &tonic::Request<T>) -> Result<&Identity, Status> {
    let info = request.extensions().get::<ConnectInfo>();
    info.and_then(|info| info.identity.as_ref()).ok_or_else(unauthenticated)
}

fn unauthenticated() -> Status {
    Status::unauthenticated("the connection shows no certificate of this cluster")
}

/// The sentence for a caller of the wrong role.
pub(crate) fn wrong_role(allowed: &[Role], identity: &Identity) -> String {
    let served: Vec<String> = allowed.iter().map(|role| format!("{role}s")).collect();
    let served = served.join(" and ");
    format!("this port serves {served}; the certificate says {identity}")
}

impl Interceptor for RequireRole {
    fn call(&mut self, request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        self.check(request.extensions().get::<ConnectInfo>())?;
        Ok(request)
    }
}

impl<S> Layer<S> for RequireRole {
    type Service = RequireRoleService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        RequireRoleService { inner, require: self.clone() }
    }
}

/// A service behind [`RequireRole`].
#[derive(Clone, Debug)]
pub struct RequireRoleService<S> {
    inner: S,
    require: RequireRole,
}

impl<S, B, R> Service<Request<B>> for RequireRoleService<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: http_body::Body<Data = tonic::codegen::Bytes> + Send + 'static,
    R::Error: Into<tonic::codegen::StdError>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<
        MapOk<S::Future, fn(Response<R>) -> Response<Body>>,
        Ready<Result<Self::Response, Self::Error>>,
    >;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self.require.check(request.extensions().get::<ConnectInfo>()) {
            Ok(_) => {
                let wrap: fn(Response<R>) -> Response<Body> = |response| response.map(Body::new);
                Either::Left(self.inner.call(request).map_ok(wrap))
            }
            Err(status) => Either::Right(ready(Ok(status.into_http()))),
        }
    }
}
