//! Connections that a test can cut: packets vanish, and nobody is told.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::ConnectError;

/// Whether packets vanish.
pub type Gate = Arc<AtomicBool>;

struct Gated {
    stream: TcpStream,
    gates: [Gate; 2],
}

impl Gated {
    fn cut(&self) -> bool {
        self.gates.iter().any(|gate| gate.load(Ordering::SeqCst))
    }
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        if self.cut() {
            buf.set_filled(filled);
            return Poll::Pending;
        }
        result
    }
}

impl AsyncWrite for Gated {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.cut() {
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Connects in plain text through the gates of both ends.
pub async fn connect(address: SocketAddr, gates: [Gate; 2]) -> Result<Channel, ConnectError> {
    let connector = service_fn(move |_| {
        let gates = gates.clone();
        async move {
            if gates.iter().any(|gate| gate.load(Ordering::SeqCst)) {
                std::future::pending::<()>().await;
            }
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok::<_, io::Error>(TokioIo::new(Gated { stream, gates }))
        }
    });
    Ok(Endpoint::from_static("http://peer").connect_with_connector(connector).await?)
}
