//! The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst and zero-page.rst): the
//! "zero page" with everything that firmware would have found out, and what long mode needs.

use vm_memory::{Bytes, GuestAddress};

use super::bzimage::{Image, SETUP_HEADER};
use super::initrd::Initrd;
use super::{BootError, e820};
use crate::{GuestMemory, layout};

/// Offsets in `boot_params`.
const RSDP: usize = 0x070;
const E820_COUNT: usize = 0x1e8;
const LOADER_TYPE: usize = 0x210;
const INITRD_ADDRESS: usize = 0x218;
const INITRD_BYTES: usize = 0x21c;
const CMDLINE: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
const BYTES: usize = 4096;

/// A loader without a number of its own.
const LOADER_UNKNOWN: u8 = 0xff;
const E820_ENTRIES_MAX: usize = 128;

/// A null descriptor, an unused one, 64-bit code (0x10), data (0x18) and a task (0x20), as the protocol asks for.
const GDT: [u64; 6] =
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0];

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const TABLE_ENTRIES: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;
/// One page directory for each of the first four GiB.
const DIRECTORIES: u64 = 4;

/// Writes everything but the kernel, the initrd and the command line; returns the zero page's address.
pub fn write(
    memory: &GuestMemory,
    image: &Image,
    initrd: Option<&Initrd>,
    rsdp: u64,
) -> Result<u64, BootError> {
    let put = |what, bytes: &[u8], address| {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| BootError::Memory { what, source })
    };
    let map = e820::map(memory);
    put("the boot parameters", &boot_params(image, initrd, rsdp, &map), layout::BOOT_PARAMS)?;
    put("the descriptor table", &little_endian(&GDT), layout::GDT)?;
    put("the page tables", &little_endian(&identity_map()), layout::PAGE_TABLES)?;
    Ok(layout::BOOT_PARAMS)
}

/// The last byte of the descriptor table.
pub const GDT_LIMIT: u16 = size_of::<[u64; GDT.len()]>() as u16 - 1;

fn little_endian(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn boot_params(image: &Image, initrd: Option<&Initrd>, rsdp: u64, map: &[e820::Range]) -> Vec<u8> {
    let mut raw = vec![0; BYTES];
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    put(SETUP_HEADER, image.setup_header());
    put(RSDP, &rsdp.to_le_bytes());
    put(LOADER_TYPE, &[LOADER_UNKNOWN]);
    if let Some(initrd) = initrd {
        // Both are below 4 GiB: an initrd lies in low memory.
        put(INITRD_ADDRESS, &(initrd.address as u32).to_le_bytes());
        put(INITRD_BYTES, &(initrd.bytes() as u32).to_le_bytes());
    }
    put(CMDLINE, &(layout::CMDLINE as u32).to_le_bytes());
    let map = &map[..map.len().min(E820_ENTRIES_MAX)];
    put(E820_COUNT, &[map.len() as u8]);
    for (range, at) in map.iter().zip((E820_TABLE..).step_by(20)) {
        put(at, &range.address.to_le_bytes());
        put(at + 8, &range.bytes.to_le_bytes());
        put(at + 16, &(range.kind as u32).to_le_bytes());
    }
    raw
}

/// Three levels one behind the other, which map the first four GiB to themselves.
fn identity_map() -> Vec<u64> {
    let table = |index: u64| layout::PAGE_TABLES + index * 4096;
    let entry = |index| table(index) | PRESENT_WRITABLE;
    let mut words = vec![0; TABLE_ENTRIES as usize * (2 + DIRECTORIES as usize)];
    words[0] = entry(1);
    for directory in 0..DIRECTORIES {
        words[(TABLE_ENTRIES + directory) as usize] = entry(2 + directory);
    }
    for (page, word) in (0..).zip(&mut words[2 * TABLE_ENTRIES as usize..]) {
        *word = (page * LARGE_PAGE) | PRESENT_WRITABLE | LARGE;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::super::bytes::{u32_at, u64_at};
    use super::super::bzimage::tests::{file_bytes, image_of};
    use super::*;

    /// What a processor does with an address.
    fn translate(words: &[u64], address: u64) -> u64 {
        let at =
            |table: u64, index: u64| words[((table - layout::PAGE_TABLES) / 8 + index) as usize];
        let pointer = at(layout::PAGE_TABLES, address >> 39 & 511);
        let directory = at(pointer & !0xfff, address >> 30 & 511);
        let page = at(directory & !0xfff, address >> 21 & 511);
        assert_eq!([pointer, directory, page].map(|entry| entry & 0b11), [0b11; 3]);
        assert_ne!(page & LARGE, 0);
        page & !(LARGE_PAGE - 1) | address & (LARGE_PAGE - 1)
    }

    #[test]
    fn the_first_four_gib_are_mapped_to_themselves() {
        let words = identity_map();
        for address in [0, 0x9000, 0x100_0200, 0xbfff_ffff, 0xffff_ffff] {
            assert_eq!(translate(&words, address), address);
        }
        let end = layout::PAGE_TABLES + words.len() as u64 * 8;
        assert!(end <= layout::LOW_END);
    }

    #[test]
    fn the_zero_page_has_the_header_and_what_a_loader_adds() {
        let image = image_of(&file_bytes(8000)).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 5000]).unwrap();
        let initrd = Initrd::open(file.path(), 0x200_0000..0x400_0000).unwrap();
        let map = [e820::Range { address: 1, bytes: 2, kind: e820::Kind::Reserved }; 3];
        let raw = boot_params(&image, Some(&initrd), 0xe_0000, &map);
        assert_eq!(raw.len(), 4096);
        assert_eq!((&raw[0x202..0x206], raw[0x210]), (&b"HdrS"[..], 0xff));
        assert_eq!(u64_at(&raw, 0x70), 0xe_0000);
        assert_eq!((u32_at(&raw, 0x218), u32_at(&raw, 0x21c)), (0x3ff_e000, 5000));
        assert_eq!(u64::from(u32_at(&raw, 0x228)), layout::CMDLINE);
        assert_eq!((raw[0x1e8], u64_at(&raw, 0x2d0 + 40), raw[0x2d0 + 56]), (3, 1, 2));
        // The kernel clears a zero page whose sentinel is not zero.
        assert_eq!(raw[0x1ef], 0);
        let without = boot_params(&image, None, 0xe_0000, &map);
        assert_eq!((u32_at(&without, 0x218), u32_at(&without, 0x21c)), (0, 0));
    }
}
