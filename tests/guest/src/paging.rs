//! The identity map. `boot.s` maps the first GiB; the rest is added here, natively, from ring 3.
//!
//! Every entry is user-accessible, so page tables are ordinary memory for ring 3. Entries are only ever
//! added, and absent entries are not cached by the processor, so nothing needs flushing.

use crate::boot;
use crate::pvh::Region;
use crate::sync::Lock;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
const TABLE: u64 = 0x27;
const LEAF_RAM: u64 = 0xe7;
const LEAF_MMIO: u64 = 0xff;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Enough tables for 250 GiB of RAM and a few BARs far above it.
const TABLES_MAX: usize = 256;

#[repr(C, align(4096))]
struct Table([AtomicU64; 512]);

static TABLES: [Table; TABLES_MAX] =
    [const { Table([const { AtomicU64::new(0) }; 512]) }; TABLES_MAX];
static TABLES_USED: Lock<usize> = Lock::new(0);

/// Maps the first 4 GiB, where the loader's structures and the fixed MMIO are.
pub fn map_low() {
    for gib in 1..4 {
        map_gib(gib * GIB, &|page| if page >= 3 * GIB { LEAF_MMIO } else { LEAF_RAM });
    }
}

/// Maps up to 8 GiB in any case, and all RAM. RAM above 3 GiB becomes cacheable.
pub fn map_ram(ram: &[Region]) {
    let leaf = |page| {
        let overlaps = |r: &Region| r.start < page + LARGE_PAGE && page < r.end;
        if ram.iter().any(overlaps) { LEAF_RAM } else { LEAF_MMIO }
    };
    let top = ram.iter().map(|r| r.end).max().unwrap_or(0).max(8 * GIB);
    for gib in 4..top.div_ceil(GIB) {
        map_gib(gib * GIB, &leaf);
    }
    let high = ram.iter().any(|r| r.start < 4 * GIB && r.end > 3 * GIB);
    if high {
        set_leaves(directory(3 * GIB), 3 * GIB, &leaf);
    }
}

/// Maps a device's registers, wherever they are.
pub fn map_mmio(start: u64, len: u64) {
    let last = start + len.max(1) - 1;
    for gib in start / GIB..=last / GIB {
        if directory(gib * GIB).is_none() {
            map_gib(gib * GIB, &|_| LEAF_MMIO);
        }
    }
}

/// The directory is filled before it is linked: where the host shadows page tables, linked ones are slow to write.
fn map_gib(start: u64, leaf: &dyn Fn(u64) -> u64) {
    let page_directory = new_table();
    set_leaves(Some(page_directory), start, leaf);
    let slot = pointer_slot(start);
    slot.store(address(page_directory) | TABLE, Relaxed);
}

fn set_leaves(directory: Option<&'static [AtomicU64; 512]>, start: u64, leaf: &dyn Fn(u64) -> u64) {
    for (page, entry) in (start..).step_by(LARGE_PAGE as usize).zip(directory.into_iter().flatten())
    {
        entry.store(page | leaf(page), Relaxed);
    }
}

fn directory(start: u64) -> Option<&'static [AtomicU64; 512]> {
    table_of(pointer_slot(start).load(Relaxed))
}

/// The entry of the page directory pointer table for this GiB; the table is made if it is missing.
fn pointer_slot(start: u64) -> &'static AtomicU64 {
    // SAFETY: the top table is static and its words are atomics.
    let top = unsafe { &boot::pml4[(start >> 39 & 511) as usize] };
    let pointers = table_of(top.load(Relaxed)).unwrap_or_else(|| {
        let fresh = new_table();
        top.store(address(fresh) | TABLE, Relaxed);
        fresh
    });
    &pointers[(start >> 30 & 511) as usize]
}

fn table_of(entry: u64) -> Option<&'static [AtomicU64; 512]> {
    let at = core::ptr::with_exposed_provenance::<[AtomicU64; 512]>((entry & ADDRESS) as usize);
    // SAFETY: entries point to tables of this module or of `boot.s`, all static and identity mapped.
    (entry != 0).then(|| unsafe { &*at })
}

fn new_table() -> &'static [AtomicU64; 512] {
    let index = TABLES_USED.with(|used| {
        *used += 1;
        *used - 1
    });
    match TABLES.get(index) {
        Some(table) => &table.0,
        None => crate::fatal!("paging tables={TABLES_MAX} are not enough for this much memory"),
    }
}

fn address(table: &'static [AtomicU64; 512]) -> u64 {
    table.as_ptr().expose_provenance() as u64
}
