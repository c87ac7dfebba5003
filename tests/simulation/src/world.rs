//! Everything that actors share: the kernel, the network, the storage, what hosts keep, the oracle.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bellwether_agent_core::Durable;
use bellwether_core::{Outcome, Place, State, Timing};
use bellwether_lease::LeaseView;
use bellwether_types::{Arbiter, BootId, Epoch, NodeId, StateFileRef, VmId, WatchdogBound};

use crate::coverage::Coverage;
use crate::fencer::Armed;
use crate::kernel::{Host, HostId, Kernel, Nanos, ProcId};
use crate::net::Net;
use crate::oracle::Oracle;
use crate::raft::{Applied, Disk};
use crate::rng::Rng;
use crate::run::Line;
use crate::scenario::Cluster;
use crate::storage::Storage;
use crate::sync::Signal;

/// What an agent keeps in its runtime directory, whose life is the boot's.
#[derive(Clone, Debug, Default)]
pub struct Runtime {
    pub term: u64,
    pub floors: BTreeMap<VmId, Durable>,
    /// By VM and the epoch of the Prepare, which names the directory.
    pub incarnations: BTreeMap<(VmId, Epoch), Record>,
    pub pages: BTreeMap<(VmId, Epoch), LeaseView>,
    pub exits: BTreeMap<(VmId, Epoch), String>,
    /// Whose VMM says on its page that its guest is held and its I/O drained.
    pub held: BTreeSet<(VmId, Epoch)>,
    /// The fencer's grant page, and what it has written down.
    pub grant: LeaseView,
    pub facts: Option<Facts>,
    /// Its disk refuses writes.
    pub full: bool,
}

/// `incarnation.json`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    pub home: Epoch,
    pub epoch: Epoch,
    pub arbiter: Arbiter,
    pub process: Option<ProcId>,
    pub loaded: Option<[u8; 32]>,
    pub loading: Option<[u8; 32]>,
    pub may_have_run: bool,
    pub claiming: Option<Epoch>,
    pub claimed_from: Option<Epoch>,
    /// What it has sealed, as long as its guest has not gone on after it.
    pub sealed: Option<StateFileRef>,
}

/// What a fencer tells its agent of the watchdog that it has armed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    pub bound: WatchdogBound,
    /// It resets a host whose kernel stands still.
    pub hardware: bool,
}

/// The world of one run.
pub struct World {
    pub kernel: Kernel,
    pub net: Net,
    pub storage: Storage,
    pub oracle: RefCell<Oracle>,
    pub coverage: RefCell<Coverage>,
    pub log: RefCell<Vec<Line>>,
    /// Up to which event of the cluster the log has told.
    pub log_seen: std::cell::Cell<u64>,
    pub places: RefCell<BTreeMap<VmId, Place>>,
    pub cluster: Cluster,
    pub timing: Timing,
    pub chance: RefCell<Rng>,
    pub runtimes: RefCell<BTreeMap<NodeId, Runtime>>,
    pub disks: RefCell<BTreeMap<u64, Rc<RefCell<Disk>>>>,
    pub controllers: RefCell<BTreeMap<u64, ProcId>>,
    pub agents: RefCell<BTreeMap<NodeId, ProcId>>,
    /// VMMs that have ended and let go of everything.
    ended: RefCell<BTreeSet<ProcId>>,
    pub vmm_ended: Signal,
    /// All faults have ended: whoever finds a host switched off switches it on.
    pub healed: std::cell::Cell<bool>,
    /// Hosts that were switched off; they stay so until somebody switches them on.
    pub switched_off: RefCell<BTreeSet<NodeId>>,
    pub fencers: RefCell<BTreeMap<NodeId, ProcId>>,
    /// The watchdogs that are armed.
    pub watchdogs: RefCell<BTreeMap<NodeId, Armed>>,
    /// When each request for a lease was sent, in true time.
    pub leases_sent: RefCell<BTreeMap<(BootId, u64), Nanos>>,
    /// When the newest request of a boot was sent that a leader granted, in true time.
    pub granted: RefCell<BTreeMap<BootId, Nanos>>,
    /// When the scenario's times begin.
    pub opened_at: std::cell::Cell<Nanos>,
    /// The cluster is made, and what is to run at the beginning runs.
    pub founded: std::cell::Cell<bool>,
    /// Who leads, as far as the log says.
    pub leader: std::cell::Cell<Option<u64>>,
    seed: u64,
}

pub type Shared = Rc<World>;

impl World {
    pub fn new(seed: u64, cluster: &Cluster) -> Shared {
        let kernel = Kernel::new(seed);
        let net = Net::new(&kernel, seed);
        let storage = Storage::new(&kernel, seed, cluster.storage);
        let oracle = RefCell::new(Oracle::new(&kernel, &storage));
        let world = Self {
            vmm_ended: Signal::new(&kernel),
            net,
            storage,
            oracle,
            coverage: RefCell::default(),
            log: RefCell::default(),
            log_seen: std::cell::Cell::new(1),
            places: RefCell::default(),
            cluster: cluster.clone(),
            timing: Timing { shutdown_ms: 8_000, ..Timing::default() },
            chance: RefCell::new(Rng::of(seed, "world")),
            runtimes: RefCell::default(),
            disks: RefCell::default(),
            controllers: RefCell::default(),
            agents: RefCell::default(),
            ended: RefCell::default(),
            healed: std::cell::Cell::default(),
            switched_off: RefCell::default(),
            fencers: RefCell::default(),
            watchdogs: RefCell::default(),
            leases_sent: RefCell::default(),
            granted: RefCell::default(),
            opened_at: std::cell::Cell::default(),
            founded: std::cell::Cell::default(),
            leader: std::cell::Cell::default(),
            seed,
            kernel,
        };
        let world = Rc::new(world);
        world.make_hosts();
        world
    }

