//! A cold boot: the kernel, the tables that describe the machine, and where to begin.

pub mod acpi;
mod aml;
mod bytes;
mod bzimage;
mod e820;
mod elf;
mod initrd;
mod kernel;
mod linux;
mod pvh;
mod source;

use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::{GuestMemory, layout};
use initrd::Initrd;
use kernel::Kernel;

pub use linux::GDT_LIMIT;

/// Why a machine cannot boot. Each names the file or the table.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("open {what} {path}: {source}; the VM's specification names this file")]
    Open { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("read {what} {path}: {source}")]
    Read { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{what} {path} ends in the middle; was it copied whole?")]
    Truncated { what: &'static str, path: PathBuf },
    #[error(
        "kernel {path} is neither a 64-bit x86 ELF image nor a bzImage; give a distribution's vmlinuz, or a vmlinux with a PVH note"
    )]
    NoKernel { path: PathBuf },
    #[error("kernel {path} is a bzImage that cannot be started: {why}")]
    BadBzImage { path: PathBuf, why: &'static str },
    #[error("kernel {path} reads a command line of at most {max} bytes; this one has {bytes}")]
    CmdlineTooLong { path: PathBuf, bytes: usize, max: u32 },
    #[error(
        "initrd {path} has {bytes} bytes, and beside the kernel {free} are free for it; it must not be empty, and the VM may need more memory"
    )]
    InitrdTooLarge { path: PathBuf, bytes: u64, free: u64 },
    #[error(
        "kernel {path} is not a 64-bit x86 ELF executable: {why}; give an uncompressed vmlinux or another ELF with a PVH note"
    )]
    NotElf { path: PathBuf, why: &'static str },
    #[error("kernel {path} has no PVH entry point (ELF note Xen/18); build it with CONFIG_PVH=y")]
    NoPvhNote { path: PathBuf },
    #[error(
        "kernel {path} does not fit: at {address:#x} it needs {bytes} bytes, and the VM's memory ends at {end:#x}; give the VM more memory"
    )]
    TooLarge { path: PathBuf, address: u64, bytes: u64, end: u64 },
    #[error(
        "kernel {path}: a part of it belongs at {address:#x}, below 1 MiB, where the boot tables are"
    )]
    TooLow { path: PathBuf, address: u64 },
    #[error("write {what} to guest memory: {source}")]
    Memory { what: &'static str, source: GuestMemoryError },
}

/// What a machine boots.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a> {
    pub kernel: &'a Path,
    pub initrd: Option<&'a Path>,
    pub cmdline: &'a str,
    pub vcpus: u8,
}

/// Where the boot processor starts, in which mode, and what it is handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging.
    Pvh { address: u32, start_info: u32 },
    /// Long mode, the first four GiB mapped to themselves.
    Linux { address: u64, boot_params: u64 },
}

/// Checks everything, and then loads kernel and initrd and writes all boot tables.
pub fn load(memory: &GuestMemory, boot: &Boot) -> Result<Entry, BootError> {
    let memory_end = low_memory_end(memory);
    let kernel = Kernel::open(boot.kernel)?;
    let kernel_end = kernel.check_fits(memory_end, boot.cmdline)?;
    let free = kernel_end..kernel.initrd_end(memory_end);
    let initrd = boot.initrd.map(|path| Initrd::open(path, free)).transpose()?;
    kernel.load(memory)?;
    if let Some(initrd) = &initrd {
        initrd.load(memory)?;
    }
    let rsdp = acpi::write(memory, boot.vcpus)?;
    write_cmdline(memory, boot.cmdline)?;
    match kernel {
        Kernel::Elf(image) => {
            let start_info = pvh::write(memory, initrd.as_ref(), rsdp)?;
            Ok(Entry::Pvh { address: image.entry(), start_info })
        }
        Kernel::BzImage(image) => {
            let boot_params = linux::write(memory, &image, initrd.as_ref(), rsdp)?;
            Ok(Entry::Linux { address: image.entry(), boot_params })
        }
    }
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    let line = [cmdline.as_bytes(), b"\0"].concat();
    memory
        .write_slice(&line, GuestAddress(layout::CMDLINE))
        .map_err(|source| BootError::Memory { what: "the command line", source })
}

/// The end of the RAM below the hole, in which a kernel must fit.
fn low_memory_end(memory: &GuestMemory) -> u64 {
    memory.iter().find(|region| region.start_addr().0 == 0).map_or(0, |region| region.len())
}
