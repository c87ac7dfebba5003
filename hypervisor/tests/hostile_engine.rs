//! A hostile driver against the devices that share one engine: entropy, and both queues of a network
//! card.
//!
//! Whatever is in the queue, the device answers or says that it needs a reset; it writes nothing but
//! the used ring and the buffers that it was given; and after a reset it works.
#![allow(clippy::unwrap_used)]

mod attack;

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use attack::{
    AVAILABLE, DATA, Descriptor, INDIRECT, NEXT, QUEUE_SIZE, RAM, TABLE, USED, WRITE, at, queue,
    used, write_queue, write_table,
};
use bellwether_memory::GuestRam;
use bellwether_types::Mac;
use bellwether_vmm::devices::net::{Net, Tap};
use bellwether_vmm::devices::rng::Rng;
use bellwether_vmm::devices::virtio::{Link, Msix, VirtioDevice};
use bellwether_vmm::gate::{Gate, Hold};
use bellwether_vmm::kvm::Vm;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

const LONG: Duration = Duration::from_secs(30);
const FEATURES: u64 = 1 << 32;
/// Where indirect tables are.
const TABLES: u64 = 0x4_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Answered,
    Broken,
}
use End::{Answered, Broken};

/// Everything that a driver writes before it rings.
#[derive(Clone, Debug)]
struct Attack {
    descriptors: Vec<Descriptor>,
    indirect: Vec<Descriptor>,
    heads: Vec<u16>,
    available: u16,
}

fn attack(descriptors: &[Descriptor]) -> Attack {
    Attack { descriptors: descriptors.to_vec(), indirect: vec![], heads: vec![0], available: 1 }
}

/// One descriptor that names a table of so many bytes, and what is in the table.
fn indirect(len: u32, table: &[Descriptor]) -> Attack {
    Attack { indirect: table.to_vec(), ..attack(&[at(TABLES, len, INDIRECT, 0)]) }
}

/// One queue of a device, and what makes the device look at it.
struct Rig {
    device: Arc<dyn VirtioDevice>,
    queue: usize,
    /// `WRITE` if the device writes, else 0.
    direction: u16,
    poke: Box<dyn Fn()>,
    link: Arc<Link>,
    ram: Arc<GuestRam>,
    gate: Arc<Gate>,
    _vm: Vm,
}

/// What a device is made of, before it is.
struct Parts {
    link: Arc<Link>,
    ram: Arc<GuestRam>,
    gate: Arc<Gate>,
    vm: Vm,
}

impl Parts {
    fn new(queues: usize) -> Self {
        let ram = Arc::new(GuestRam::new(RAM).unwrap());
        let vm = Vm::new(&ram).unwrap();
        let link = Link::new(Msix::new(Arc::clone(&vm.irq), queues + 1).unwrap(), queues);
        let gate = Arc::new(Gate::new());
        gate.release(Hold::NotStarted);
        Self { link, ram, gate, vm }
    }

    fn rig(self, device: Arc<dyn VirtioDevice>, queue: usize, direction: u16) -> Rig {
        let Self { link, ram, gate, vm } = self;
        Rig { device, queue, direction, poke: Box::new(|| ()), link, ram, gate, _vm: vm }
    }
}

fn rng() -> Rig {
    let parts = Parts::new(1);
    let memory = parts.ram.memory().clone();
    let rng = Rng::new(memory, Arc::clone(&parts.gate), Arc::clone(&parts.link)).unwrap();
    parts.rig(Arc::new(rng), 0, WRITE)
}

/// A card on the bridge br0, and one of its queues.
fn net(queue: usize, direction: u16) -> Rig {
    let parts = Parts::new(2);
    let tap = Tap::plug("br0").unwrap();
    let mac: Mac = "02:00:5e:10:00:01".parse().unwrap();
    let memory = parts.ram.memory().clone();
    let net = Net::new(tap, mac, memory, Arc::clone(&parts.gate), Arc::clone(&parts.link)).unwrap();
    net.connect();
    parts.rig(Arc::new(net), queue, direction)
}

impl Rig {
    /// Lets the device work until it has answered everything or given up.
    fn face(&self, attack: &Attack) -> End {
        write_queue(&self.ram, &attack.descriptors, &attack.heads, attack.available);
        write_table(&self.ram, TABLES, &attack.indirect);
        self.ring()
    }

    fn ring(&self) -> End {
        let wanted: u16 = self.ram.memory().read_obj(GuestAddress(AVAILABLE + 2)).unwrap();
        let mut queues: Vec<_> = self.device.queue_sizes().iter().map(|_| None).collect();
        queues[self.queue] = Some(queue());
        self.device.activate(FEATURES, queues);
        self.device.queue_events()[self.queue].write(1).unwrap();
        let deadline = Instant::now() + LONG;
        loop {
            (self.poke)();
            if self.link.needs_reset() {
                return Broken;
            }
            if used(&self.ram) == wanted {
                return Answered;
            }
            assert!(Instant::now() < deadline, "neither an answer nor a broken queue");
            std::thread::yield_now();
        }
    }