    fn make_hosts(&self) {
        let mut rng = Rng::of(self.seed, "hosts");
        for number in 1..=self.cluster.nodes.max(self.cluster.controllers) {
            let limit = self.cluster.drift_ppm.unsigned_abs();
            let drift = i64::try_from(rng.below(2 * limit + 1)).unwrap_or(0);
            let host = Host {
                up: true,
                frozen: false,
                boot_id: BootId::from_uuid(rng.uuid()),
                booted_at: 0,
                drift_ppm: drift - self.cluster.drift_ppm.abs(),
                wall_ahead_ms: i64::try_from(rng.below(2_000)).unwrap_or(0) - 1_000,
                suspended_ns: 0,
                suspended_since: None,
            };
            self.kernel.add_host(HostId(number), host);
        }
    }

    /// Lets go of everything that holds on to itself.
    pub fn dispose(&self) {
        self.kernel.clear();
        self.net.clear();
        self.storage.clear();
        self.kernel.clear();
    }

    pub fn rng(&self, purpose: &str) -> Rng {
        Rng::of(self.seed ^ self.kernel.events(), purpose)
    }

    pub fn boot(&self, node: NodeId) -> BootId {
        let host = self.kernel.host(HostId(node.0));
        host.map_or(BootId::from_uuid(uuid::Uuid::nil()), |host| host.boot_id)
    }

    pub fn hit(&self, group: &'static str, name: impl Into<String>) {
        self.coverage.borrow_mut().hit(group, name);
    }

    pub fn say(&self, source: impl Into<String>, text: impl Into<String>) {
        let (source, text) = (source.into(), text.into());
        self.kernel.note_text(&text);
        let at_ms = self.since_opening(self.kernel.now());
        self.log.borrow_mut().push(Line { at_ms, source, text });
    }

    pub fn disk(&self, controller: u64) -> Rc<RefCell<Disk>> {
        Rc::clone(self.disks.borrow_mut().entry(controller).or_default())
    }

    /// Looks at or changes what an agent's runtime directory holds.
    pub fn runtime<T>(&self, node: NodeId, change: impl FnOnce(&mut Runtime) -> T) -> T {
        change(self.runtimes.borrow_mut().entry(node).or_default())
    }

    /// A controller has applied an entry.
    pub fn applied(&self, applied: &Applied<'_>) {
        let first = self.oracle.borrow_mut().applied(applied);
        if first {
            crate::narrate::applied(self, applied);
        }
    }

    // --- VMMs ---

    /// Ends a VMM's process. Its locks are free, and its end is seen, when what it had sent to the
    /// storage has gone through.
    pub fn end_vmm(
        self: &Rc<Self>,
        process: ProcId,
        reason: Option<(NodeId, VmId, Epoch, String)>,
    ) {
        let Some(host) = self.kernel.host_of(process) else { return };
        if let Some((node, vm, home, reason)) = reason {
            self.runtime(node, |runtime| runtime.exits.insert((vm, home), reason));
        }
        if !self.kernel.end_process(process) {
            return;
        }
        let world = Rc::clone(self);
        self.storage.unlock_all(host, process, move |_| {
            world.ended.borrow_mut().insert(process);
            world.vmm_ended.notify();
        });
    }

    /// The host of a VMM has lost power.
    pub fn vmm_vanished(&self, process: ProcId) {
        self.ended.borrow_mut().insert(process);
        self.vmm_ended.notify();
    }

    pub fn has_ended(&self, process: ProcId) -> bool {
        self.ended.borrow().contains(&process)
    }

    /// Waits for the end of a VMM's process.
    pub async fn exit_of(self: &Rc<Self>, process: ProcId) {
        let world = Rc::clone(self);
        self.vmm_ended.until(move || world.has_ended(process).then_some(())).await;
    }

    /// The VMM that runs a VM now, as the oracle knows.
    pub fn runner(&self, vm: VmId) -> Option<ProcId> {
        let oracle = self.oracle.borrow();
        let lives = |(process, _): &(&ProcId, _)| self.kernel.lives(**process);
        let facts = oracle.vmms.iter().filter(|(_, fact)| fact.vm == vm && fact.open);
        facts.filter(lives).map(|(process, _)| *process).next_back()
    }

    pub fn find_vm(&self, name: &str) -> Option<VmId> {
        self.oracle.borrow().reference().find_vm(name).map(|vm| vm.id)
    }

    /// Looks at the state as it was committed last.
    pub fn committed<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(self.oracle.borrow().reference())
    }

    pub fn sleep(&self, host: HostId, duration: Nanos) -> crate::kernel::Sleep {
        self.kernel.sleep(host, duration)
    }

    /// The oracle takes the writes that the storage has applied since it last looked.
    pub fn take_writes(&self) {
        let writes = self.storage.server(|server| std::mem::take(&mut server.applied));
        let mut oracle = self.oracle.borrow_mut();
        for (path, record, top) in writes {
            let name = path.trim_start_matches("disks/").trim_end_matches(".raw");
            if let Ok(vm) = name.parse() {
                oracle.written(vm, record, top);
            }
        }
    }

    pub fn told(&self, index: u64, outcome: &Outcome) {
        self.oracle.borrow_mut().told(index, outcome);
    }
}
