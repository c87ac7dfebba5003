//! The connecting side: tonic channels over our own TLS.

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, ClientConfig};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::identity::ServerIdentity;
use crate::tls::Reloadable;

/// How soon a channel notices that its peer is gone.
#[derive(Clone, Copy, Debug)]
pub struct ChannelTimes {
    /// TCP and TLS together.
    pub connect_timeout: Duration,
    /// An HTTP/2 ping is sent after so much silence.
    pub keep_alive_interval: Duration,
    /// A peer that does not answer a ping within this is gone.
    pub keep_alive_timeout: Duration,
}

impl Default for ChannelTimes {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            keep_alive_interval: Duration::from_secs(2),
            keep_alive_timeout: Duration::from_secs(3),
        }
    }
}

/// A channel that connects when it is first used, and again after each loss.
pub fn connect_channel(
    addr: SocketAddr,
    tls: impl Into<Reloadable<Arc<ClientConfig>>>,
    server: ServerIdentity,
) -> Channel {
    connect_channel_with(addr, tls, server, ChannelTimes::default())
}

/// Like [`connect_channel`], with other times.
pub fn connect_channel_with(
    addr: SocketAddr,
    tls: impl Into<Reloadable<Arc<ClientConfig>>>,
    server: ServerIdentity,
    times: ChannelTimes,
) -> Channel {
    let tls = tls.into();
    let connector = service_fn(move |_uri| connect(addr, tls.current(), server));
    // tonic would do TLS itself for `https`; here the connector has done it already, and the URI
    // serves as the HTTP/2 authority only.
    Endpoint::from_static("http://bellwether.internal")
        .connect_timeout(times.connect_timeout)
        .http2_keep_alive_interval(times.keep_alive_interval)
        .keep_alive_timeout(times.keep_alive_timeout)
        .keep_alive_while_idle(true)
        .connect_with_connector_lazy(connector)
}

async fn connect(
    addr: SocketAddr,
    tls: Arc<ClientConfig>,
    server: ServerIdentity,
) -> io::Result<TokioIo<Explained>> {
    let name = ServerName::try_from(server.dns_name()).map_err(io::Error::other)?;
    let stream = TcpStream::connect(addr).await?;
    stream.set_nodelay(true)?;
    let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(explained)?;
    Ok(TokioIo::new(Explained { stream }))
}

/// What an error of a call says about TLS, as a sentence for a person; none if TLS is not the cause.
///
/// tonic shows such a refusal as "transport error" only; the cause lies deep in the sources.
pub fn refusal_by_peer(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        // An `io::Error` gives the *source* of what it wraps; what it wraps must be asked for.
        if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
            && let Some(sentence) = inner.to_string().strip_prefix(MARK)
        {
            return Some(sentence.to_owned());
        }
        next = error.source();
    }
    None
}

/// Begins the text of every error that TLS caused.
const MARK: &str = "TLS: ";

/// A TLS connection whose errors are sentences.
///
/// In TLS 1.3 a client is ready before the server has judged its certificate: a refusal is the
/// error of the first read. HTTP/2 then keeps only the text of an error, so the text must say it.
struct Explained {
    stream: TlsStream<TcpStream>,
}

impl AsyncRead for Explained {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf).map_err(explained)
    }
}

impl AsyncWrite for Explained {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf).map_err(explained)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx).map_err(explained)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs).map_err(explained)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

fn explained(error: io::Error) -> io::Error {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(tls) => io::Error::new(error.kind(), format!("{MARK}{}", explain(tls))),
        None => error,
    }
}

fn explain(error: &rustls::Error) -> String {
    use AlertDescription as Alert;
    let text = match error {
        rustls::Error::AlertReceived(Alert::AccessDenied) => {
            "the server refused the role of this certificate: it serves others on this port"
        }
        rustls::Error::AlertReceived(Alert::UnknownCA) => {
            "the server does not know the CA of this certificate: it is of another cluster"
        }
        rustls::Error::AlertReceived(Alert::CertificateExpired) => {
            "the server refused this certificate as expired or not yet valid: check both clocks"
        }
        rustls::Error::AlertReceived(Alert::CertificateRequired) => {
            "the server wants a certificate"
        }
        rustls::Error::InvalidCertificate(cause) => {
            return format!("the server's certificate was refused: {cause}");
        }
        other => return other.to_string(),
    };
    text.to_owned()
}
