//! A cluster's CA, its members, and servers on loopback.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bellwether_pki::{
    Ca, ConnectInfo, Identity, IdentityFiles, KeyAndCsr, Reloadable, RequireRole, Role,
    ServeLimits, ServerIdentity, ServerTls, Validity, VerifiedCsr, connect_channel,
    refusal_by_peer, serve_tls,
};
use bellwether_types::ClusterId;
use http::{HeaderMap, Request, Response};
use rustls::ClientConfig;
use tokio::net::TcpListener;
use tonic::body::Body;
use tower::{Layer, ServiceExt, service_fn};
use uuid::Uuid;

pub const ROLES: [Role; 3] = [Role::Controller, Role::Agent, Role::Admin];

pub fn new_ca() -> Ca {
    Ca::create(ClusterId::from_uuid(Uuid::now_v7()), "lab").unwrap()
}

pub fn identity(ca: &Ca, role: Role, id: u64) -> Identity {
    Identity { cluster: ca.cluster(), role, id, name: format!("node{id}") }
}

pub fn member(ca: &Ca, role: Role) -> IdentityFiles {
    member_at(ca, role, if role == Role::Admin { 0 } else { 2 })
}

pub fn member_at(ca: &Ca, role: Role, id: u64) -> IdentityFiles {
    let key = KeyAndCsr::generate("host").unwrap();
    let issued = issue(ca, &identity(ca, role, id), &key, Validity::days(SystemTime::now(), 1));
    IdentityFiles::from_pem(ca.certificate_pem(), &issued, &key.key_pem(), None).unwrap()
}

pub fn issue(ca: &Ca, identity: &Identity, key: &KeyAndCsr, validity: Validity) -> String {
    let csr = VerifiedCsr::parse(key.csr_pem()).unwrap();
    ca.issue(identity, &csr, validity).unwrap().pem().to_owned()
}

/// A validity around a moment that is so many days from now.
pub fn validity_at(days: i64) -> (SystemTime, Validity) {
    let span = Duration::from_secs(24 * 3600 * days.unsigned_abs());
    let now = SystemTime::now();
    let then = if days < 0 { now - span } else { now + span };
    let hour = Duration::from_secs(3600);
    (then, Validity { not_before: then - hour, not_after: then + hour })
}

/// Writes files as they are, without the checks of `save`.
pub fn write_raw(dir: &Path, files: &[(&str, &str)]) {
    use std::os::unix::fs::PermissionsExt;
    for (name, text) in files {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
}

/// A server that answers every call with what it knows of the caller.
pub async fn serve(tls: impl Into<Reloadable<ServerTls>>) -> SocketAddr {
    serve_limited(tls, ServeLimits::default()).await
}

pub async fn serve_limited(
    tls: impl Into<Reloadable<ServerTls>>,
    limits: ServeLimits,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let incoming = serve_tls(listener, tls, limits);
    let server = tonic::transport::Server::builder().serve_with_incoming(service_fn(who), incoming);
    tokio::spawn(server);
    addr
}

/// The same behind a role check for the whole server.
pub async fn serve_for(tls: ServerTls, roles: &[Role]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let incoming = serve_tls(listener, tls, ServeLimits::default());
    let service = RequireRole::any_of(roles).layer(service_fn(who));
    tokio::spawn(tonic::transport::Server::builder().serve_with_incoming(service, incoming));
    addr
}

async fn who(request: Request<Body>) -> Result<Response<Body>, std::convert::Infallible> {
    let info = request.extensions().get::<ConnectInfo>().unwrap();
    let who = info.identity.as_ref().map_or("nobody".to_owned(), Identity::uri);
    let key = info.peer_spki().map_or(0, |spki| spki.len());
    let response = Response::builder()
        .header("grpc-status", "0")
        .header("content-type", "application/grpc")
        .header("x-who", who)
        .header("x-key-len", key)
        .body(Body::empty());
    Ok(response.unwrap())
}

/// One call; a refusal is the sentence that a person would see.
pub async fn call(
    addr: SocketAddr,
    tls: Arc<ClientConfig>,
    server: ServerIdentity,
) -> Result<HeaderMap, String> {
    let request = Request::builder().method("POST").uri("/test.Who/Who").body(Body::empty());
    let answer = connect_channel(addr, tls, server).oneshot(request.unwrap());
    match tokio::time::timeout(Duration::from_secs(20), answer).await.unwrap() {
        Ok(response) => Ok(response.headers().clone()),
        Err(error) => Err(refusal_by_peer(&error).unwrap_or_else(|| format!("opaque: {error:?}"))),
    }
}

pub fn header(headers: &HeaderMap, name: &str) -> String {
    headers.get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default()
}
