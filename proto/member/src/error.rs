//! What can go wrong on the way to being a member, and what to do then.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bellwether_types::ClusterId;

/// Why a host did not become a member, or why its files cannot be used.
///
/// [`MemberError::remedy`] gives the next step where there is one.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    #[error("{} holds no member of a cluster", data_dir.display())]
    NotAMember { data_dir: PathBuf },
    #[error("{} already holds a member of a cluster", data_dir.display())]
    AlreadyAMember { data_dir: PathBuf },
    #[error("the data directory {} is not empty", data_dir.display())]
    DataDirNotEmpty { data_dir: PathBuf },
    #[error("{}: {reason}", path.display())]
    BadConfig { path: PathBuf, reason: String },
    #[error("cannot {what} {}: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{0}")]
    Refused(String),
    #[error("the storage {} {problem}", path.display())]
    Storage { path: PathBuf, problem: String },
    #[error(
        "the storage {} belongs to the cluster {owner} (its `{}` says so)",
        path.display(),
        mark.display()
    )]
    StorageTaken { path: PathBuf, owner: ClusterId, mark: PathBuf },
    #[error("the join token cannot be used: {reason}")]
    BadToken { reason: String },
    #[error("the controller at {endpoint} is not of the cluster that made this token ({detail})")]
    WrongCluster { endpoint: SocketAddr, detail: String },
    #[error("no controller of the token can be reached:{}", list(attempts))]
    Unreachable { attempts: Vec<(SocketAddr, String)> },
    #[error("the controller at {endpoint} refused: {message}")]
    Declined { endpoint: SocketAddr, code: tonic::Code, message: String },
    #[error("the controller at {endpoint} got the request, but no answer came back: {reason}")]
    OutcomeUnknown { endpoint: SocketAddr, reason: String },
    #[error("the answer of the controller at {endpoint} cannot be used: {reason}")]
    BadReply { endpoint: SocketAddr, reason: String },
    #[error("cannot {what}: {source}")]
    Pki { what: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("cannot {what}: {reason}")]
    Internal { what: &'static str, reason: String },
}

fn list(attempts: &[(SocketAddr, String)]) -> String {
    attempts.iter().map(|(endpoint, reason)| format!("\n  {endpoint}: {reason}")).collect()
}

impl MemberError {
    pub(crate) fn io(what: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { what, path: path.to_path_buf(), source }
    }

    pub(crate) fn pki<E>(what: &'static str) -> impl FnOnce(E) -> Self
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        move |source| Self::Pki { what, source: Box::new(source) }
    }

    /// What the administrator can do about it.
    pub fn remedy(&self) -> Option<String> {
        let text = match self {
            Self::NotAMember { .. } => {
                "make the first controller with `bell cluster init`, or join with a token from \
                 `bell cluster join-token`"
            }
            Self::AlreadyAMember { .. } => {
                "start that member, or give another --data-dir; to leave the cluster for good, \
                 remove the directory yourself"
            }
            Self::DataDirNotEmpty { .. } => "give a directory that is empty or does not exist yet",
            Self::BadConfig { .. } => "correct the file, or restore it from a backup",
            Self::Storage { .. } => {
                "mount the shared storage first, at the same absolute path on every host"
            }
            Self::StorageTaken { .. } => {
                "give a directory of its own to each cluster. If that one is gone for good, and no \
                 VM of it runs anywhere, remove the file"
            }
            Self::BadToken { .. } => "copy the whole token from `bell cluster join-token`",
            Self::WrongCluster { .. } => {
                "check that the address belongs to the cluster that you want to join; if that \
                 cluster was made anew, make a new token"
            }
            Self::Unreachable { .. } => {
                "check that a controller runs at one of these addresses and that its join port is open"
            }
            Self::OutcomeUnknown { .. } => {
                "the token may be used up: make a new one with `bell cluster join-token` and join again"
            }
            Self::Declined { code, .. } => declined_remedy(*code)?,
            Self::Io { .. }
            | Self::Refused(_)
            | Self::BadReply { .. }
            | Self::Pki { .. }
            | Self::Internal { .. } => return None,
        };
        Some(text.to_owned())
    }
}

fn declined_remedy(code: tonic::Code) -> Option<&'static str> {
    use tonic::Code;
    match code {
        Code::Unauthenticated
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::NotFound => {
            Some("make a new token with `bell cluster join-token` for the role of this host")
        }
        Code::AlreadyExists => Some("give this host another --name"),
        _ => None,
    }
}
