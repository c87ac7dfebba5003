//! The memory of a guest: one sealed memfd, mapped shared.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bellwether_statefile::MemoryRegion;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
    mmap::MmapRegionError,
};

use crate::dirty::DirtyBitmap;

/// Guest memory as devices see it.
pub type GuestMemory = GuestMemoryMmap<DirtyBitmap>;
type GuestRegion = GuestRegionMmap<DirtyBitmap>;

/// Memory comes in steps of a large page.
pub const MEMORY_STEP: u64 = 2 << 20;
/// Up to this address guest memory is contiguous; device registers follow, up to 4 GiB.
pub const RAM_BELOW_4G_MAX: u64 = 3 << 30;
/// What does not fit below lies from here on.
pub const RAM_ABOVE_4G_START: u64 = 4 << 30;
/// The largest VM.
const RAM_MAX: u64 = 1 << 40;

/// Guest memory could not be made or looked at.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    #[error(
        "guest memory of {size} bytes: must be a multiple of 2 MiB, not zero, at most 1 TiB; give \
         the VM another size"
    )]
    BadSize { size: u64 },
    #[error("guest memory region {start:#x}+{length:#x}: {why}")]
    BadRegion { start: u64, length: u64, why: &'static str },
    #[error("{operation} of {size} bytes of guest memory: {source}")]
    Io { operation: &'static str, size: u64, source: io::Error },
    #[error("mapping of guest memory at {start:#x}: {source}")]
    Map { start: u64, source: MmapRegionError },
}

/// Whether the memory is all there. It is not while it is loaded on demand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    Whole = 0,
    Loading = 1,
    Failed = 2,
}

/// The memory of one VM. Share it in an `Arc`; it is unmapped when the last owner lets go.
#[derive(Debug)]
pub struct GuestRam {
    memfd: Arc<File>,
    memory: GuestMemory,
    regions: Vec<MappedRegion>,
    content: AtomicU8,
}

/// Where a region is, in the guest, in the memfd and in this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MappedRegion {
    pub(crate) guest: MemoryRegion,
    pub(crate) file_offset: u64,
    pub(crate) host: usize,
}

/// The regions of a VM with this much memory: below the hole for device registers, then above it.
pub fn ram_regions(size: u64) -> Result<Vec<MemoryRegion>, RamError> {
    if size == 0 || !size.is_multiple_of(MEMORY_STEP) || size > RAM_MAX {
        return Err(RamError::BadSize { size });
    }
    let low = size.min(RAM_BELOW_4G_MAX);
    let mut regions = vec![MemoryRegion { start: 0, length: low }];
    if size > low {
        regions.push(MemoryRegion { start: RAM_ABOVE_4G_START, length: size - low });
    }
    Ok(regions)
}

impl GuestRam {
    /// Memory of this size, all zero, none of it allocated yet.
    pub fn new(size: u64) -> Result<Self, RamError> {
        Self::with_regions(&ram_regions(size)?)
    }

    /// Memory in exactly these regions, such as a state file has them.
    pub fn with_regions(regions: &[MemoryRegion]) -> Result<Self, RamError> {
        let size = check_regions(regions)?;
        let memfd = Arc::new(create_memfd(size)?);
        let (mut mapped, mut places, mut file_offset) = (Vec::new(), Vec::new(), 0);
        for guest in regions {
            let region = map_region(*guest, Arc::clone(&memfd), file_offset)?;
            places.push(MappedRegion { guest: *guest, file_offset, host: region.as_ptr().addr() });
            mapped.push(region);
            file_offset += guest.length;
        }
        let bad = |_| bad_region(&MemoryRegion { start: 0, length: size }, "regions overlap");
        let memory = GuestMemory::from_regions(mapped).map_err(bad)?;
        Ok(Self { memfd, memory, regions: places, content: AtomicU8::new(Content::Whole as u8) })
    }

    /// The memory as devices read and write it. Its regions have what a KVM memory slot needs.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The regions, in ascending order of guest address: what a state file is created with.
    pub fn regions(&self) -> Vec<MemoryRegion> {
        self.regions.iter().map(|region| region.guest).collect()
    }

