//! The control service of one VMM, on a unix socket of mode 0600.

mod console;
mod convert;
mod pre_copy;
mod service;
mod socket;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bellwether_proto::v1::vmm_server::VmmServer;
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::driver::Handle;
pub use pre_copy::to_pieces;
pub use socket::{SocketError, connect};

/// How long an open connection may delay the end of the process.
const GOODBYE: Duration = Duration::from_millis(500);

/// A bound socket, which disappears with this.
pub struct Listener {
    listener: tokio::net::UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Puts the socket in its place; inside a tokio runtime.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        Ok(Self { listener: socket::bind(path)?, path: path.to_path_buf() })
    }

    /// Serves until `ended`, then until the last answer is out; removes the socket.
    pub async fn serve(
        self,
        handle: Handle,
        ended: oneshot::Receiver<String>,
    ) -> Result<(), tonic::transport::Error> {
        let service = VmmServer::new(service::Service::new(handle));
        let (finish, mut finished) = oneshot::channel();
        let until = async move {
            let _driver_gone = ended.await;
            let _server_gone = finish.send(());
        };
        let server = Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(UnixListenerStream::new(self.listener), until);
        tokio::pin!(server);
        let outcome = tokio::select! {
            outcome = &mut server => outcome,
            _ = &mut finished => {
                // A console that stays open does not keep the process alive.
                tokio::time::timeout(GOODBYE, server).await.unwrap_or(Ok(()))
            }
        };
        socket::remove(&self.path);
        outcome
    }
}
