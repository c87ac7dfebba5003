//! A hostile driver: descriptor chains that are anything at all, biased to the almost valid.
//!
//! Whatever the guest writes, the device neither panics nor touches anything outside its disk and
//! guest memory; each chain is answered, or the queue is broken and says so; and after a reset the
//! device works.
#![allow(clippy::unwrap_used)]

mod attack;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use attack::{
    DATA, Descriptor, INDIRECT, NEXT, RAM, TABLE, USED, WRITE, at, queue, used, write_queue,
};
use bellwether_memory::GuestRam;
use bellwether_types::{DiskFormat, DiskSpec};
use bellwether_vmm::devices::block::{Block, Caching, Disk, RequestKind, parse};
use bellwether_vmm::devices::virtio::{Link, Msix, VirtioDevice};
use bellwether_vmm::gate::{Gate, Hold};
use bellwether_vmm::kvm::Vm;
use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::{Bytes, GuestAddress};

const SECTORS: u64 = 64;
const FEATURES: u64 = 1 << 32 | 1 << 9;

/// Everything that a driver writes for one chain.
#[derive(Clone, Debug)]
struct Attack {
    descriptors: Vec<Descriptor>,
    head: u16,
    kind: u32,
    sector: u64,
    available: u16,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0u64..8).prop_map(|page| DATA + page * 0x1000),
        1 => Just(RAM - 1),
        1 => Just(RAM - 512),
        1 => Just(TABLE),
        1 => Just(USED),
        1 => any::<u64>(),
        1 => Just(u64::MAX),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => Just(16u32), 3 => Just(1), 3 => Just(512), 2 => Just(4096), 1 => Just(0),
        1 => Just(u32::MAX), 2 => 0u32..2000, 1 => any::<u32>(),
    ]
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let flags = prop_oneof![
        4 => Just(NEXT), 3 => Just(WRITE), 3 => Just(NEXT | WRITE), 1 => Just(0), 1 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    let next = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (address(), len(), flags, next).prop_map(|(address, len, flags, next)| Descriptor {
        address,
        len,
        flags,
        next,
    })
}

fn attack() -> impl Strategy<Value = Attack> {
    let kind =
        prop_oneof![3 => Just(0u32), 3 => Just(1), 1 => Just(4), 1 => Just(8), 1 => any::<u32>()];
    let sector =
        prop_oneof![4 => 0u64..SECTORS, 1 => Just(SECTORS), 1 => Just(u64::MAX), 1 => any::<u64>()];
    let head = prop_oneof![8 => Just(0u16), 1 => any::<u16>()];
    let available = prop_oneof![8 => Just(1u16), 1 => any::<u16>()];
    (proptest::collection::vec(descriptor(), 8), head, kind, sector, available).prop_map(
        |(descriptors, head, kind, sector, available)| Attack {
            descriptors,
            head,
            kind,
            sector,
            available,
        },
    )
}

/// A well-formed request: header, data, status.
fn valid(kind: u32, sector: u64, data_flags: u16) -> Attack {
    Attack {
        descriptors: vec![
            at(DATA, 16, NEXT, 1),
            at(DATA + 0x1000, 512, NEXT | data_flags, 2),
            at(DATA + 0x3000, 1, WRITE, 0),
        ],
        head: 0,
        kind,
        sector,
        available: 1,
    }
}

/// Writes the queue and a header; returns the queue as the transport would build it.
fn lay_out(ram: &GuestRam, attack: &Attack) -> Queue {
    write_queue(ram, &attack.descriptors, &[attack.head], attack.available);
    // Both as a header and as an indirect table, every page of data begins with the same words.
    for page in 0..8 {
        let start = DATA + page * 0x1000;
        ram.memory().write_obj(attack.kind, GuestAddress(start)).unwrap();
        ram.memory().write_obj(attack.sector, GuestAddress(start + 8)).unwrap();
    }
    queue()
}

struct Device {
    block: Block,
    link: Arc<Link>,
    ram: Arc<GuestRam>,
    file: NamedTempFile,
    _vm: Vm,
}

