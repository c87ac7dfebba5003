//! The mapping and its words.

use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags};

use crate::LeaseView;

pub const PAGE_BYTES: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"BWLEASE\n");
const VERSION: u64 = 1;

/// The words at which the slots begin.
const SLOTS: [usize; 2] = [8, 16];
/// The word in which the VMM says that it holds its guest.
const HELD: usize = 24;
const WORDS: usize = PAGE_BYTES / 8;

/// A shared mapping of the page.
#[derive(Debug)]
pub struct MappedPage {
    words: NonNull<[AtomicU64; WORDS]>,
    writable: bool,
}

// SAFETY: the mapping belongs to no thread, and all access to it is atomic.
unsafe impl Send for MappedPage {}
// SAFETY: as above.
unsafe impl Sync for MappedPage {}

#[derive(Clone, Copy)]
struct Slot {
    serial: u64,
    view: LeaseView,
}

impl MappedPage {
    /// Maps the file, which has at least one page. Whoever truncates it later kills all readers.
    pub fn map(file: &File, writable: bool) -> io::Result<Self> {
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: the kernel chooses a free address, and nobody else knows it.
        let page = unsafe {
            rustix::mm::mmap(ptr::null_mut(), PAGE_BYTES, prot, MapFlags::SHARED, file, 0)
        }?;
        let words = NonNull::new(page.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { words, writable })
    }

    fn words(&self) -> &[AtomicU64; WORDS] {
        // SAFETY: the mapping is a page long, page-aligned, and lives as long as `self`; what other
        // processes do to it, they do to atomic words.
        unsafe { self.words.as_ref() }
    }

    /// The grant that counts; `None` if the page is corrupt.
    pub fn read(&self) -> Option<LeaseView> {
        self.newest().map(|(_, slot)| slot.view)
    }

    /// Puts a grant into the slot that does not count; false if the page is only readable.
    pub fn write(&self, view: LeaseView) -> bool {
        let Some((newest, slot)) = self.newest().filter(|_| self.writable) else { return false };
        let serial = slot.serial + 1;
        let at = SLOTS[1 - newest];
        let words = self.words();
        // First the slot stops counting, so that no mixture of two grants ever counts.
        words[at + 3].store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        words[at].store(serial.to_le(), Ordering::Relaxed);
        words[at + 1].store(view.epoch.to_le(), Ordering::Relaxed);
        words[at + 2].store(view.deadline_ns.to_le(), Ordering::Relaxed);
        words[at + 3].store(check(serial, view).to_le(), Ordering::Release);
        true
    }

    /// Says whether the guest is held; false if the page is only readable.
    pub fn set_held(&self, held: bool) -> bool {
        if self.writable {
            self.words()[HELD].store(u64::from(held).to_le(), Ordering::SeqCst);
        }
        self.writable
    }

    fn newest(&self) -> Option<(usize, Slot)> {
        newest(|index| u64::from_le(self.words()[index].load(Ordering::Acquire)))
    }
}

impl Drop for MappedPage {
    fn drop(&mut self) {
        // SAFETY: this mapping was made in `map`, and no reference to it outlives `self`.
        let _unmapped = unsafe { rustix::mm::munmap(self.words.as_ptr().cast(), PAGE_BYTES) };
    }
}

/// The slot that counts, with its place.
fn newest(word: impl Fn(usize) -> u64) -> Option<(usize, Slot)> {
    if [word(0), word(1)] != [MAGIC, VERSION] {
        return None;
    }
    let valid = SLOTS.iter().enumerate().filter_map(|(index, at)| {
        let claimed = word(at + 3);
        let view = LeaseView { epoch: word(at + 1), deadline_ns: word(at + 2) };
        let slot = Slot { serial: word(*at), view };
        (claimed == check(slot.serial, view)).then_some((index, slot))
    });
    valid.max_by_key(|(_, slot)| slot.serial)
}

/// What a copy of the page's bytes says: the grant that counts, and whether the guest is held.
pub fn parse(bytes: &[u8; PAGE_BYTES]) -> Option<(LeaseView, bool)> {
    let word = |index: usize| {
        bytes.as_chunks::<8>().0.get(index).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    newest(word).map(|(_, slot)| (slot.view, word(HELD) != 0))
}

/// A hash of a slot's words (the finalizer of SplitMix64, chained), never 0.
fn check(serial: u64, view: LeaseView) -> u64 {
    let mix = |hash: u64, word: u64| {
        let mut z = (hash ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    [serial, view.epoch, view.deadline_ns].into_iter().fold(MAGIC, mix) | 1
}

/// The bytes of a page before the first grant.
pub fn fresh() -> Vec<u8> {
    let view = LeaseView::default();
    let mut words = [0u64; WORDS];
    words[0] = MAGIC;
    words[1] = VERSION;
    words[SLOTS[0]] = 1;
    words[SLOTS[0] + 3] = check(1, view);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
