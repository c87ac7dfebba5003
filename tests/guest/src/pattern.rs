//! Patterned memory: writing it, rewriting it under a new generation, and verifying it.
//!
//! The expected generations are kept in memory of their own, so that a page which comes back as it was
//! some time ago is noticed although it is well-formed.

use crate::page_stream::{Key, WORDS};
use crate::pages::PageSet;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

/// The first wrong byte of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub address: u64,
    pub expected: u8,
    pub found: u8,
    pub key: Key,
    /// What the page claims to be: its first two words.
    pub found_generation: u64,
    pub found_page: u64,
}

/// # Safety
/// `address` is a mapped, page-aligned page that belongs to the caller alone.
pub unsafe fn write_page(address: u64, key: Key) {
    let page = with_exposed_provenance_mut::<u64>(address as usize);
    for (i, word) in key.words().enumerate().take(WORDS) {
        // SAFETY: within the caller's page. Volatile: the memory is saved and restored behind our back.
        unsafe { page.add(i).write_volatile(word) };
    }
}

/// # Safety
/// `address` is a mapped, page-aligned page that belongs to the caller alone.
pub unsafe fn verify_page(address: u64, key: Key) -> Result<(), Mismatch> {
    let page = with_exposed_provenance::<u64>(address as usize);
    // SAFETY: within the caller's page. Volatile as in `write_page`.
    let word_at = |i| unsafe { page.add(i).read_volatile() };
    for (i, expected) in key.words().enumerate() {
        let found = word_at(i);
        if found != expected {
            let byte = ((found ^ expected).trailing_zeros() / 8) as usize;
            return Err(Mismatch {
                address: address + (i * 8 + byte) as u64,
                expected: expected.to_le_bytes()[byte],
                found: found.to_le_bytes()[byte],
                key,
                found_generation: word_at(0),
                found_page: word_at(1),
            });
        }
    }
    Ok(())
}

/// What a verification step did.
pub enum Verified {
    Page,
    /// The page was the last one of a full pass.
    Pass,
}

/// The pages that are rewritten and verified all the time.
pub struct Pattern {
    seed: u64,
    pages: PageSet,
    generations: &'static mut [u32],
    stride: u64,
    write_next: u64,
    verify_next: u64,
    written: u64,
    verified: u64,
    generation_max: u32,
}

impl Pattern {
    /// # Safety
    /// The pages are mapped and belong to the pattern alone.
    pub unsafe fn new(seed: u64, pages: PageSet, generations: &'static mut [u32]) -> Self {
        assert!(generations.len() as u64 == pages.pages());
        generations.fill(0);
        let stride = stride(pages.pages());
        let (write_next, verify_next) = (0, 0);
        let (written, verified, generation_max) = (0, 0, 0);
        Self {
            seed,
            pages,
            generations,
            stride,
            write_next,
            verify_next,
            written,
            verified,
            generation_max,
        }
    }

    pub fn pages(&self) -> u64 {
        self.pages.pages()
    }

    pub fn generation_max(&self) -> u32 {
        self.generation_max
    }

    pub fn written(&self) -> u64 {
        self.written
    }

    pub fn verified(&self) -> u64 {
        self.verified
    }

    /// True until every page has been written once.
    pub fn is_blank(&self) -> bool {
        self.written < self.pages()
    }

    /// Rewrites one page under its next generation, after verifying what it held: a page that went wrong
    /// since the last pass must not be hidden by its rewriting.
    pub fn rewrite_next(&mut self) -> Result<(), Mismatch> {
        let page = self.write_next;
        let Some(address) = self.pages.address(page) else { return Ok(()) };
        let key = self.key(page);
        if key.generation != 0 {
            // SAFETY: the pages are the pattern's own.
            unsafe { verify_page(address, key) }?;
        }
        let generation = key.generation.wrapping_add(1).max(1);
        // SAFETY: the pages are the pattern's own.
        unsafe { write_page(address, Key { generation, ..key }) };
        self.generations[page as usize] = generation;
        self.generation_max = self.generation_max.max(generation);
        self.written += 1;
        self.write_next = (page + self.stride) % self.pages();
        Ok(())
    }

    /// Verifies the next page; pages not yet written pass.
    pub fn verify_next(&mut self) -> Result<Verified, Mismatch> {
        let page = self.verify_next;
        let key = self.key(page);
        if let Some(address) = self.pages.address(page).filter(|_| key.generation != 0) {
            // SAFETY: the pages are the pattern's own.
            unsafe { verify_page(address, key) }?;
            self.verified += 1;
        }
        self.verify_next = (page + 1) % self.pages().max(1);
        Ok(if self.verify_next == 0 { Verified::Pass } else { Verified::Page })
    }

    fn key(&self, page: u64) -> Key {
        let generation = self.generations.get(page as usize).copied().unwrap_or(0);
        Key { seed: self.seed, page, generation }
    }
}

/// Rewriting hops through memory rather than walking, as programs do; coprime, so that it reaches every page.
fn stride(pages: u64) -> u64 {
    const HOPS: [u64; 3] = [7919, 7927, 1];
    HOPS.into_iter().find(|hop| !pages.is_multiple_of(*hop)).unwrap_or(1)
}

/// Memory that is filled once, to have that much of it in a saved state, and verified on demand.
pub struct Fill {
    seed: u64,
    pages: PageSet,
    written: u64,
    verify_next: Option<u64>,
}

/// Keeps fill pages apart from pattern pages in the key.
const FILL_PAGE_BASE: u64 = 1 << 40;

impl Fill {
    /// # Safety
    /// The pages are mapped and belong to the fill alone.
    pub unsafe fn new(seed: u64, pages: PageSet) -> Self {
        Self { seed, pages, written: 0, verify_next: None }
    }

    pub fn mib(&self) -> u64 {
        self.pages.pages() >> 8
    }

    pub fn is_writing(&self) -> bool {
        self.written < self.pages.pages()
    }

    /// Writes one page. Returns true when it was the last.
    pub fn write_next(&mut self) -> bool {
        if let Some(address) = self.pages.address(self.written) {
            // SAFETY: the pages are the fill's own.
            unsafe { write_page(address, self.key(self.written)) };
            self.written += 1;
        }
        !self.is_writing()
    }

    /// Begins a verification of everything that was filled.
    pub fn start_verifying(&mut self) {
        self.verify_next = Some(0);
    }

    pub fn is_verifying(&self) -> bool {
        self.verify_next.is_some()
    }

    /// Verifies one page. Returns true when it was the last.
    pub fn verify_next(&mut self) -> Result<bool, Mismatch> {
        let Some(page) = self.verify_next else { return Ok(false) };
        if page >= self.written {
            self.verify_next = None;
            return Ok(true);
        }
        if let Some(address) = self.pages.address(page) {
            // SAFETY: the pages are the fill's own.
            unsafe { verify_page(address, self.key(page)) }?;
        }
        self.verify_next = Some(page + 1);
        Ok(false)
    }

    fn key(&self, page: u64) -> Key {
        Key { seed: self.seed, page: FILL_PAGE_BASE + page, generation: 1 }
    }
}