impl Device {
    fn new() -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(SECTORS * 512).unwrap();
        let ram = Arc::new(GuestRam::new(RAM).unwrap());
        let vm = Vm::new(&ram).unwrap();
        let link = Link::new(Msix::new(Arc::clone(&vm.irq), 2).unwrap(), 1);
        let spec = DiskSpec { path: file.path().into(), format: DiskFormat::Raw, read_only: false };
        let disk = Disk::open(0, &spec, Caching::UntilFlush).unwrap();
        let gate = Arc::new(Gate::new());
        gate.release(Hold::NotStarted);
        let block = Block::new(disk, ram.memory().clone(), gate, Arc::clone(&link)).unwrap();
        Self { block, link, ram, file, _vm: vm }
    }

    /// Lets the device work on an attack until it has answered or given up; true for an answer.
    fn face(&self, attack: &Attack) -> bool {
        let queue = lay_out(&self.ram, attack);
        self.block.activate(FEATURES, vec![Some(queue)]);
        self.block.queue_events()[0].write(1).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            // A chain may make the device write its answer over the ring itself.
            if used(&self.ram) != 0 {
                return true;
            }
            if self.link.needs_reset() || attack.available == 0 {
                return false;
            }
            assert!(Instant::now() < deadline, "neither an answer nor a broken queue");
            std::thread::yield_now();
        }
    }

    fn status(&self) -> u8 {
        self.ram.memory().read_obj(GuestAddress(DATA + 0x3000)).unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_parsed_request_stays_within_the_disk(attack in attack()) {
        let ram = GuestRam::new(RAM).unwrap();
        let mut queue = lay_out(&ram, &attack);
        let Ok(mut chains) = queue.iter(ram.memory()) else { return Ok(()) };
        let Some(chain) = chains.next() else { return Ok(()) };
        let Ok(request) = parse(chain, ram.memory(), SECTORS).request else { return Ok(()) };
        let bytes: u64 = request.data.iter().map(|piece| u64::from(piece.len)).sum();
        if let RequestKind::Read { offset } | RequestKind::Write { offset } = request.kind {
            prop_assert_eq!(offset % 512, 0);
            prop_assert_eq!(bytes % 512, 0);
            prop_assert!(offset + bytes <= SECTORS * 512);
        }
    }
}

#[test]
fn a_device_survives_every_attack_and_works_afterwards() {
    let device = Device::new();
    let marker = [0x5a; 512];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(400));
    runner
        .run(&attack(), |attack| {
            device.face(&attack);
            // A reset waits until nothing is under way; the transport then forgets the damage.
            device.block.reset();
            device.link.clear_needs_reset();
            prop_assert_eq!(device.file.as_file().metadata().unwrap().len(), SECTORS * 512);
            device.file.as_file().write_all_at(&marker, 7 * 512).unwrap();
            let answered = device.face(&valid(0, 7, WRITE));
            prop_assert!(answered && device.status() == 0);
            let mut read = [0; 512];
            device.ram.memory().read_slice(&mut read, GuestAddress(DATA + 0x1000)).unwrap();
            prop_assert_eq!(read, marker);
            device.block.reset();
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_write_reaches_the_disk_and_errors_have_a_status() {
    let device = Device::new();
    let mut attack = valid(1, 3, 0);
    assert!(device.face(&attack));
    assert_eq!(device.status(), 0);
    let mut sector = [0; 512];
    File::open(device.file.path()).unwrap().read_exact_at(&mut sector, 3 * 512).unwrap();
    assert_eq!(sector[..4], 1u32.to_le_bytes());
    for (kind, sector, status) in [(1, SECTORS, 1), (0, u64::MAX, 1), (99, 0, 2)] {
        device.block.reset();
        attack = valid(kind, sector, if kind == 1 { 0 } else { WRITE });
        assert!(device.face(&attack));
        assert_eq!(device.status(), status, "type {kind} sector {sector}");
    }
}
