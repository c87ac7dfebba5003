//! The map of guest memory, as every boot protocol hands it over (ACPI 6.5, 15.1).

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{GuestMemory, layout};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub address: u64,
    pub bytes: u64,
    pub kind: Kind,
}

impl Range {
    fn new(address: u64, bytes: u64, kind: Kind) -> Self {
        Self { address, bytes, kind }
    }
}

/// Conventional memory, the ACPI tables, and all the rest of RAM.
pub fn map(memory: &GuestMemory) -> Vec<Range> {
    let regions: Vec<_> =
        memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
    map_of(&regions)
}

fn map_of(regions: &[(u64, u64)]) -> Vec<Range> {
    let mut map = vec![
        Range::new(0, layout::LOW_END, Kind::Ram),
        Range::new(layout::ACPI_START, layout::ACPI_END - layout::ACPI_START, Kind::Reserved),
    ];
    map.extend(regions.iter().map(|&(start, bytes)| match start {
        0 => Range::new(layout::HIGH_START, bytes.saturating_sub(layout::HIGH_START), Kind::Ram),
        _ => Range::new(start, bytes, Kind::Ram),
    }));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_covers_all_ram_and_reserves_the_tables() {
        let map = map_of(&[(0, layout::HOLE_START), (1 << 32, 1 << 30)]);
        assert_eq!(map[1], Range::new(0xe_0000, 0x2_0000, Kind::Reserved));
        assert_eq!(map[2], Range::new(0x10_0000, layout::HOLE_START - 0x10_0000, Kind::Ram));
        assert_eq!(map[3], Range::new(1 << 32, 1 << 30, Kind::Ram));
    }
}
