//! A kernel in one of the forms that can be started. The form is seen from the file's first bytes.

use std::path::Path;

use super::source::Source;
use super::{BootError, bzimage, elf};
use crate::GuestMemory;

/// Enough of a file to see what it is.
const HEAD_BYTES: u64 = 0x206;

pub enum Kernel {
    /// An ELF image with a PVH entry: vmlinux, or another PVH guest.
    Elf(elf::Image),
    /// A bzImage, as distributions have it: vmlinuz.
    BzImage(Box<bzimage::Image>),
}

impl Kernel {
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let source = Source::open("kernel", path)?;
        let mut head = vec![0; HEAD_BYTES.min(source.bytes()) as usize];
        source.read(&mut head, 0)?;
        if elf::Image::is_one(&head) {
            Ok(Self::Elf(elf::Image::new(source)?))
        } else if bzimage::Image::is_one(&head) {
            Ok(Self::BzImage(Box::new(bzimage::Image::new(source)?)))
        } else {
            Err(BootError::NoKernel { path: source.path() })
        }
    }

    /// Refuses a kernel or a command line that does not fit; returns where the kernel's memory ends.
    pub fn check_fits(&self, memory_end: u64, cmdline: &str) -> Result<u64, BootError> {
        match self {
            Self::Elf(image) => image.check_fits(memory_end),
            Self::BzImage(image) => {
                image.check_cmdline(cmdline.len())?;
                image.check_fits(memory_end)
            }
        }
    }

    /// The first address behind all that an initrd may use.
    pub fn initrd_end(&self, memory_end: u64) -> u64 {
        match self {
            Self::Elf(_) => memory_end,
            Self::BzImage(image) => image.initrd_end().min(memory_end),
        }
    }

    pub fn load(&self, memory: &GuestMemory) -> Result<(), BootError> {
        match self {
            Self::Elf(image) => image.load(memory),
            Self::BzImage(image) => image.load(memory),
        }
    }
}