    fn reset(&self) {
        self.device.reset();
        self.link.clear_needs_reset();
    }

    fn assert_works(&self, after: &str) {
        self.reset();
        let valid = attack(&[at(DATA, 2048, self.direction, 0)]);
        assert_eq!(self.face(&valid), Answered, "a valid request after {after}");
        self.reset();
    }

    fn face_all(&self) {
        for (name, attack, end) in attacks(self.direction) {
            assert_eq!(self.face(&attack), end, "{name}");
            self.assert_works(name);
        }
    }
}

/// Each way in which a queue can be wrong, with what becomes of it.
fn attacks(direction: u16) -> Vec<(&'static str, Attack, End)> {
    let (d, other) = (direction, direction ^ WRITE);
    let one = |address, len| attack(&[at(address, len, d, 0)]);
    let fine = at(DATA, 64, d, 0);
    let avail =
        |heads: &[u16], available| Attack { heads: heads.to_vec(), available, ..attack(&[fine]) };
    let long: Vec<_> = (1..=u16::MAX).map(|next| at(DATA, 1, d | NEXT, next)).collect();
    let mut cases = vec![
        ("a descriptor that is its own next", attack(&[at(DATA, 16, d | NEXT, 0)]), Broken),
        ("a loop of two", attack(&[at(DATA, 16, d | NEXT, 1), at(DATA, 16, d | NEXT, 0)]), Broken),
        ("a next outside the table", attack(&[at(DATA, 16, d | NEXT, 500)]), Broken),
        ("a head outside the table", avail(&[QUEUE_SIZE], 1), Broken),
        ("the last head that there can be", avail(&[u16::MAX], 1), Broken),
        ("one head twice", avail(&[0, 0], 2), Answered),
        ("an index one too far ahead", avail(&[0; 16], QUEUE_SIZE + 1), Broken),
        ("an index that goes back", avail(&[0; 16], u16::MAX), Broken),
        ("a buffer behind the end of memory", one(RAM, 64), Broken),
        ("a buffer over the end of memory", one(RAM - 8, 64), Broken),
        ("a buffer over the end of the address space", one(u64::MAX - 8, 64), Broken),
        ("a buffer at the top of the address space", one(u64::MAX, 1), Broken),
        ("a buffer of nearly 4 GiB", one(DATA, u32::MAX), Answered),
        (
            "more than 4 GiB in all",
            attack(&[at(DATA, u32::MAX, d | NEXT, 1), at(DATA, u32::MAX, d, 0)]),
            Broken,
        ),
        ("no bytes", one(DATA, 0), Answered),
        ("no bytes anywhere", one(u64::MAX, 0), Answered),
        ("the wrong direction", attack(&[at(DATA, 64, other, 0)]), Answered),
        (
            "a readable descriptor behind a writable one",
            attack(&[at(DATA, 64, WRITE | NEXT, 1), at(DATA, 64, 0, 0)]),
            Broken,
        ),
    ];
    cases.extend([
        ("a table of one", indirect(16, &[fine]), Answered),
        ("a table outside memory", attack(&[at(RAM, 16, INDIRECT, 0)]), Broken),
        ("a table at the top", attack(&[at(u64::MAX - 7, 16, INDIRECT, 0)]), Broken),
        ("a table of half a descriptor", indirect(8, &[fine]), Broken),
        ("a table of one and a half", indirect(24, &[fine]), Broken),
        ("an empty table", indirect(0, &[fine]), Broken),
        ("a table that is too large", indirect(u32::MAX - 15, &[fine]), Broken),
        ("a table in a table", indirect(16, &[at(TABLES, 16, INDIRECT, 0)]), Broken),
        ("a loop in a table", indirect(16, &[at(DATA, 1, d | NEXT, 0)]), Broken),
        ("the longest table", indirect(u32::from(u16::MAX) * 16, &long), Broken),
        // It was read before anything is written.
        ("a table that is its own buffer", indirect(16, &[at(TABLES, 64, d, 0)]), Answered),
        ("the ring's table as a buffer", one(TABLE, 4096), Answered),
    ]);
    cases
}

#[test]
fn the_entropy_device_survives_every_attack() {
    rng().face_all();
}

#[test]
fn a_network_card_survives_every_attack() {
    const TEST: &str = "a_network_card_survives_every_attack";
    in_a_network_of_its_own(TEST, || {
        net(1, 0).face_all();
        let sender = UdpSocket::bind("10.9.0.1:0").unwrap();
        sender.set_broadcast(true).unwrap();
        let mut receiving = net(0, WRITE);
        // A bridge sends what is for all to each port.
        receiving.poke = Box::new(move || drop(sender.send_to(&[7; 100], "10.9.0.255:9")));
        receiving.face_all();
    });
}

