//! A cluster in memory: as many nodes and VMs as wanted, made by commands alone.

use bellwether_core::command::{Change, Registration};
use bellwether_core::observe::{NodeReport, VmReport};
use bellwether_core::task::{Measures, StepEvent};
use bellwether_core::{Command, Observed, Outcome, Place, State, TaskKind, Timing, reconcile};
use bellwether_types::{
    BootId, ClusterId, DiskFormat, DiskSpec, MemberRole, NodeId, Ports, RestartPolicy, VmId,
    VmRules, VmSpec, VmState,
};
use uuid::Uuid;

/// Each node has this; of the sizes that are measured its VMs take 5 to 60 percent of it.
const NODE_MEMORY_MIB: u64 = 1_024 * 1_024;
const NODE_VCPUS: u32 = 1_024;

/// A small generator (SplitMix64), so that a cluster is its seed.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB) >> 31
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

pub struct Cluster {
    pub state: State,
    pub observed: Observed,
    pub now: u64,
    pub commands: u64,
    chance: Chance,
}

impl Cluster {
    /// Nodes that have joined, with no VMs yet.
    pub fn of(nodes: u64, seed: u64) -> Self {
        let mut cluster = Self {
            state: State::default(),
            observed: Observed::default(),
            now: 1_000_000_000,
            commands: 0,
            chance: Chance::new(seed),
        };
        let first = bellwether_core::Member {
            id: 1,
            name: "c1".into(),
            address: "10.0.0.1".into(),
            ports: Ports::default(),
        };
        let id = ClusterId::from_uuid(Uuid::from_u128(1));
        let (name, storage) = ("scale".into(), "/srv/bellwether".into());
        cluster.apply(Change::InitCluster { id, name, storage, first });
        (1..=nodes).for_each(|number| cluster.join(number));
        cluster
    }

    pub fn apply(&mut self, change: Change) -> Outcome {
        self.commands += 1;
        self.state.apply(Command { at: self.now, change })
    }

    fn join(&mut self, number: u64) {
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&number.to_le_bytes());
        let (role, name) = (MemberRole::Agent, format!("node-{number:04}"));
        let address = format!("10.1.{}.{}", number / 250, number % 250 + 1);
        let ports = Ports::default();
        self.apply(Change::CreateToken { hash, role, expires_at: self.now + 60_000 });
        let redeem =
            Change::RedeemToken { hash, role, name: name.clone(), address: address.clone(), ports };
        let Outcome::Member(id) = self.apply(redeem) else { return };
        let node = NodeId(id);
        self.apply(Change::RegisterNode(Registration {
            node,
            name,
            boot_id: boot_of(node),
            address,
            agent_port: 7410,
            memory_mib: NODE_MEMORY_MIB,
            vcpus: NODE_VCPUS,
            version: "0.1.0".into(),
            replaces: None,
        }));
        self.report(node);
    }

    /// The node says that everything that it should run runs.
    fn report(&mut self, node: NodeId) {
        let running = self.state.vms_of(node).filter_map(|vm| {
            Some(VmReport {
                vm: vm.id,
                epoch: vm.place.runner()?.epoch,
                state: VmState::Running,
                reason: String::new(),
                memory_loaded_bytes: 0,
                memory_total_bytes: 0,
            })
        });
        let report = NodeReport {
            boot_id: boot_of(node),
            heard_at: self.now,
            nonce: self.now,
            vms: running.collect(),
        };
        self.observed.take(node, report, &self.state);
    }

    pub fn report_but(&mut self, silent: impl Fn(NodeId) -> bool) {
        let nodes: Vec<NodeId> = self.state.nodes.keys().copied().collect();
        nodes.into_iter().filter(|node| !silent(*node)).for_each(|node| self.report(node));
    }

    /// Creates VMs and starts all of them: seven commands for each.
    pub fn fill(&mut self, vms: u64) {
        for first in (0..vms).step_by(1_000) {
            for number in first..vms.min(first + 1_000) {
                self.create(number);
            }
            self.run_tasks();
        }
    }

    fn create(&mut self, number: u64) {
        let vcpus = u32::try_from(self.chance.below(2) + 1).unwrap_or(1);
        let memory_mib = 512 << self.chance.below(4);
        let vm = self.define(number, memory_mib, vcpus);
        let (kind, by) = (TaskKind::Start, "admin".to_owned());
        let request = bellwether_core::task::TaskRequest { vm, kind, node: None, by };
        self.apply(Change::BeginTask(request));
    }

    /// A VM that is not started.
    pub fn define(&mut self, number: u64, memory_mib: u64, vcpus: u32) -> VmId {
        let id = VmId::from_uuid(Uuid::from_u128(u128::from(number) + 1));
        let name = format!("vm-{number:06}");
        let disk = DiskSpec {
            path: format!("/srv/bellwether/disks/{name}.raw").into(),
            format: DiskFormat::Raw,
            read_only: false,
        };
        let spec = VmSpec {
            vcpus,
            memory_mib,
            kernel: "/srv/bellwether/kernel.elf".into(),
            initrd: None,
            nics: vec![],
            cmdline: "console=ttyS0 root=/dev/vda".into(),
            disks: vec![disk],
            possible_owners: Default::default(),
            priority: u32::try_from(self.chance.below(3)).unwrap_or(0),
            restart: RestartPolicy::Restart,
            name,
        };
        self.apply(Change::DefineVm { id, spec, rules: VmRules::default() });
        id
    }

    /// One round of the leader's planning, its commands not applied yet.
    pub fn plan(&self) -> Vec<Change> {
        reconcile::plan(&self.state, &self.observed, &Timing::default(), 0, self.now)
    }

    /// Applies what a round of planning asks for; how many commands it were.
    pub fn apply_all(&mut self, changes: Vec<Change>) -> usize {
        let count = changes.len();
        for change in changes {
            self.apply(change);
        }
        count
    }

    /// Carries every task to its end, all orders going well.
    fn run_tasks(&mut self) {
        let placements = self.plan();
        self.apply_all(placements);
        for event in [StepEvent::Prepared, StepEvent::Activated { measures: Measures::new() }] {
            let tasks: Vec<_> = self.state.active_tasks().map(|t| (t.id, t.step_no)).collect();
            for (task, step_no) in tasks {
                self.apply(Change::Advance { task, step_no, event: event.clone() });
            }
        }
    }

    pub fn running(&self) -> usize {
        self.state.vms.values().filter(|vm| matches!(vm.place, Place::Runner(_))).count()
    }
}

fn boot_of(node: NodeId) -> BootId {
    BootId::from_uuid(Uuid::from_u128(u128::from(node.0) << 64))
}
