//! The listening side: TCP accept, TLS handshakes, and what handlers learn of the peer.
//!
//! ```text
//! listener ──accept──> handshakes (bounded, each with a deadline, each its own task)
//!                          │ done                        │ failed, late, or pushed out
//!                          v                             v
//!                     TlsConnection ──> tonic        logged at debug, dropped
//! ```
//!
//! When all places are taken, the oldest handshake is dropped for the newest: a good peer needs
//! milliseconds, so that the oldest is the one that does nothing. Idle connections thus never
//! keep members out, whatever their number.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, stream};
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::identity::{Identity, PeerError, peer_identity, spki_of};
use crate::tls::{Reloadable, ServerTls};

/// Bounds on what unauthenticated peers can cost.
#[derive(Clone, Copy, Debug)]
pub struct ServeLimits {
    /// A handshake that takes longer is dropped.
    pub handshake_timeout: Duration,
    /// Handshakes at one time.
    pub handshakes_max: usize,
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self { handshake_timeout: Duration::from_secs(5), handshakes_max: 256 }
    }
}

/// How long to leave the listener alone when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long and how much a refused client may still send.
const FAREWELL_TIME: Duration = Duration::from_secs(1);
const FAREWELL_LEN_MAX: u64 = 64 * 1024;

/// Accepted connections for tonic's `serve_with_incoming`. It never ends and yields no errors: what
/// is wrong with one connection, or with accepting for a while, is no reason to stop serving.
pub fn serve_tls(
    listener: TcpListener,
    tls: impl Into<Reloadable<ServerTls>>,
    limits: ServeLimits,
) -> impl Stream<Item = io::Result<TlsConnection>> + Send + 'static {
    stream::unfold(TlsIncoming::new(listener, tls, limits), |mut incoming| async move {
        let connection = incoming.accept().await;
        Some((Ok(connection), incoming))
    })
}

/// A listener whose connections have passed their handshakes. Dropping it drops those under way.
pub struct TlsIncoming {
    listener: TcpListener,
    tls: Reloadable<ServerTls>,
    limits: ServeLimits,
    handshakes: JoinSet<Option<TlsConnection>>,
    /// The handshakes under way, the oldest first.
    oldest: VecDeque<(Id, AbortHandle)>,
}

impl TlsIncoming {
    pub fn new(
        listener: TcpListener,
        tls: impl Into<Reloadable<ServerTls>>,
        limits: ServeLimits,
    ) -> Self {
        let (handshakes, oldest) = (JoinSet::new(), VecDeque::new());
        Self { listener, tls: tls.into(), limits, handshakes, oldest }
    }

    /// The next connection. It may be cancelled without losing one.
    pub async fn accept(&mut self) -> TlsConnection {
        loop {
            tokio::select! {
                Some(done) = self.handshakes.join_next_with_id() => {
                    if let Some(connection) = self.finished(done) {
                        return connection;
                    }
                }
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, remote)) => self.start(stream, remote),
                    Err(error) => self.accept_failed(&error).await,
                },
            }
        }
    }

    fn finished(
        &mut self,
        done: Result<(Id, Option<TlsConnection>), tokio::task::JoinError>,
    ) -> Option<TlsConnection> {
        let (id, connection) = match done {
            Ok(done) => done,
            Err(error) => (error.id(), None),
        };
        self.oldest.retain(|(other, _)| *other != id);
        connection
    }

    fn start(&mut self, stream: TcpStream, remote: SocketAddr) {
        if self.oldest.len() >= self.limits.handshakes_max
            && let Some((_, handle)) = self.oldest.pop_front()
        {
            tracing::debug!(%remote, "dropped the oldest handshake for a new one");
            handle.abort();
        }
        let task = handshake(stream, remote, self.tls.current(), self.limits.handshake_timeout);
        let handle = self.handshakes.spawn(task);
        self.oldest.push_back((handle.id(), handle));
    }

    /// Some errors belong to the one connection that was reset before we took it. The others mean
    /// that no file descriptor or memory is left; accepting again at once would only spin.
    async fn accept_failed(&mut self, error: &io::Error) {
        use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
        if matches!(
            error.kind(),
            ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted
        ) {
            return;
        }
        tracing::warn!(%error, "cannot accept connections");
        if let Some((_, handle)) = self.oldest.pop_front() {
            handle.abort();
        }
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

async fn handshake(
    stream: TcpStream,
    remote_addr: SocketAddr,
    tls: ServerTls,
    limit: Duration,
) -> Option<TlsConnection> {
    // Commands and heartbeats are small and must not wait for more bytes.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%remote_addr, %error, "cannot set TCP_NODELAY");
    }
    let acceptor = TlsAcceptor::from(Arc::clone(tls.config()));
    let accepted = acceptor.accept(stream).into_fallible();
    match tokio::time::timeout(limit, accepted).await {
        Ok(Ok(stream)) => TlsConnection::new(stream, remote_addr, &tls),
        Ok(Err((error, stream))) => {
            tracing::debug!(%remote_addr, %error, "the TLS handshake failed");
            // Whoever is refused by mistake should learn why; whoever does not listen is left.
            let _ = tokio::time::timeout(FAREWELL_TIME, farewell(stream)).await;
            None
        }
        Err(_) => {
            tracing::debug!(%remote_addr, "the TLS handshake took too long");
            None
        }
    }
}

/// Closes after a refusal. A socket that is closed with unread bytes is reset, and the reset can
/// overtake the alert that says why; so what the client had sent already is read first.
async fn farewell(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(FAREWELL_LEN_MAX), &mut tokio::io::sink()).await?;
    Ok(())
}

/// What a handler learns of its peer, from the extensions of the request.
#[derive(Clone, Debug)]
pub struct ConnectInfo {
    pub remote_addr: SocketAddr,
    /// Who the peer is, proven by the cluster's CA; always none on the join port.
    pub identity: Option<Identity>,
    /// The peer's certificates, its own first.
    pub peer_certs: Arc<[CertificateDer<'static>]>,
}

impl ConnectInfo {
    /// The key that the peer has proven to hold, as SubjectPublicKeyInfo in DER.
    pub fn peer_spki(&self) -> Result<Vec<u8>, PeerError> {
        spki_of(self.peer_certs.first().ok_or(PeerError::NoCertificate)?)
    }
}

/// A connection that has passed its handshake.
#[derive(Debug)]
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    info: ConnectInfo,
}

impl TlsConnection {
    fn new(stream: TlsStream<TcpStream>, remote_addr: SocketAddr, tls: &ServerTls) -> Option<Self> {
        let peer_certs: Arc<[_]> = stream.get_ref().1.peer_certificates().unwrap_or(&[]).into();
        let identity = match tls.proven_cluster() {
            // The verifier has read the same certificate already; a failure here is a bug, and
            // the connection is refused rather than served without a name.
            Some(cluster) => Some(peer_identity(&peer_certs, cluster).ok()?),
            None => None,
        };
        Some(Self { stream, info: ConnectInfo { remote_addr, identity, peer_certs } })
    }

    /// What is known of the peer.
    pub fn info(&self) -> &ConnectInfo {
        &self.info
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = ConnectInfo;

    fn connect_info(&self) -> ConnectInfo {
        self.info.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
