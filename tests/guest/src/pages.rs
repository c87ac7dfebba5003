//! Sets of 4 KiB pages that need not be contiguous: RAM has a hole below 4 GiB.

pub const PAGE_BYTES: u64 = 4096;
const EXTENTS_MAX: usize = 32;

#[derive(Clone, Copy, Default)]
struct Extent {
    start: u64,
    pages: u64,
}

/// Pages numbered from 0, in the order in which their extents were added.
#[derive(Clone, Copy, Default)]
pub struct PageSet {
    extents: [Extent; EXTENTS_MAX],
    count: usize,
    pages: u64,
}

impl PageSet {
    /// Appends an extent. Returns false when there is no room for it.
    pub fn push(&mut self, start: u64, pages: u64) -> bool {
        let Some(slot) = self.extents.get_mut(self.count) else { return false };
        *slot = Extent { start, pages };
        self.count += 1;
        self.pages += pages;
        true
    }

    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The address of a page of the set.
    pub fn address(&self, page: u64) -> Option<u64> {
        let mut first = 0;
        for extent in &self.extents[..self.count] {
            if page - first < extent.pages {
                return Some(extent.start + (page - first) * PAGE_BYTES);
            }
            first += extent.pages;
        }
        None
    }
}