/// Runs the test `name` once more in a process that may make interfaces, with a bridge br0.
fn in_a_network_of_its_own(name: &str, body: impl FnOnce()) {
    const INSIDE: &str = "BELLWETHER_TEST_OWN_NETWORK";
    if std::env::var_os(INSIDE).is_some() {
        for words in ["add br0 type bridge forward_delay 0 mcast_snooping 0", "set br0 up"] {
            run(Command::new("ip").arg("link").args(words.split(' ')));
        }
        run(Command::new("ip").args(["addr", "add", "10.9.0.1/24", "brd", "+", "dev", "br0"]));
        return body();
    }
    let this = std::env::current_exe().unwrap();
    let mut inside = Command::new("unshare");
    inside.args(["--map-root-user", "--net"]).arg(this).args([name, "--exact", "--nocapture"]);
    run(inside.env(INSIDE, "1"));
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

#[test]
fn nothing_is_touched_after_a_reset_in_the_middle() {
    let rig = rng();
    let chains: Vec<_> = (0..16).map(|page| at(DATA + page * 4096, 4096, WRITE, 0)).collect();
    let heads: Vec<u16> = (0..QUEUE_SIZE).collect();
    let (mut early, mut late) = (0, 0);
    for round in 0..500 {
        write_queue(&rig.ram, &chains, &heads, QUEUE_SIZE);
        rig.device.activate(FEATURES, vec![Some(queue())]);
        rig.device.queue_events()[0].write(1).unwrap();
        // Sometimes at once, sometimes when a part is done.
        while round % 2 == 0 && used(&rig.ram) == 0 {
            std::thread::yield_now();
        }
        rig.device.reset();
        if used(&rig.ram) < QUEUE_SIZE {
            early += 1
        } else {
            late += 1
        }
        let after_reset = whole(&rig.ram);
        // No pass through the gate is left over.
        rig.gate.hold(Hold::Save);
        assert!(rig.gate.wait_disks_idle(LONG));
        assert!(whole(&rig.ram) == after_reset, "round {round}");
        rig.gate.release(Hold::Save);
    }
    assert!(early > 0 && late > 0, "{early} resets came early and {late} late: nothing is shown");
    rig.assert_works("many resets");
}

fn whole(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// The addresses of bytes that differ.
fn changed(before: &[u8], after: &[u8]) -> impl Iterator<Item = u64> {
    let pages = (0..).step_by(4096).zip(before.chunks(4096).zip(after.chunks(4096)));
    let pages = pages.filter(|(_, (before, after))| before != after);
    pages.flat_map(|(start, (before, after))| {
        let bytes = (start..).zip(before.iter().zip(after));
        bytes.filter(|(_, (before, after))| before != after).map(|(address, _)| address)
    })
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        8 => (0u64..16).prop_map(|page| DATA + page * 0x800),
        2 => Just(TABLES), 1 => Just(TABLE), 1 => Just(RAM - 100), 1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => 0u32..5000, 2 => (1u32..8).prop_map(|count| count * 16), 1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        4 => Just(WRITE), 4 => Just(WRITE | NEXT), 2 => Just(NEXT), 1 => Just(0),
        2 => Just(INDIRECT), 1 => any::<u16>(),
    ];
    let next = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (address, len, flags, next)
        .prop_map(|(address, len, flags, next)| at(address, len, flags, next))
}

fn any_attack() -> impl Strategy<Value = Attack> {
    let descriptors = || proptest::collection::vec(descriptor(), 8);
    let head = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (descriptors(), descriptors(), head).prop_map(|(descriptors, indirect, head)| Attack {
        descriptors,
        indirect,
        heads: vec![head],
        available: 1,
    })
}

/// Every writable buffer that a chain from `head` can name, generously.
fn writable(ram: &GuestRam, table: u64, head: u16, size: u32, depth: u32) -> Vec<(u64, u64)> {
    let (mut found, mut index) = (vec![], head);
    for _ in 0..size.min(1000) {
        let place = table.saturating_add(u64::from(index) * 16);
        let Some(descriptor) = Descriptor::read(ram, place) else { break };
        let Descriptor { address, len, flags, next } = descriptor;
        if flags & INDIRECT != 0 && depth == 0 {
            found.extend(writable(ram, address, 0, len / 16, 1));
        }
        if flags & WRITE != 0 {
            found.push((address, address.saturating_add(len.into())));
        }
        if flags & NEXT == 0 {
            break;
        }
        index = next;
    }
    found
}

#[test]
fn only_the_used_ring_and_the_buffers_that_were_given_are_written() {
    let rig = rng();
    let used_ring = (USED, USED + 6 + 8 * u64::from(QUEUE_SIZE));
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(300));
    let outcome = runner.run(&any_attack(), |attack| {
        write_queue(&rig.ram, &attack.descriptors, &attack.heads, attack.available);
        write_table(&rig.ram, TABLES, &attack.indirect);
        let mut allowed = writable(&rig.ram, TABLE, attack.heads[0], 1000, 0);
        allowed.push(used_ring);
        let before = whole(&rig.ram);
        rig.ring();
        rig.reset();
        let after = whole(&rig.ram);
        let strayed = changed(&before, &after)
            .find(|address| !allowed.iter().any(|(from, to)| (*from..*to).contains(address)));
        prop_assert!(strayed.is_none(), "written: {strayed:x?}, allowed: {allowed:x?}");
        Ok(())
    });
    outcome.unwrap();
    rig.assert_works("all attacks");
}
