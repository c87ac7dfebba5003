//! Locks on disk images. They, not the claim, stand between two VMMs and one disk.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::ofd::{self, Mode};
use crate::retry;

/// A disk could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum DiskLockError {
    #[error("disk {}: in use by another VMM (its lock is held)", path.display())]
    Held { path: PathBuf },
    #[error("{operation} of disk {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
}

/// The lock on a disk image, over all its bytes: exclusive for a writable disk, shared with other
/// readers for a read-only one. Held until it is dropped or the process ends.
///
/// It belongs to the open file that was given, and so to every duplicate of it. On NFS the I/O must
/// go through that same open file: only its writes fail when the server takes the lock away. On a
/// block device the lock holds among the processes of one kernel only.
///
/// Drain the disk's I/O before dropping the lock.
#[derive(Debug)]
pub struct DiskLock {
    file: File,
}

impl DiskLock {
    /// Locks the disk, once, without waiting. The path is for messages only.
    pub fn acquire(file: &File, path: &Path, read_only: bool) -> Result<Self, DiskLockError> {
        let io_error = |operation| {
            move |source| DiskLockError::Io { operation, path: path.to_owned(), source }
        };
        let mode = if read_only { Mode::Read } else { Mode::Write };
        if !ofd::try_lock(file, mode).map_err(io_error("locking"))? {
            return Err(DiskLockError::Held { path: path.to_owned() });
        }
        // A duplicate shares the open file, and so the lock.
        let file = file.try_clone().map_err(io_error("duplication"))?;
        Ok(Self { file })
    }

    /// The same, but while the disk is in use it is tried again, until the deadline.
    pub fn acquire_within(
        file: &File,
        path: &Path,
        read_only: bool,
        deadline: Instant,
    ) -> Result<Self, DiskLockError> {
        let held = |error: &DiskLockError| matches!(error, DiskLockError::Held { .. });
        retry::until(deadline, held, || Self::acquire(file, path, read_only))
    }
}

impl Drop for DiskLock {
    fn drop(&mut self) {
        // If this fails, the lock ends with the last descriptor of the file: late, but safe.
        let _unlocked = ofd::unlock(&self.file);
    }
}
