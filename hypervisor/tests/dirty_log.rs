//! KVM's dirty log, both ways of clearing it, with a guest of seven instructions.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use bellwether_memory::{DirtyLog, GuestRam};
use bellwether_vmm::kvm::dirty::{KvmDirtyLog, Protection};
use bellwether_vmm::kvm::{GuestBus, GuestEnd, RunOutcome, Vm};
use vm_memory::{Bytes, GuestAddress};

const CODE: u32 = 0x1000;
/// Writes ECX to 16 pages, every other one from EBX on, then leaves through port 0x10.
const PROGRAM: [u8; 19] = [
    0xb9, 0x10, 0x00, 0x00, 0x00, // mov ecx, 16
    0x89, 0x0b, // mov [ebx], ecx
    0x81, 0xc3, 0x00, 0x20, 0x00, 0x00, // add ebx, 0x2000
    0x49, // dec ecx
    0x75, 0xf5, // jnz
    0xe6, 0x10, // out 0x10, al
    0xf4, // hlt
];

const NOTHING: [u64; 0] = [];

/// The port ends the run.
struct Port;

impl GuestBus for Port {
    fn port_read(&self, _: u16, _: &mut [u8]) {}

    fn port_write(&self, port: u16, _: &[u8]) -> Option<GuestEnd> {
        (port == 0x10).then_some(GuestEnd::Shutdown)
    }

    fn memory_read(&self, _: u64, _: &mut [u8]) {}

    fn memory_write(&self, _: u64, _: &[u8]) {}
}

struct Guest {
    vm: Vm,
    ram: Arc<GuestRam>,
    vcpu: bellwether_vmm::kvm::Vcpu,
}

impl Guest {
    fn new() -> Self {
        let ram = Arc::new(GuestRam::new(4 << 20).unwrap());
        ram.memory().write_slice(&PROGRAM, GuestAddress(CODE.into())).unwrap();
        let vm = Vm::new(&ram).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(vm.guest_cpuid(0, 1).unwrap()).unwrap();
        Self { vm, ram, vcpu }
    }

    /// Lets the guest write from this page on.
    fn write_from(&mut self, page: u32) {
        self.vcpu.set_pvh_entry(CODE, page * 4096).unwrap();
        loop {
            match self.vcpu.run(&Port).unwrap() {
                RunOutcome::Ended(end) => return assert_eq!(end, GuestEnd::Shutdown),
                RunOutcome::Continue | RunOutcome::Interrupted => {}
            }
        }
    }

    /// The pages from 256 on that the log says were written.
    fn logged(&self, log: &KvmDirtyLog) -> Vec<u64> {
        let mut words = vec![0u64; (self.ram.size() / 4096 / 64) as usize];
        log.collect(0, &mut words).unwrap();
        (256..1024)
            .filter(|page| words[page / 64] >> (page % 64) & 1 == 1)
            .map(|p| p as u64)
            .collect()
    }
}

fn every_other(from: u64) -> Vec<u64> {
    (from..from + 32).step_by(2).collect()
}

#[test]
fn with_manual_protection_a_page_stays_in_the_log_until_it_is_cleared() {
    let mut guest = Guest::new();
    let log = guest.vm.start_dirty_log().unwrap();
    if log.protection() == Protection::OnRead {
        // An older kernel; the other test is about what it does.
        return;
    }
    log.clear(0, 0, &[u64::MAX; 16]).unwrap();
    assert_eq!(guest.logged(&log), NOTHING);
    guest.write_from(256);
    assert_eq!(guest.logged(&log), every_other(256));
    assert_eq!(guest.logged(&log), every_other(256), "reading clears nothing");
    // The first word of the second MiB: the first 64 pages, of which half were written.
    log.clear(0, 4, &[0b0101]).unwrap();
    assert_eq!(guest.logged(&log), every_other(256)[2..]);
    guest.write_from(256);
    assert_eq!(guest.logged(&log), every_other(256), "what was cleared is watched again");
    drop(log);
    guest.write_from(400);
    let log = guest.vm.start_dirty_log().unwrap();
    log.clear(0, 0, &[u64::MAX; 16]).unwrap();
    assert_eq!(guest.logged(&log), NOTHING, "a log that was off has noted nothing");
}

#[test]
fn without_manual_protection_reading_the_log_clears_it() {
    let mut guest = Guest::new();
    let log = guest.vm.start_dirty_log_on_read().unwrap();
    assert_eq!(log.protection(), Protection::OnRead);
    let _before = guest.logged(&log);
    guest.write_from(256);
    assert_eq!(guest.logged(&log), every_other(256));
    assert_eq!(guest.logged(&log), NOTHING);
    log.clear(0, 4, &[u64::MAX]).unwrap();
    guest.write_from(300);
    assert_eq!(guest.logged(&log), every_other(300));
}
