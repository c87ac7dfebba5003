//! Reading and writing at offsets, past the page cache where the storage lets us.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::{StateFileError, io_error};

/// What O_DIRECT asks of addresses, offsets and lengths, on every file system that we know.
const ALIGNMENT: usize = 4096;

/// A buffer whose bytes start at a page boundary, as O_DIRECT needs it.
#[derive(Debug)]
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuf {
    /// A buffer of this length, filled with zeros.
    pub fn new(length: usize) -> Self {
        let bytes = vec![0; length + ALIGNMENT];
        let start = bytes.as_ptr().addr().wrapping_neg() % ALIGNMENT;
        Self { bytes, start, length }
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

/// A file opened twice: through the page cache, and with O_DIRECT if the file system takes it.
///
/// Requests that are not aligned go through the page cache. A file system that refuses a direct
/// request (EINVAL) is not asked again.
#[derive(Debug)]
pub(crate) struct DirectFile {
    path: PathBuf,
    buffered: File,
    direct: Option<File>,
    refused: AtomicBool,
    requests: AtomicU64,
}

impl DirectFile {
    /// Takes an open file and tries to open it again for direct access.
    pub(crate) fn new(path: &Path, buffered: File, write: bool) -> Self {
        let direct = OpenOptions::new()
            .read(!write)
            .write(write)
            .custom_flags((OFlags::DIRECT | OFlags::NOFOLLOW).bits() as i32)
            .open(path)
            .ok()
            .filter(|direct| same_file(direct, &buffered));
        let refused = AtomicBool::new(direct.is_none());
        Self { path: path.to_owned(), buffered, direct, refused, requests: AtomicU64::new(0) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn buffered(&self) -> &File {
        &self.buffered
    }

    /// From now on everything goes through the page cache.
    pub(crate) fn refuse_direct(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Whether requests still bypass the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// The system calls made so far.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Writes all bytes at the offset.
    pub(crate) fn write_all_at(
        &self,
        operation: &'static str,
        bytes: &[u8],
        offset: u64,
    ) -> Result<(), StateFileError> {
        let mut done = 0;
        while done < bytes.len() {
            let (rest, at) = (&bytes[done..], offset + done as u64);
            match self.transfer(rest.as_ptr(), rest.len(), at, |file| file.write_at(rest, at)) {
                Ok(0) => {
                    return Err(io_error(operation, &self.path)(io::ErrorKind::WriteZero.into()));
                }
                Ok(count) => done += count,
                Err(error) => return Err(io_error(operation, &self.path)(error)),
            }
        }
        Ok(())
    }

    /// Fills the buffer from the offset; the end of the file is an error.
    pub(crate) fn read_exact_at(
        &self,
        operation: &'static str,
        bytes: &mut [u8],
        offset: u64,
    ) -> Result<(), StateFileError> {
        let mut done = 0;
        while done < bytes.len() {
            let (rest, at) = (&mut bytes[done..], offset + done as u64);
            let (address, length) = (rest.as_ptr(), rest.len());
            match self.transfer(address, length, at, |file| file.read_at(&mut *rest, at)) {
                Ok(0) => {
                    let error = io::ErrorKind::UnexpectedEof.into();
                    return Err(io_error(operation, &self.path)(error));
                }
                Ok(count) => done += count,
                Err(error) => return Err(io_error(operation, &self.path)(error)),
            }
        }
        Ok(())
    }

    /// Drops what the page cache has of a range, so that the next read asks the storage; direct
    /// reads do in any case.
    pub(crate) fn forget_cached(&self, offset: u64, length: u64) {
        if !self.is_direct() {
            let length = std::num::NonZeroU64::new(length);
            // Advice that is not taken costs a checksum error at worst, and a second reading.
            let _advice =
                rustix::fs::fadvise(&self.buffered, offset, length, rustix::fs::Advice::DontNeed);
        }
    }

    /// Makes one request, direct if it may be; repeats it when interrupted or refused.
    fn transfer(
        &self,
        address: *const u8,
        length: usize,
        offset: u64,
        mut request: impl FnMut(&File) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let aligned = (address.addr() | length | offset as usize).is_multiple_of(ALIGNMENT);
        loop {
            self.requests.fetch_add(1, Ordering::Relaxed);
            let direct = self.direct.as_ref().filter(|_| aligned && self.is_direct());
            match request(direct.unwrap_or(&self.buffered)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if direct.is_some()
                        && error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) =>
                {
                    self.refuse_direct();
                }
                outcome => return outcome,
            }
        }
    }
}

fn same_file(one: &File, other: &File) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned() {
        for length in [0, 1, 4096, 1 << 20] {
            let mut buffer = AlignedBuf::new(length);
            assert_eq!(buffer.as_slice().as_ptr().addr() % ALIGNMENT, 0);
            assert_eq!(buffer.as_mut_slice().len(), length);
        }
    }

    #[test]
    fn a_full_device_is_an_error_with_operation_and_path() {
        let path = Path::new("/dev/full");
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let file = DirectFile::new(path, file, true);
        let error = file.write_all_at("write memory", &[1; 4096], 0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "write memory of state file /dev/full: No space left on device (os error 28)"
        );
    }

    #[test]
    fn reading_past_the_end_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let direct = DirectFile::new(file.path(), file.reopen().unwrap(), false);
        let error = direct.read_exact_at("read header", &mut [0; 8], 0).unwrap_err();
        assert!(matches!(error, StateFileError::Io { operation: "read header", .. }));
    }
}
