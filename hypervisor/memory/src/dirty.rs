//! Which pages of guest memory were written: the guest's writes from a log that KVM keeps, the VMM's
//! own from the bit map that guest memory carries.

use std::io;

use bellwether_statefile::PAGE_SIZE;
use vm_memory::bitmap::AtomicBitmap;

use crate::ram::GuestRam;

/// Notes the pages that the VMM itself writes. It always does: a write costs one locked `or`, as
/// much as a test of a switch that no write slips past.
pub type DirtyBitmap = AtomicBitmap;

/// The log of the guest's own writes. Regions are those of the guest's memory, and each bit of a word
/// is a page, the lowest one first.
pub trait DirtyLog: Sync {
    /// Adds the pages of a region that were written since they were last cleared. A log that cannot
    /// clear by itself clears them all now.
    fn collect(&self, region: usize, words: &mut [u64]) -> io::Result<()>;

    /// Begins to watch these pages anew. The words are those from the word `first` of the region on.
    fn clear(&self, region: usize, first: usize, words: &[u64]) -> io::Result<()>;
}

/// A set of pages of guest memory. Pages are numbered through all regions, as in a state file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PageSet {
    regions: Vec<RegionSet>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct RegionSet {
    first_page: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// No page of this memory.
    pub fn empty(ram: &GuestRam) -> Self {
        let mut first_page = 0;
        let regions = ram.regions().into_iter().map(|region| {
            let pages = region.length / PAGE_SIZE;
            let set = RegionSet { first_page, words: vec![0; pages.div_ceil(64) as usize] };
            first_page += pages;
            set
        });
        Self { regions: regions.collect() }
    }

    pub fn count(&self) -> u64 {
        let words = self.regions.iter().flat_map(|region| &region.words);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// The pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.regions.iter().flat_map(|region| {
            let words = (region.first_page..).step_by(64).zip(&region.words);
            words.flat_map(|(first, word)| bits(*word).map(move |bit| first + u64::from(bit)))
        })
    }

    /// Adds a page; one outside of the memory is ignored.
    pub fn insert(&mut self, page: u64) {
        let Some((region, word, bit)) = self.place(page) else { return };
        if let Some(word) = self.regions[region].words.get_mut(word) {
            *word |= 1 << bit;
        }
    }

    /// The region of a page, its word there, and its bit in the word.
    fn place(&self, page: u64) -> Option<(usize, usize, u64)> {
        let region = self.regions.partition_point(|r| r.first_page <= page).checked_sub(1)?;
        let index = page - self.regions[region].first_page;
        Some((region, (index / 64) as usize, index % 64))
    }

    /// Calls `with` for each region that has some of these ascending pages: the region, the first
    /// word and the words.
    pub(crate) fn words_of(
        &self,
        pages: &[u64],
        mut with: impl FnMut(usize, usize, &[u64]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = pages;
        while let Some((region, first, _)) = rest.first().and_then(|page| self.place(*page)) {
            let end = self.regions.get(region + 1).map_or(u64::MAX, |next| next.first_page);
            let (here, others) = rest.split_at(rest.partition_point(|page| *page < end));
            let mut words = Vec::new();
            for (_, word, bit) in here.iter().filter_map(|page| self.place(*page)) {
                words.resize(word - first + 1, 0u64);
                words[word - first] |= 1 << bit;
            }
            with(region, first, &words)?;
            rest = others;
        }
        Ok(())
    }
}

/// The bits of a word, the lowest one first.
fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros())?;
        word &= word - 1;
        Some(bit)
    })
}

/// Takes the pages that the guest and the VMM have written since they were last cleared. Those of
/// the VMM are cleared by this, those of the guest are not, where the log has a choice: clear them
/// right before they are copied.
pub fn collect_dirty(ram: &GuestRam, log: &dyn DirtyLog, into: &mut PageSet) -> io::Result<()> {
    for (region, set) in into.regions.iter_mut().enumerate() {
        for (word, own) in set.words.iter_mut().zip(ram.take_own_writes(region)) {
            *word |= own;
        }
        log.collect(region, &mut set.words)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bellwether_statefile::MemoryRegion;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn ram() -> GuestRam {
        let region = |start, length| MemoryRegion { start, length };
        GuestRam::with_regions(&[region(0, 70 * PAGE_SIZE), region(1 << 32, 130 * PAGE_SIZE)])
            .unwrap()
    }

    /// A log that says that page 3 of each region was written.
    struct Third;

    impl DirtyLog for Third {
        fn collect(&self, _: usize, words: &mut [u64]) -> io::Result<()> {
            words[0] |= 8;
            Ok(())
        }

        fn clear(&self, _: usize, _: usize, _: &[u64]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_writes_of_the_vmm_are_merged_with_the_log() {
        let ram = ram();
        ram.memory().write_slice(&[1; 5000], GuestAddress(4000)).unwrap();
        ram.memory().write_obj(1u8, GuestAddress((1 << 32) + 129 * PAGE_SIZE)).unwrap();
        let mut set = PageSet::empty(&ram);
        collect_dirty(&ram, &Third, &mut set).unwrap();
        assert_eq!(set.pages().collect::<Vec<_>>(), [0, 1, 2, 3, 70 + 3, 70 + 129]);
        assert_eq!(set.count(), 6);
        let mut again = PageSet::empty(&ram);
        collect_dirty(&ram, &Third, &mut again).unwrap();
        assert_eq!(again.pages().collect::<Vec<_>>(), [3, 73]);
    }

    #[test]
    fn words_are_cut_at_regions() {
        let mut set = PageSet::empty(&ram());
        let pages = [1, 69, 70, 70 + 64, 70 + 129];
        pages.iter().for_each(|page| set.insert(*page));
        set.insert(1000);
        assert_eq!(set.pages().collect::<Vec<_>>(), pages);
        let mut seen = vec![];
        set.words_of(&pages[1..], |region, first, words| {
            seen.push((region, first, words.to_vec()));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [(0, 1, vec![1 << 5]), (1, 0, vec![1, 1, 2])]);
    }
}
