//! The initial RAM disk: the kernel finds it as high in memory as it can reach.

use std::ops::Range;
use std::path::Path;

use super::BootError;
use super::source::Source;
use crate::GuestMemory;

const PAGE: u64 = 4096;

/// An initrd with its place.
pub struct Initrd {
    source: Source,
    pub address: u64,
}

impl Initrd {
    /// Opens the file and finds its place in the memory that is free for it.
    pub fn open(path: &Path, free: Range<u64>) -> Result<Self, BootError> {
        let source = Source::open("initrd", path)?;
        let address = place(source.bytes(), &free).ok_or_else(|| BootError::InitrdTooLarge {
            path: source.path(),
            bytes: source.bytes(),
            free: free.end.saturating_sub(free.start),
        })?;
        Ok(Self { source, address })
    }

    pub fn bytes(&self) -> u64 {
        self.source.bytes()
    }

    pub fn load(&self, memory: &GuestMemory) -> Result<(), BootError> {
        self.source.copy(memory, 0, self.bytes(), self.address)
    }
}

/// The highest page from which `bytes` lie in `free`.
fn place(bytes: u64, free: &Range<u64>) -> Option<u64> {
    let address = free.end.checked_sub(bytes)? & !(PAGE - 1);
    (bytes > 0 && address >= free.start).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lies_at_the_end_of_what_is_free_or_nowhere() {
        let free = 0x20_0000..0x40_0000;
        assert_eq!(place(1, &free), Some(0x3f_f000));
        assert_eq!(place(0x1001, &free), Some(0x3f_e000));
        assert_eq!(place(0x20_0000, &free), Some(0x20_0000));
        for bytes in [0, 0x20_0001, u64::MAX] {
            assert_eq!(place(bytes, &free), None, "{bytes:#x}");
        }
        // The kernel fills all memory.
        assert_eq!(place(1, &(0x40_0000..0x40_0000)), None);
    }
}
