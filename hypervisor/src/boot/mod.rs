//! A cold boot: the kernel, the tables that describe the machine, and where to begin.

pub mod acpi;
mod aml;
mod elf;
mod pvh;

use std::path::{Path, PathBuf};

use vm_memory::{GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::GuestMemory;

/// Why a machine cannot boot. Each names the file or the table.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("open kernel {path}: {source}; the VM's specification names this file")]
    Open { path: PathBuf, source: std::io::Error },
    #[error("read kernel {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error(
        "kernel {path} is not a 64-bit x86 ELF executable: {why}; give an uncompressed vmlinux or another ELF with a PVH note"
    )]
    NotElf { path: PathBuf, why: &'static str },
    #[error("kernel {path} has no PVH entry point (ELF note Xen/18); build it with CONFIG_PVH=y")]
    NoPvhNote { path: PathBuf },
    #[error(
        "kernel {path} does not fit: its segment at {address:#x} has {bytes} bytes, and the VM's memory ends at {end:#x}; give the VM more memory"
    )]
    TooLarge { path: PathBuf, address: u64, bytes: u64, end: u64 },
    #[error(
        "kernel {path}: its segment at {address:#x} lies below 1 MiB, where the boot tables are"
    )]
    TooLow { path: PathBuf, address: u64 },
    #[error("write {what} to guest memory: {source}")]
    Memory { what: &'static str, source: GuestMemoryError },
}

/// Where the boot processor starts, and what it is handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub address: u32,
    pub start_info: u32,
}

/// Checks the kernel without touching guest memory, so that a bad one is refused early.
pub fn check_kernel(path: &Path, memory_end: u64) -> Result<(), BootError> {
    elf::Image::open(path)?.check_fits(memory_end)
}

/// Loads the kernel and writes all boot tables.
pub fn load(
    memory: &GuestMemory,
    kernel: &Path,
    cmdline: &str,
    vcpus: u8,
) -> Result<Entry, BootError> {
    let image = elf::Image::open(kernel)?;
    image.check_fits(low_memory_end(memory))?;
    image.load(memory)?;
    let rsdp = acpi::write(memory, vcpus)?;
    let start_info = pvh::write(memory, cmdline, rsdp)?;
    Ok(Entry { address: image.entry(), start_info })
}

/// The end of the RAM below the hole, in which a kernel must fit.
fn low_memory_end(memory: &GuestMemory) -> u64 {
    memory.iter().find(|region| region.start_addr().0 == 0).map_or(0, |region| region.len())
}
