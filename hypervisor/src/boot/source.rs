//! A file that a boot reads: opened, measured, and copied into guest memory piece by piece.
//!
//! The administrator gives it, not a guest, but it can be anything and change under us: nothing is
//! read that is not bounded.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::GuestMemory;

const COPY_BYTES: u64 = 64 * 1024;

/// An open kernel or initrd.
pub struct Source {
    what: &'static str,
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Source {
    /// `what` is the file's name in errors: kernel or initrd.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let failed = |source| BootError::Open { what, path: path.to_path_buf(), source };
        let file = File::open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        Ok(Self { what, path: path.to_path_buf(), file, bytes })
    }

    pub fn path(&self) -> PathBuf {
        self.path.clone()
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills the whole buffer from `offset` on.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), BootError> {
        self.file.read_exact_at(buffer, offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => {
                BootError::Truncated { what: self.what, path: self.path() }
            }
            _ => BootError::Read { what: self.what, path: self.path(), source },
        })
    }

    /// Copies `bytes` bytes from `offset` on to `address`.
    pub fn copy(
        &self,
        memory: &GuestMemory,
        offset: u64,
        bytes: u64,
        address: u64,
    ) -> Result<(), BootError> {
        let mut buffer = vec![0; COPY_BYTES as usize];
        let mut done = 0;
        while done < bytes {
            let part = &mut buffer[..COPY_BYTES.min(bytes - done) as usize];
            self.read(part, offset + done)?;
            memory
                .write_slice(part, GuestAddress(address + done))
                .map_err(|source| BootError::Memory { what: self.what, source })?;
            done += part.len() as u64;
        }
        Ok(())
    }
}
