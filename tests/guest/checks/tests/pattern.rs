//! Patterned memory, rates, and the arithmetic of the clock.

use bellwether_guest_checks::budget::Budget;
use bellwether_guest_checks::page_stream::{Key, WORDS};
use bellwether_guest_checks::pages::{PAGE_BYTES, PageSet};
use bellwether_guest_checks::pattern::{Fill, Pattern, Verified};
use bellwether_guest_checks::pvclock::{TimeInfo, ticks_to_ns};

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u64; WORDS]);

/// Memory that lives as long as the test process, in two extents with another page between them.
fn memory(pages: usize) -> (*mut Page, PageSet) {
    let memory = vec![Page([0; WORDS]); pages + 1].leak().as_mut_ptr();
    let start = memory.expose_provenance() as u64;
    let mut set = PageSet::default();
    assert!(set.push(start, 1));
    assert!(set.push(start + 2 * PAGE_BYTES, pages as u64 - 1));
    (memory, set)
}

fn pattern(pages: usize) -> (*mut Page, Pattern) {
    let (memory, set) = memory(pages);
    // SAFETY: the memory was just allocated for this.
    let mut pattern = unsafe { Pattern::new(5, set, vec![0; pages].leak()) };
    while pattern.is_blank() {
        assert!(pattern.rewrite_next().is_ok());
    }
    (memory, pattern)
}

fn full_pass(pattern: &mut Pattern) -> Result<(), bellwether_guest_checks::pattern::Mismatch> {
    while let Verified::Page = pattern.verify_next()? {}
    Ok(())
}

#[test]
fn extents_are_numbered_through() {
    let (memory, set) = memory(4);
    let start = memory.addr() as u64;
    let offsets: Vec<_> = (0..5).map(|page| set.address(page).map(|a| a - start)).collect();
    assert_eq!(offsets, [Some(0), Some(2 * 4096), Some(3 * 4096), Some(4 * 4096), None]);
}

#[test]
fn every_page_is_reached_and_verifies() {
    for pages in [2, 3, 64, 7919] {
        let (_, mut pattern) = pattern(pages);
        assert_eq!(pattern.generation_max(), 1, "{pages} pages, each written once");
        full_pass(&mut pattern).unwrap();
        assert_eq!(pattern.verified(), pages as u64);
    }
}

#[test]
fn every_wrong_bit_is_found_where_it_is() {
    let (memory, mut pattern) = pattern(2);
    for byte in (0..4096).step_by(37) {
        let at = memory.cast::<u8>().wrapping_add(byte);
        // SAFETY: within the first page of the allocation.
        unsafe { *at ^= 0x10 };
        let wrong = full_pass(&mut pattern).unwrap_err();
        assert_eq!((wrong.address, wrong.expected ^ wrong.found), (at.addr() as u64, 0x10));
        // SAFETY: as above.
        unsafe { *at ^= 0x10 };
    }
    full_pass(&mut pattern).unwrap();
}

#[test]
fn a_stale_page_is_found_although_it_is_well_formed() {
    let (memory, mut pattern) = pattern(2);
    // SAFETY: the first page of the allocation.
    let old = unsafe { (*memory).clone() };
    pattern.rewrite_next().unwrap();
    pattern.rewrite_next().unwrap();
    full_pass(&mut pattern).unwrap();
    // SAFETY: as above.
    unsafe { *memory = old };
    let wrong = full_pass(&mut pattern).unwrap_err();
    assert_eq!((wrong.key.generation, wrong.found_generation), (2, 1));
}

#[test]
fn exchanged_pages_are_found() {
    let (memory, mut pattern) = pattern(2);
    // SAFETY: pages 0 and 2 of the allocation are the two of the set.
    unsafe { memory.swap(memory.add(2)) };
    assert_eq!(full_pass(&mut pattern).unwrap_err().found_page, 1);
}

#[test]
fn rewriting_does_not_hide_a_wrong_byte() {
    let (memory, mut pattern) = pattern(2);
    // SAFETY: the first page of the allocation.
    unsafe { (*memory).0[300] ^= 1 };
    assert!((0..2).any(|_| pattern.rewrite_next().is_err()));
}

#[test]
fn a_fill_is_written_once_and_verified_on_demand() {
    let (memory, set) = memory(3);
    // SAFETY: the memory was just allocated for this.
    let mut fill = unsafe { Fill::new(5, set) };
    assert_eq!((0..3).map(|_| fill.write_next()).collect::<Vec<_>>(), [false, false, true]);
    fill.start_verifying();
    while !fill.verify_next().unwrap() {}
    assert!(!fill.is_verifying());
    // SAFETY: the last page of the allocation.
    unsafe { (*memory.add(3)).0[511] ^= 1 };
    fill.start_verifying();
    assert!((0..4).any(|_| fill.verify_next().is_err()));
}

#[test]
fn an_empty_pattern_and_an_empty_fill_do_nothing() {
    // SAFETY: there are no pages.
    let mut pattern = unsafe { Pattern::new(5, PageSet::default(), &mut []) };
    assert!(!pattern.is_blank());
    pattern.rewrite_next().unwrap();
    full_pass(&mut pattern).unwrap();
    // SAFETY: as above.
    let mut fill = unsafe { Fill::new(5, PageSet::default()) };
    assert!(!fill.is_writing());
    fill.start_verifying();
    assert!(fill.verify_next().unwrap());
}

#[test]
fn streams_of_neighbours_have_nothing_in_common() {
    let key = Key { seed: 1, page: 2, generation: 3 };
    let others = [Key { seed: 2, ..key }, Key { page: 3, ..key }, Key { generation: 4, ..key }];
    let words: Vec<_> = key.words().collect();
    assert_eq!((words.len(), words[0], words[1]), (WORDS, 3, 2));
    for other in others {
        let same = key.words().zip(other.words()).skip(2).filter(|(a, b)| a == b).count();
        assert_eq!(same, 0);
    }
}

#[test]
fn a_budget_gives_its_rate_and_no_more_than_its_cap() {
    let mut budget = Budget::new(1);
    let pages: usize = (0..1000)
        .map(|_| {
            budget.accrue(1_000_000);
            std::iter::from_fn(|| budget.take_page().then_some(())).count()
        })
        .sum();
    assert_eq!(pages, 256, "1 MiB in one second, in a thousand shares");
    budget.accrue(u64::MAX / 2);
    assert_eq!(std::iter::from_fn(|| budget.take_page().then_some(())).count(), 25, "100 ms worth");
    let mut idle = Budget::new(0);
    idle.accrue(u64::MAX / 2);
    assert!(!idle.take_page());
}

#[test]
fn the_paravirtual_clock_scales_as_its_specification_says() {
    let info = TimeInfo {
        tsc_timestamp: 100,
        system_time: 5000,
        tsc_to_system_mul: 1 << 31,
        tsc_shift: 1,
    };
    assert_eq!(info.ns_at(100), 5000);
    assert_eq!(info.ns_at(1100), 6000);
    assert_eq!(info.ns_at(99), 5000, "a counter that is a little behind is not wrapped");
    assert_eq!(TimeInfo { tsc_shift: -1, ..info }.ns_at(1100), 5250);
    assert_eq!(ticks_to_ns(3_000_000_000 * 1_000_000, 3_000_000_000), 1_000_000 * 1_000_000_000);
}
