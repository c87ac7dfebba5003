//! Once it runs, the fencer allocates nothing: neither a lack of memory nor a lock of the allocator
//! can hold it up. The one test of this program, because all threads of a program are counted.

mod common;

use std::alloc::System;

use bellwether_fencer::fencer::Fencer;
use common::{MS, Node, Wire, now_ns};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Steps, and counts what they allocate.
fn allocations(fencer: &mut Fencer, steps: usize) -> usize {
    let region = Region::new(ALLOCATOR);
    (0..steps).for_each(|_| fencer.step());
    let change = region.change();
    change.allocations + change.reallocations
}

#[test]
fn no_step_allocates_whatever_it_finds() {
    let node = Node::new();
    let mut fencer = Fencer::prepare(&node.config()).unwrap();
    let (mut wire, watchdog) = Wire::new();
    fencer.arm(watchdog);
    let vmms: Vec<_> = (0..50).map(|number| node.vmm(number, "lease")).collect();
    let grants = node.grants();
    let mut overdue = node.vmm(100, "lease");
    let corrupt = node.vmm(101, "storage");

    let region = Region::new(ALLOCATOR);
    drop(std::hint::black_box(vec![1]));
    assert_eq!(region.change().allocations, 1, "the counter counts");

    // Granted; then the grant is over, a VMM is killed, a record and the grant page are damaged.
    let deadline = now_ns() + 10_000 * MS;
    for vmm in &vmms {
        vmm.page.grant(7, deadline).unwrap();
    }
    overdue.page.grant(7, deadline).unwrap();
    grants.grant(1, now_ns() + 900 * MS).unwrap();
    assert_eq!(allocations(&mut fencer, 20), 0);
    overdue.page.grant(8, 1).unwrap();
    assert_eq!(allocations(&mut fencer, 1), 0);
    assert!(overdue.was_killed());
    std::fs::write(corrupt.home().join("incarnation.json"), "{").unwrap();
    std::fs::write(node.dir.path().join("fencer/grant"), vec![0; 4096]).unwrap();
    assert_eq!(allocations(&mut fencer, 20), 0);
    assert!(wire.bytes().starts_with('.'), "it did its work meanwhile");
}
