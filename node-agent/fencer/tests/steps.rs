//! Step by step, with real processes, real pages and a pipe for a watchdog.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

mod common;

use bellwether_fencer::facts::Facts;
use bellwether_fencer::fencer::{Fencer, FencerError, Punctual};
use common::{MS, Node, Wire, now_ns};

/// A node with a watchdog, and its fencer.
fn armed(node: &Node) -> (Fencer, Wire) {
    let mut fencer = Fencer::prepare(&node.config()).unwrap();
    let (wire, watchdog) = Wire::new();
    fencer.arm(watchdog);
    (fencer, wire)
}

fn step_until(fencer: &mut Fencer, end_ns: u64) {
    while now_ns() < end_ns {
        fencer.step();
    }
}

#[test]
fn it_pets_under_a_fresh_grant_and_not_after_it() {
    let node = Node::new();
    let (mut fencer, mut wire) = armed(&node);
    let vmm = node.vmm(1, "lease");
    let end = now_ns() + 900 * MS;
    vmm.page.grant(7, end + 10_000 * MS).unwrap();
    node.grants().grant(1, end).unwrap();
    fencer.step();
    assert_eq!(wire.bytes(), ".");
    step_until(&mut fencer, end);
    wire.bytes();
    fencer.step();
    assert_eq!(wire.bytes(), "", "the grant is over and a VM depends on it");
    node.grants().grant(1, now_ns() + 900 * MS).unwrap();
    fencer.step();
    assert_eq!(wire.bytes(), ".", "a new grant came before the period was over");
}

#[test]
fn a_grant_that_ends_too_far_ahead_is_nobodys() {
    let node = Node::new();
    let (mut fencer, mut wire) = armed(&node);
    let vmm = node.vmm(1, "lease");
    vmm.page.grant(7, now_ns() + 10_000 * MS).unwrap();
    node.grants().grant(1, now_ns() + 10_000 * MS).unwrap();
    fencer.step();
    assert_eq!(wire.bytes(), "");
}

#[test]
fn vms_under_the_storage_arbiter_keep_the_host_from_nothing() {
    let node = Node::new();
    let (mut fencer, mut wire) = armed(&node);
    let mut storage = node.vmm(1, "storage");
    storage.page.grant(7, 1).unwrap();
    fencer.step();
    assert_eq!(wire.bytes(), ".", "no grant at all, and nobody needs one");
    assert!(storage.lives());
}

#[test]
fn what_cannot_be_read_may_depend_on_the_lease() {
    let node = Node::new();
    let (mut fencer, mut wire) = armed(&node);
    let storage = node.vmm(1, "storage");
    std::fs::write(storage.home().join("incarnation.json"), "{").unwrap();
    fencer.step();
    assert_eq!(wire.bytes(), "");
    std::fs::remove_dir_all(storage.home()).unwrap();
    fencer.step();
    assert_eq!(wire.bytes(), ".");
}

#[test]
fn a_vmm_that_does_not_stop_is_killed_and_the_host_is_spared() {
    let node = Node::new();
    let (mut fencer, mut wire) = armed(&node);
    let mut overdue = node.vmm(1, "lease");
    let mut held = node.vmm(2, "lease");
    let mut storage = node.vmm(3, "storage");
    let deadline = now_ns() + 30 * MS;
    for vmm in [&overdue, &held, &storage] {
        vmm.page.grant(7, deadline).unwrap();
    }
    held.page.set_held(true).unwrap();
    step_until(&mut fencer, deadline + 300 * MS);
    assert!(overdue.lives(), "it still has time to stop");
    assert_eq!(wire.bytes(), "", "it may run, and there is no grant");
    step_until(&mut fencer, deadline + 1_001 * MS);
    fencer.step();
    assert!(overdue.was_killed());
    wire.bytes();
    fencer.step();
    assert_eq!(wire.bytes(), ".", "nobody depends on the lease any more");
    assert!(held.lives() && storage.lives());
}

#[test]
fn another_process_with_the_number_is_not_killed() {
    let node = Node::new();
    let (mut fencer, mut wire) = armed(&node);
    let mut stranger = node.vmm(1, "lease");
    stranger.page.grant(7, 1).unwrap();
    stranger.write_down("lease", 1);
    fencer.step();
    assert!(stranger.lives());
    assert_eq!(wire.bytes(), ".", "the VMM that is meant is gone");
}

#[test]
fn disarming_is_refused_while_a_vm_depends_on_it() {
    let node = Node::new();
    let (mut fencer, mut wire) = armed(&node);
    let config = node.config();
    fencer.publish(&config, Punctual { realtime: true, locked: true }).unwrap();
    let vmm = node.vmm(1, "lease");
    vmm.page.grant(7, now_ns() + 10_000 * MS).unwrap();
    assert!(!fencer.disarm());
    assert_eq!(wire.bytes(), "");
    assert!(Facts::read(&config.directory()).unwrap().is_some());
    vmm.page.set_held(true).unwrap();
    assert!(fencer.disarm());
    assert_eq!(wire.bytes(), "V");
    assert_eq!(Facts::read(&config.directory()).unwrap(), None);
}

#[test]
fn a_fencer_that_dies_leaves_the_watchdog_armed() {
    let node = Node::new();
    let (fencer, mut wire) = armed(&node);
    drop(fencer);
    assert!(!wire.bytes().contains('V'));
}

#[test]
fn one_node_has_one_fencer() {
    let node = Node::new();
    let _first = Fencer::prepare(&node.config()).unwrap();
    let second = Fencer::prepare(&node.config()).unwrap_err();
    assert!(matches!(second, FencerError::InUse { .. }), "{second}");
}
