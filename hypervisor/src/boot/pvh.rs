//! PVH's start info (Xen: xen/include/public/arch-x86/hvm/start_info.h, version 1).

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::BootError;
use crate::{GuestMemory, layout};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;

/// Writes start info, memory map and command line; returns the start info's address.
pub fn write(memory: &GuestMemory, cmdline: &str, rsdp: u64) -> Result<u32, BootError> {
    let ranges: Vec<_> =
        memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
    let map = memory_map(&ranges);
    let put = |what, bytes: &[u8], address| {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| BootError::Memory { what, source })
    };
    put("the memory map", &encode_map(&map), layout::MEMORY_MAP)?;
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    put("the command line", &line, layout::CMDLINE)?;
    put("the start info", &start_info(rsdp, map.len() as u32), layout::START_INFO)?;
    Ok(layout::START_INFO as u32)
}

/// (address, bytes, type): conventional memory, the ACPI tables, and all the rest of RAM.
fn memory_map(ranges: &[(u64, u64)]) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_END, TYPE_RAM),
        (layout::ACPI_START, layout::ACPI_END - layout::ACPI_START, TYPE_RESERVED),
    ];
    map.extend(ranges.iter().map(|&(start, bytes)| match start {
        0 => (layout::HIGH_START, bytes.saturating_sub(layout::HIGH_START), TYPE_RAM),
        _ => (start, bytes, TYPE_RAM),
    }));
    map
}

fn encode_map(map: &[(u64, u64, u32)]) -> Vec<u8> {
    let mut raw = Vec::with_capacity(map.len() * 24);
    for (address, bytes, kind) in map {
        raw.extend(address.to_le_bytes());
        raw.extend(bytes.to_le_bytes());
        raw.extend(kind.to_le_bytes());
        raw.extend([0; 4]);
    }
    raw
}

fn start_info(rsdp: u64, map_entries: u32) -> Vec<u8> {
    let mut raw = Vec::with_capacity(56);
    for word in [MAGIC, VERSION, 0, 0] {
        raw.extend(word.to_le_bytes());
    }
    for address in [0, layout::CMDLINE, rsdp, layout::MEMORY_MAP] {
        raw.extend(address.to_le_bytes());
    }
    raw.extend(map_entries.to_le_bytes());
    raw.extend([0; 4]);
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_info_has_the_layout_of_version_1() {
        let raw = start_info(0xe_0000, 3);
        assert_eq!(raw.len(), 56);
        assert_eq!(raw[..8], [0x78, 0xc5, 0x6e, 0x33, 1, 0, 0, 0]);
        assert_eq!(raw[32..40], 0xe_0000u64.to_le_bytes());
        assert_eq!(raw[48], 3);
    }

    #[test]
    fn the_map_covers_all_ram_and_reserves_the_tables() {
        let map = memory_map(&[(0, layout::HOLE_START), (1 << 32, 1 << 30)]);
        assert_eq!(map[1], (0xe_0000, 0x2_0000, TYPE_RESERVED));
        assert_eq!(map[2], (0x10_0000, layout::HOLE_START - 0x10_0000, TYPE_RAM));
        assert_eq!(map[3], (1 << 32, 1 << 30, TYPE_RAM));
    }
}
