//! What the loader hands over: `hvm_start_info` version 1 (Xen's arch-x86/hvm/start_info.h).
//!
//! Everything is copied out at once, because the structures lie in memory that is used for other things later.

use crate::boot;
use core::ptr::with_exposed_provenance;
use core::sync::atomic::Ordering::Relaxed;

const MAGIC: u32 = 0x336e_c578;
const CMDLINE_BYTES_MAX: usize = 2048;
const REGIONS_MAX: usize = 32;
const TYPE_RAM: u32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// A range of physical addresses, `end` excluded.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Region {
    pub start: u64,
    pub end: u64,
}

pub struct BootInfo {
    cmdline: [u8; CMDLINE_BYTES_MAX],
    cmdline_len: usize,
    regions: [Region; REGIONS_MAX],
    region_count: usize,
}

impl BootInfo {
    /// Reads the loader's structures, which must lie below 4 GiB (mapped by then).
    pub fn read() -> Self {
        // SAFETY: `boot.s` stored the word before any Rust code ran.
        let address = unsafe { boot::start_info_address.load(Relaxed) };
        // SAFETY: the PVH protocol puts the structure at this address, in mapped memory.
        let info =
            unsafe { with_exposed_provenance::<StartInfo>(address as usize).read_unaligned() };
        if info.magic != MAGIC || info.version < 1 {
            crate::fatal!(
                "pvh start_info={address:#x} magic={:#x} version={}",
                info.magic,
                info.version
            );
        }
        let mut this = Self {
            cmdline: [0; CMDLINE_BYTES_MAX],
            cmdline_len: 0,
            regions: [Region::default(); REGIONS_MAX],
            region_count: 0,
        };
        this.copy_cmdline(info.cmdline);
        this.copy_regions(info.memory_map, info.memory_map_entries);
        this
    }

    pub fn cmdline(&self) -> &str {
        core::str::from_utf8(&self.cmdline[..self.cmdline_len]).unwrap_or("")
    }

    pub fn ram(&self) -> &[Region] {
        &self.regions[..self.region_count]
    }

    pub fn ram_bytes(&self) -> u64 {
        self.ram().iter().map(|region| region.end - region.start).sum()
    }

    fn copy_cmdline(&mut self, address: u64) {
        if address == 0 {
            return;
        }
        for slot in &mut self.cmdline {
            let at = address as usize + self.cmdline_len;
            // SAFETY: a zero-terminated string in mapped memory, by the PVH protocol.
            let byte = unsafe { with_exposed_provenance::<u8>(at).read_volatile() };
            if byte == 0 {
                return;
            }
            *slot = byte;
            self.cmdline_len += 1;
        }
    }

    fn copy_regions(&mut self, address: u64, entries: u32) {
        let table = with_exposed_provenance::<MemoryMapEntry>(address as usize);
        for i in 0..entries as usize {
            // SAFETY: the PVH protocol promises that many entries in mapped memory.
            let entry = unsafe { table.add(i).read_unaligned() };
            if entry.kind == TYPE_RAM && self.region_count < REGIONS_MAX {
                let end = entry.address.saturating_add(entry.size);
                self.regions[self.region_count] = Region { start: entry.address, end };
                self.region_count += 1;
            }
        }
    }
}
