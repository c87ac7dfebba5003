//! The unix socket: created atomically, with mode 0600, in a directory that is ours.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixListener;
use tonic::transport::{Channel, Endpoint};

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("API socket {path}: another VMM answers there; give each VMM its own socket")]
    InUse { path: PathBuf },
    #[error("API socket {path}: there is another kind of file; remove it or give another path")]
    NotASocket { path: PathBuf },
    #[error("API socket {path}: {operation}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
}

/// Binds under a name of our own, sets the mode, and renames: nobody ever sees the socket with
/// another mode, and a stale one of a VMM that was killed is replaced.
pub(super) fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let failed =
        |operation| move |source| SocketError::Io { operation, path: path.to_path_buf(), source };
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        let create = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        create.map_err(failed("create its directory"))?;
    }
    check_free(path)?;
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}", std::process::id()));
    let partial = PathBuf::from(partial);
    let _stale = fs::remove_file(&partial);
    let listener = UnixListener::bind(&partial).map_err(failed("bind"))?;
    let mode = fs::Permissions::from_mode(0o600);
    fs::set_permissions(&partial, mode)
        .and_then(|()| fs::rename(&partial, path))
        .map_err(failed("put it in its place"))?;
    Ok(listener)
}

fn check_free(path: &Path) -> Result<(), SocketError> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path.to_path_buf() });
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse { path: path.to_path_buf() }),
        Err(_) => Ok(()),
    }
}

pub(super) fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "the socket was gone already");
    }
}

/// A client's connection to a VMM.
pub async fn connect(path: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = path.to_path_buf();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?)) }
    });
    // The address is never resolved: the connector ignores it.
    Endpoint::from_static("http://vmm").connect_with_connector(connector).await
}