    /// The bytes of all regions.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|region| region.guest.length).sum()
    }

    /// Where the first byte of a region is in this process; `None` if there is no such region.
    pub fn host_address(&self, region: usize) -> Option<usize> {
        Some(self.regions.get(region)?.host)
    }

    /// How much of the memory the host has had to provide so far.
    pub fn resident_bytes(&self) -> Result<u64, RamError> {
        let metadata = self.memfd.metadata().map_err(self.io_error("examination"))?;
        Ok(metadata.blocks() * 512)
    }

    pub(crate) fn mapped(&self) -> &[MappedRegion] {
        &self.regions
    }

    pub(crate) fn content(&self) -> Content {
        match self.content.load(Ordering::Acquire) {
            0 => Content::Whole,
            1 => Content::Loading,
            _ => Content::Failed,
        }
    }

    pub(crate) fn set_content(&self, content: Content) {
        self.content.store(content as u8, Ordering::Release);
    }

    /// Takes whole memory into loading; false if a load is under way or has failed.
    pub(crate) fn begin_loading(&self) -> bool {
        let (whole, loading) = (Content::Whole as u8, Content::Loading as u8);
        self.content.compare_exchange(whole, loading, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The first offset in the memfd, from this one on, that is not in a hole; `None` when only a
    /// hole is left. What was swapped out counts as data.
    pub(crate) fn next_data(&self, from: u64) -> Result<Option<u64>, RamError> {
        match rustix::fs::seek(&*self.memfd, SeekFrom::Data(from)) {
            Ok(offset) => Ok(Some(offset)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(self.io_error("search for data")(error.into())),
        }
    }

    /// Copies guest memory that may change meanwhile. It is read through the memfd: a hole is zero
    /// and stays a hole, and no page of ours has to be mapped first.
    pub(crate) fn copy_out(
        &self,
        region: usize,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), RamError> {
        let at = self.regions[region].file_offset + offset;
        self.memfd.read_exact_at(bytes, at).map_err(self.io_error("copying"))
    }

    /// The words of a region that say which pages the VMM itself has written; they are zero
    /// afterwards.
    pub(crate) fn take_own_writes(&self, region: usize) -> Vec<u64> {
        let region = self.memory.iter().nth(region);
        region.map_or_else(Vec::new, |region| region.bitmap().get_and_reset())
    }

    /// Puts bytes into guest memory that nobody uses yet, through the memfd: no page of ours has to
    /// be mapped for it.
    pub(crate) fn copy_in(&self, region: usize, offset: u64, bytes: &[u8]) -> Result<(), RamError> {
        let at = self.regions[region].file_offset + offset;
        self.memfd.write_all_at(bytes, at).map_err(self.io_error("filling"))
    }

    /// Takes pages out of memory; whoever touches them next finds zeros, or waits for them if the
    /// memory is loaded on demand.
    pub(crate) fn punch(&self, region: usize, offset: u64, length: u64) -> Result<(), RamError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let at = self.regions[region].file_offset + offset;
        rustix::fs::fallocate(&*self.memfd, flags, at, length)
            .map_err(|error| self.io_error("freeing")(error.into()))
    }

    /// Guest memory as a slice.
    ///
    /// # Safety
    /// Nobody may write to this memory while the slice lives: the vCPUs are stopped and the devices
    /// drained. (A writer all the same would make the checksum wrong, which a restore finds out.)
    pub(crate) unsafe fn slice(&self, region: usize, offset: u64, length: u64) -> &[u8] {
        let place = &self.regions[region];
        assert!(offset.checked_add(length).is_some_and(|end| end <= place.guest.length));
        let start = std::ptr::with_exposed_provenance(place.host + offset as usize);
        // SAFETY: the range lies in a mapping that lives as long as self (checked above); the
        // caller keeps writers away.
        unsafe { std::slice::from_raw_parts(start, length as usize) }
    }

    /// Copies bytes into guest memory that nobody uses yet.
    pub(crate) fn fill(&self, region: usize, offset: u64, bytes: &[u8]) {
        let place = &self.regions[region];
        let end = offset.checked_add(bytes.len() as u64);
        assert!(end.is_some_and(|end| end <= place.guest.length));
        let target = std::ptr::with_exposed_provenance_mut(place.host + offset as usize);
        // SAFETY: the range lies in a mapping that lives as long as self (checked above) and is
        // writable; `bytes` is ordinary memory of the VMM, so the two cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }

    fn io_error(&self, operation: &'static str) -> impl FnOnce(io::Error) -> RamError {
        let size = self.size();
        move |source| RamError::Io { operation, size, source }
    }
}

fn bad_region(region: &MemoryRegion, why: &'static str) -> RamError {
    RamError::BadRegion { start: region.start, length: region.length, why }
}

/// Checks what mapping would not find out, and gives the total size.
fn check_regions(regions: &[MemoryRegion]) -> Result<u64, RamError> {
    let (mut size, mut end) = (0u64, 0u64);
    for region in regions {
        if region.length == 0 || !(region.start | region.length).is_multiple_of(4096) {
            return Err(bad_region(region, "must be whole pages, and not empty"));
        }
        if region.start < end {
            return Err(bad_region(region, "overlaps its predecessor or comes out of order"));
        }
        end = region.start.saturating_add(region.length);
        size = size.saturating_add(region.length);
    }
    if size == 0 || size > RAM_MAX { Err(RamError::BadSize { size }) } else { Ok(size) }
}

/// A memfd of fixed size: nobody who gets hold of it can make an access to it fail with SIGBUS.
fn create_memfd(size: u64) -> Result<File, RamError> {
    let io_error = |operation| move |e: Errno| RamError::Io { operation, size, source: e.into() };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag that forbids execution.
    let memfd = rustix::fs::memfd_create("bellwether-ram", flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| rustix::fs::memfd_create("bellwether-ram", flags))
        .map_err(io_error("creation"))?;
    rustix::fs::ftruncate(&memfd, size).map_err(io_error("sizing"))?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memfd, seals).map_err(io_error("sealing"))?;
    Ok(File::from(memfd))
}

fn map_region(
    guest: MemoryRegion,
    memfd: Arc<File>,
    file_offset: u64,
) -> Result<GuestRegion, RamError> {
    let mapping = MmapRegion::build(
        Some(FileOffset::from_arc(memfd, file_offset)),
        guest.length as usize,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_NORESERVE,
    )
    .map_err(|source| RamError::Map { start: guest.start, source })?;
    // The address leaves the pointer world here: userfaultfd speaks in numbers.
    mapping.as_ptr().expose_provenance();
    GuestRegion::new(mapping, GuestAddress(guest.start))
        .ok_or_else(|| bad_region(&guest, "ends beyond the last address"))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn sizes_are_checked() {
        for size in [0, 1, MEMORY_STEP - 4096, RAM_MAX + MEMORY_STEP] {
            let text = GuestRam::new(size).unwrap_err().to_string();
            assert!(text.contains("multiple of 2 MiB"), "{text}");
        }
        assert_eq!(GuestRam::new(RAM_MAX).unwrap().size(), RAM_MAX);
    }

    #[test]
    fn memory_leaves_the_hole_below_4_gib_free() {
        let small = ram_regions(RAM_BELOW_4G_MAX).unwrap();
        assert_eq!(small, [MemoryRegion { start: 0, length: 3 * GIB }]);
        let ram = GuestRam::new(8 * GIB).unwrap();
        let high = MemoryRegion { start: 4 * GIB, length: 5 * GIB };
        assert_eq!(ram.regions()[1], high);
        assert_eq!(ram.memory().num_regions(), 2);
        assert!(ram.memory().find_region(GuestAddress(3 * GIB)).is_none());
        assert!(ram.memory().find_region(GuestAddress(9 * GIB - 1)).is_some());
    }

    #[test]
    fn only_what_was_written_is_allocated() {
        let ram = GuestRam::new(4 * GIB).unwrap();
        assert_eq!(ram.next_data(0).unwrap(), None);
        ram.memory().write_obj(7u64, GuestAddress(4 * GIB + 8192)).unwrap();
        assert_eq!(ram.next_data(0).unwrap(), Some(3 * GIB + 8192));
        assert_eq!(ram.resident_bytes().unwrap(), 4096);
    }

    #[test]
    fn the_memfd_cannot_be_resized() {
        let ram = GuestRam::new(MEMORY_STEP).unwrap();
        assert!(ram.memfd.set_len(0).is_err());
        assert!(ram.memfd.set_len(2 * MEMORY_STEP).is_err());
    }

    #[test]
    fn impossible_regions_are_refused() {
        let region = |start, length| MemoryRegion { start, length };
        assert!(GuestRam::with_regions(&[region(0, 4095)]).is_err());
        assert!(GuestRam::with_regions(&[region(0, 8192), region(4096, 4096)]).is_err());
        assert!(GuestRam::with_regions(&[]).is_err());
        assert!(GuestRam::with_regions(&[region(u64::MAX - 4095, 8192)]).is_err());
    }
}
