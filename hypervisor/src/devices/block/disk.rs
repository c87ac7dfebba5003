//! A raw disk: sector n is at byte 512 n of a file or block device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bellwether_types::DiskSpec;

pub const SECTOR_BYTES: u64 = 512;
const ID_BYTES: usize = 20;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("open disk {path} for {access}: {source}")]
    Open { path: PathBuf, access: &'static str, source: io::Error },
    #[error("disk {path} is neither a file nor a block device")]
    Kind { path: PathBuf },
    #[error(
        "disk {path} has {bytes} bytes, which is not a multiple of {SECTOR_BYTES}; is it a raw image?"
    )]
    Size { path: PathBuf, bytes: u64 },
    #[error("disk {path} is empty")]
    Empty { path: PathBuf },
    #[error(
        "disk {path} is given as raw and begins like a {format} image; convert it (`qemu-img convert \
         -O raw`), or zero its first sector if a raw disk is what it is"
    )]
    OtherFormat { path: PathBuf, format: &'static str },
}

/// How images begin whose sectors are not where a raw image has them. A guest would find no file
/// system in one, and what it writes would destroy the image.
const OTHER_FORMATS: [(&[u8], &str); 7] = [
    (b"QFI\xfb", "qcow2"),
    (b"QED\0", "QED"),
    (b"KDMV", "VMDK"),
    (b"# Disk DescriptorFile", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VHD"),
    (b"<<< Oracle VM VirtualBox Disk Image", "VDI"),
];

/// Whether the host may hold back what the guest wrote until the guest flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    UntilFlush,
    None,
}

/// An open disk.
pub struct Disk {
    index: usize,
    path: PathBuf,
    file: File,
    sectors: u64,
    read_only: bool,
    /// A sync has failed: what was cached may be lost, and a later sync would not say so.
    sync_failed: AtomicBool,
}

impl Disk {
    /// Opens the disk without locking it. `index` is its place in the VM's specification.
    ///
    /// Under [`Caching::None`] each write is on the storage before it completes. A lease needs that:
    /// dirty pages that the host writes back after the deadline would be writes without leave.
    pub fn open(index: usize, spec: &DiskSpec, caching: Caching) -> Result<Self, DiskError> {
        let path = spec.path.clone();
        let access = if spec.read_only { "reading" } else { "reading and writing" };
        let file = OpenOptions::new()
            .read(true)
            .write(!spec.read_only)
            .custom_flags(if caching == Caching::None { libc::O_DSYNC } else { 0 })
            .open(&path)
            .map_err(|source| DiskError::Open { path: path.clone(), access, source })?;
        let bytes = size_of(&file, &path, access)?;
        if bytes == 0 {
            return Err(DiskError::Empty { path });
        }
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size { path, bytes });
        }
        Ok(Self {
            index,
            path,
            file,
            sectors: bytes / SECTOR_BYTES,
            read_only: spec.read_only,
            sync_failed: AtomicBool::new(false),
        })
    }

    /// Refuses what is no raw image, before a guest boots from it. (One that runs may write to its
    /// first sector what it likes.)
    pub fn check_format(&self) -> Result<(), DiskError> {
        let mut start = [0; SECTOR_BYTES as usize];
        self.read(&mut start, 0).map_err(|source| {
            let access = if self.read_only { "reading" } else { "reading and writing" };
            DiskError::Open { path: self.path.clone(), access, source }
        })?;
        match OTHER_FORMATS.iter().find(|(magic, _)| start.starts_with(magic)) {
            Some((_, format)) => Err(DiskError::OtherFormat { path: self.path.clone(), format }),
            None => Ok(()),
        }
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, whose lock makes the disk ours: all I/O goes through this same one.
    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What GET_ID answers, padded with zeros.
    pub fn id(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        let text = format!("bellwether-disk{}", self.index);
        let length = text.len().min(ID_BYTES);
        id[..length].copy_from_slice(&text.as_bytes()[..length]);
        id
    }

    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    pub fn write(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buffer, offset)
    }

    /// Makes all writes durable. After a failure it fails for ever: the kernel forgets the pages
    /// that it could not write, and nothing may be acknowledged as durable on top of them.
    pub fn sync(&self) -> io::Result<()> {
        if self.sync_failed.load(Ordering::SeqCst) {
            return Err(io::Error::other("an earlier sync failed"));
        }
        self.file.sync_data().inspect_err(|error| {
            self.sync_failed.store(true, Ordering::SeqCst);
            tracing::error!(disk = %self.path.display(), %error, "sync failed, writes may be lost");
        })
    }
}

fn size_of(file: &File, path: &Path, access: &'static str) -> Result<u64, DiskError> {
    let failed = |source| DiskError::Open { path: path.to_path_buf(), access, source };
    let metadata = file.metadata().map_err(failed)?;
    if metadata.file_type().is_block_device() {
        return (&*file).seek(SeekFrom::End(0)).map_err(failed);
    }
    if !metadata.is_file() {
        return Err(DiskError::Kind { path: path.to_path_buf() });
    }
    Ok(metadata.len())
}
