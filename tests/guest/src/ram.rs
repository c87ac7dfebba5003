//! Hands out the RAM that is neither below 1 MiB nor the guest itself. Nothing is ever given back.

use crate::boot;
use crate::pages::{PAGE_BYTES, PageSet};
use crate::pvh::Region;

/// Below are the loader's structures and what a firmware left behind.
const LOW_MEMORY_END: u64 = 1 << 20;
const REGIONS_MAX: usize = 32;

pub struct Ram {
    free: [Region; REGIONS_MAX],
    count: usize,
}

impl Ram {
    pub fn new(ram: &[Region]) -> Self {
        let mut free = [Region::default(); REGIONS_MAX];
        let mut count = 0;
        let reserved_end = LOW_MEMORY_END.max(boot::image_end());
        for region in ram.iter().take(REGIONS_MAX) {
            let start = region.start.max(reserved_end).next_multiple_of(PAGE_BYTES);
            let end = region.end / PAGE_BYTES * PAGE_BYTES;
            if start < end {
                free[count] = Region { start, end };
                count += 1;
            }
        }
        Self { free, count }
    }

    pub fn free_pages(&self) -> u64 {
        self.regions().map(|r| (r.end - r.start) / PAGE_BYTES).sum()
    }

    /// Contiguous pages.
    pub fn take_contiguous(&mut self, pages: u64) -> Option<u64> {
        let bytes = pages * PAGE_BYTES;
        let region = self.free[..self.count].iter_mut().find(|r| r.end - r.start >= bytes)?;
        let start = region.start;
        region.start += bytes;
        Some(start)
    }

    /// As many pages as asked for, wherever they are; `None` if there are not that many.
    pub fn take_scattered(&mut self, pages: u64) -> Option<PageSet> {
        if pages > self.free_pages() {
            return None;
        }
        let mut set = PageSet::default();
        for region in &mut self.free[..self.count] {
            let missing = pages - set.pages();
            let take = missing.min((region.end - region.start) / PAGE_BYTES);
            if take > 0 {
                set.push(region.start, take);
                region.start += take * PAGE_BYTES;
            }
        }
        Some(set)
    }

    fn regions(&self) -> impl Iterator<Item = &Region> {
        self.free[..self.count].iter()
    }
}
