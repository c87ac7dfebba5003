//! Whose storage it is: a file in it names its cluster.
//!
//! A path that is the same on every host says nothing about what is mounted there. Locks on another
//! storage, or on a host's own disk below an empty mount point, would be seen by nobody else.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bellwether_types::ClusterId;

use crate::files::write_atomic;
use crate::{MemberError, files};

/// The file in the storage's root: the cluster's id and a newline.
pub const STORAGE_MARK: &str = "cluster.id";
/// A UUID and a newline, and some more to notice anything else.
const MARK_BYTES_MAX: u64 = 64;

/// The cluster whose storage this is; none where no cluster was made with it.
pub fn storage_owner(storage: &Path) -> io::Result<Option<ClusterId>> {
    let file = match std::fs::File::open(storage.join(STORAGE_MARK)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut text = String::new();
    file.take(MARK_BYTES_MAX).read_to_string(&mut text)?;
    let id = text.trim_end().parse();
    id.map(Some).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is no cluster's id"))
}

/// Refuses a storage of another cluster.
pub(crate) fn check_unowned(storage: &Path) -> Result<(), MemberError> {
    let mark = storage.join(STORAGE_MARK);
    let owner = storage_owner(storage).map_err(|source| MemberError::io("read", &mark, source))?;
    match owner {
        None => Ok(()),
        Some(owner) => Err(MemberError::StorageTaken { path: storage.to_owned(), owner, mark }),
    }
}

/// The mark of a cluster in the making. It stays with [`Mark::keep`], or goes.
pub(crate) struct Mark(Option<PathBuf>);

impl Mark {
    pub(crate) fn set(storage: &Path, cluster: ClusterId) -> Result<Self, MemberError> {
        let path = storage.join(STORAGE_MARK);
        write_atomic(&path, format!("{cluster}\n").as_bytes(), 0o644)?;
        Ok(Self(Some(path)))
    }

    pub(crate) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            // The error that counts is the one that led here.
            let _ = std::fs::remove_file(&path);
            let _ = files::sync_dir(files::parent(&path));
        }
    }
}
