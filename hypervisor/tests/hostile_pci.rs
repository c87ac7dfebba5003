//! A hostile driver's accesses to the registers of a virtio device: configuration space, all regions
//! of the BAR, and the window between them, with any offset, width and value.
//!
//! Nothing of it ends the VMM or its threads, and after a reset an honest driver finds a device.
#![allow(clippy::unwrap_used)]

mod attack;

use std::sync::Arc;
use std::time::{Duration, Instant};

use attack::{AVAILABLE, DATA, RAM, TABLE, USED, WRITE, at, used, write_queue};
use bellwether_memory::GuestRam;
use bellwether_vmm::devices::pci::PciDevice;
use bellwether_vmm::devices::rng::Rng;
use bellwether_vmm::devices::virtio::{Link, Msix, VirtioPci};
use bellwether_vmm::gate::{Gate, Hold};
use bellwether_vmm::kvm::Vm;
use proptest::prelude::*;

const LONG: Duration = Duration::from_secs(30);
const SLOT: usize = 17;
/// Regions of the BAR.
const STATUS: u64 = 0x14;
const NOTIFY: u64 = 0x3000;

#[derive(Clone, Debug)]
enum Access {
    ConfigRead { register: u8, len: usize },
    ConfigWrite { register: u8, bytes: Vec<u8> },
    BarRead { offset: u64, len: usize },
    BarWrite { offset: u64, bytes: Vec<u8> },
}

fn width() -> impl Strategy<Value = usize> {
    prop_oneof![2 => Just(1usize), 3 => Just(2), 6 => Just(4), 2 => Just(8), 1 => 1usize..9]
}

/// A value that means something as an address, a size, a status, a vector or a number of bits.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![
        4 => 0u64..20, 2 => Just(u64::MAX), 2 => Just(TABLE), 1 => Just(AVAILABLE), 1 => Just(USED),
        1 => Just(RAM - 16), 2 => any::<u64>(),
    ];
    (value, width()).prop_map(|(value, len)| value.to_le_bytes()[..len].to_vec())
}

fn register() -> impl Strategy<Value = u8> {
    prop_oneof![2 => 0u8..0x40, 6 => (16u8..48).prop_map(|dword| dword * 4), 1 => any::<u8>()]
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..15).prop_map(|dword| dword * 4), 2 => (0u64..28).prop_map(|word| word * 2),
        2 => Just(STATUS), 1 => 0x1000u64..0x1010, 1 => 0x2000u64..0x2200, 2 => NOTIFY..NOTIFY + 16,
        2 => (0u64..12).prop_map(|dword| 0x4000 + dword * 4), 1 => 0x5000u64..0x5010,
        1 => 0u64..0x8000,
    ]
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        1 => (register(), width()).prop_map(|(register, len)| Access::ConfigRead { register, len }),
        2 => (register(), bytes())
            .prop_map(|(register, bytes)| Access::ConfigWrite { register, bytes }),
        1 => (offset(), width()).prop_map(|(offset, len)| Access::BarRead { offset, len }),
        6 => (offset(), bytes()).prop_map(|(offset, bytes)| Access::BarWrite { offset, bytes }),
    ]
}

struct Device {
    transport: VirtioPci,
    ram: Arc<GuestRam>,
}

impl Device {
    fn new() -> Self {
        let ram = Arc::new(GuestRam::new(RAM).unwrap());
        let vm = Arc::new(Vm::new(&ram).unwrap());
        let link = Link::new(Msix::new(Arc::clone(&vm.irq), 2).unwrap(), 1);
        let gate = Arc::new(Gate::new());
        gate.release(Hold::NotStarted);
        let memory = ram.memory().clone();
        let rng = Arc::new(Rng::new(memory.clone(), gate, Arc::clone(&link)).unwrap());
        let transport = VirtioPci::new(rng, link, vm, memory, SLOT).unwrap();
        Self { transport, ram }
    }

    fn apply(&self, access: &Access) {
        match access {
            Access::ConfigRead { register, len } => {
                self.transport.config_read(*register, &mut vec![0; *len]);
            }
            Access::ConfigWrite { register, bytes } => {
                self.transport.config_write(*register, bytes);
            }
            Access::BarRead { offset, len } => {
                self.transport.bar_read(*offset, &mut vec![0; *len]);
            }
            Access::BarWrite { offset, bytes } => self.transport.bar_write(*offset, bytes),
        }
    }

    fn put(&self, offset: u64, value: u64, len: usize) {
        self.transport.bar_write(offset, &value.to_le_bytes()[..len]);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.transport.bar_read(STATUS, &mut status);
        status[0]
    }

    /// What an honest driver does: reset, features, queue, a request.
    fn assert_works(&self) {
        self.put(STATUS, 0, 1);
        assert_eq!(self.status(), 0);
        write_queue(&self.ram, &[at(DATA, 64, WRITE, 0)], &[0], 1);
        self.put(STATUS, 3, 1);
        for (half, features) in [(0, 0), (1, 1)] {
            self.put(0x08, half, 4);
            self.put(0x0c, features, 4);
        }
        self.put(STATUS, 11, 1);
        self.put(0x16, 0, 2);
        self.put(0x18, 16, 2);
        for (register, address) in [(0x20, TABLE), (0x28, AVAILABLE), (0x30, USED)] {
            self.put(register, address, 8);
        }
        self.put(0x1c, 1, 2);
        self.put(STATUS, 15, 1);
        assert_eq!(self.status(), 15);
        self.put(NOTIFY, 0, 2);
        let deadline = Instant::now() + LONG;
        while used(&self.ram) == 0 {
            assert!(Instant::now() < deadline, "an honest driver gets no answer");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_device_survives_any_accesses_and_works_after_a_reset() {
    let device = Device::new();
    device.assert_works();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(300));
    let outcome = runner.run(&proptest::collection::vec(access(), 1..60), |accesses| {
        accesses.iter().for_each(|access| device.apply(access));
        device.assert_works();
        Ok(())
    });
    outcome.unwrap();
}
