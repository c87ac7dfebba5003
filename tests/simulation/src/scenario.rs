//! What is simulated, as data: a cluster, its VMs, and events with their times. Nothing in here is
//! drawn while the run goes on, so that events can be taken out of a failing run one by one.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_types::{
    ClusterPatch, Failback, NodeId, RestartLimit, RestartPolicy, Strength, VmId, VmPatch,
};

use crate::storage::StorageKind;

/// One run: the same scenario gives the same run, bit for bit.
#[derive(Clone, PartialEq, Debug)]
pub struct Scenario {
    /// Seeds everything that the cluster and the world leave to chance.
    pub seed: u64,
    pub cluster: Cluster,
    pub events: Vec<Timed>,
    pub opening: Opening,
    /// All faults end here; the cluster must then come to rest.
    pub heal_at_ms: u64,
    /// How long it may take to; none ends the run where the faults would.
    pub settle_ms_max: Option<u64>,
}

/// `handover_after_ms` of an agent that says nothing else.
pub const HANDOVER_AFTER_MS: u64 = 30_000;

/// When the times of a scenario begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opening {
    /// With the first process: events may come before there is a cluster.
    AtOnce,
    /// When the cluster stands and its VMs run. What happens before is not told.
    WhenReady,
}

/// The cluster at the beginning. Controllers 1 to `controllers` share hosts with nodes 1 to `nodes`.
#[derive(Clone, PartialEq, Debug)]
pub struct Cluster {
    pub nodes: u64,
    pub controllers: u64,
    pub storage: StorageKind,
    pub vms: Vec<VmSetup>,
    pub size: NodeSize,
    /// Nodes that are not of that size.
    pub other_sizes: BTreeMap<u64, NodeSize>,
    pub settings: ClusterPatch,
    /// So long a node may be cut off before it hands its VMs over; 0 for never.
    pub handover_after_ms: u64,
    /// How far the hosts' clocks are wrong, parts per million, either way.
    pub drift_ppm: i64,
    /// With what hosts can be ended.
    pub equipment: Equipment,
    /// Nodes that have something else.
    pub other_equipment: BTreeMap<u64, Equipment>,
}

/// With what a host can be ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Equipment {
    /// The watchdog that its fencer arms; without one no fencer runs.
    pub watchdog: Option<Watchdog>,
    /// The power switch that the controllers know of.
    pub switch: Option<PowerSwitch>,
}

/// What resets a host that is not petted for so long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Watchdog {
    Hardware {
        period_ms: u64,
    },
    /// The kernel's own: it stands still with the kernel, and nothing is promised of it.
    Software {
        period_ms: u64,
    },
}

impl Watchdog {
    pub const fn period_ms(self) -> u64 {
        match self {
            Self::Hardware { period_ms } | Self::Software { period_ms } => period_ms,
        }
    }
}

/// What becomes of an `off`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PowerSwitch {
    Works,
    /// It says so, and does nothing.
    Fails,
    /// It does not answer in time. The host may be off.
    Hangs,
    /// It says that it has switched the host off, which runs on; its `status` says how it is.
    Lies,
}

impl Cluster {
    /// Three controllers, so many nodes on one kernel, and these VMs, running.
    pub fn of(nodes: u64, vms: &[&str]) -> Self {
        Self {
            nodes,
            controllers: nodes.min(3),
            storage: StorageKind::OneKernel,
            vms: vms.iter().map(|name| VmSetup::new(*name)).collect(),
            size: NodeSize { memory_mib: 4_096, vcpus: 64 },
            other_sizes: BTreeMap::new(),
            settings: ClusterPatch::default(),
            handover_after_ms: HANDOVER_AFTER_MS,
            drift_ppm: 0,
            equipment: Equipment::default(),
            other_equipment: BTreeMap::new(),
        }
    }

    pub fn size_of(&self, node: u64) -> NodeSize {
        self.other_sizes.get(&node).copied().unwrap_or(self.size)
    }

    pub fn equipment_of(&self, node: u64) -> Equipment {
        self.other_equipment.get(&node).copied().unwrap_or(self.equipment)
    }
}

/// What a node has for its VMs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeSize {
    pub memory_mib: u64,
    pub vcpus: u32,
}

/// A VM that is created, and started, at the beginning.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmSetup {
    pub name: String,
    pub memory_mib: u64,
    pub vcpus: u32,
    pub rules: Rules,
    /// The node that it is started on at the beginning.
    pub on: Option<u64>,
    /// Its arbiter is the lease and not the storage.
    pub lease_arbiter: bool,
    pub start: bool,
}

impl VmSetup {
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            memory_mib: 256,
            vcpus: 1,
            rules: Rules::default(),
            on: None,
            lease_arbiter: false,
            start: true,
        }
    }
}

/// The rules of a VM as the options of `bell vm set` give them: VMs by their names, nodes by their
/// numbers. What is not named stays, or is as for a new VM.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    pub priority: Option<u32>,
    pub restart: Option<RestartPolicy>,
    pub owners: Option<Vec<u64>>,
    pub prefer: Option<Vec<u64>>,
    pub failback: Option<Failback>,
    pub apart: Option<BTreeMap<String, Strength>>,
    pub after: Option<Vec<String>>,
    /// `Some(None)` takes the limit away.
    pub restarts: Option<Option<RestartLimit>>,
}

impl Rules {
    /// The same as the cluster takes it; VMs that do not exist are left out.
    pub fn patch(&self, find: impl Fn(&str) -> Option<VmId>) -> VmPatch {
        let nodes = |numbers: &Vec<u64>| numbers.iter().map(|it| NodeId(*it)).collect::<Vec<_>>();
        let after = |names: &Vec<String>| names.iter().filter_map(|name| find(name)).collect();
        VmPatch {
            possible_owners: self.owners.as_ref().map(|it| BTreeSet::from_iter(nodes(it))),
            priority: self.priority,
            restart: self.restart,
            preferred_owners: self.prefer.as_ref().map(nodes),
            failback: self.failback,
            anti_affinity: self.apart.clone(),
            start_after: self.after.as_ref().map(after),
            restart_limit: self.restarts,
            ..VmPatch::default()
        }
    }
}

/// An event and when it happens.
#[derive(Clone, PartialEq, Debug)]
pub struct Timed {
    pub at_ms: u64,
    pub event: Event,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    Request(Request),
    Fault(Fault),
}

/// What a person asks of the cluster. VMs and nodes by their names and numbers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    Create { vm: VmSetup },
    Start { vm: String, node: Option<u64> },
    Stop { vm: String },
    Shutdown { vm: String },
    Migrate { vm: String, node: Option<u64> },
    Save { vm: String },
    Restore { vm: String },
    Delete { vm: String },
    Show { vm: String },
    Pause { vm: String },
    Resume { vm: String },
    Drain { node: u64 },
    Undrain { node: u64 },
    ConfirmDown { node: u64 },
    Unquarantine { node: u64 },
    SetVm { vm: String, rules: Rules },
    SetCluster { patch: ClusterPatch },
}

/// What goes wrong, and for how long.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The host loses power, with everything on it.
    Power {
        node: u64,
        for_ms: u64,
    },
    /// The host stands still; its clocks go on.
    Freeze {
        node: u64,
        for_ms: u64,
    },
    /// The host is suspended: CLOCK_MONOTONIC_RAW stands still as well.
    Suspend {
        node: u64,
        for_ms: u64,
    },
    KillAgent {
        node: u64,
        for_ms: u64,
    },
    KillController {
        id: u64,
        for_ms: u64,
    },
    /// Whichever leads at that moment.
    KillLeader {
        for_ms: u64,
    },
    /// SIGKILL of the VMM that runs the VM.
    KillVmm {
        vm: String,
    },
    /// SIGSTOP, and SIGCONT afterwards.
    StopAgent {
        node: u64,
        for_ms: u64,
    },
    StopController {
        id: u64,
        for_ms: u64,
    },
    StopLeader {
        for_ms: u64,
    },
    StopVmm {
        vm: String,
        for_ms: u64,
    },
    Cut {
        from: u64,
        to: u64,
        both: bool,
        for_ms: u64,
    },
    /// These hosts on one side, all others on the other.
    Split {
        side: Vec<u64>,
        for_ms: u64,
    },
    CutStorage {
        node: u64,
        for_ms: u64,
    },
    Weather {
        loss_permille: u32,
        repeat_permille: u32,
        extra_ms: u64,
        for_ms: u64,
    },
    StorageFull {
        for_ms: u64,
    },
    StorageError {
        for_ms: u64,
    },
    /// The disk under the agent's runtime directory refuses writes.
    RuntimeFull {
        node: u64,
        for_ms: u64,
    },
    /// SIGKILL of the node's fencer; its watchdog stays armed.
    KillFencer {
        node: u64,
        for_ms: u64,
    },
    /// Somebody asks the fencer to disarm the watchdog, and starts it again later.
    Disarm {
        node: u64,
        for_ms: u64,
    },
    /// The wall clock jumps.
    Clock {
        node: u64,
        jump_ms: i64,
    },
    GuestCrash {
        vm: String,
    },
    GuestShutdown {
        vm: String,
    },
}

impl Fault {
    /// The name of its kind.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Power { .. } => "power",
            Self::Freeze { .. } => "freeze",
            Self::Suspend { .. } => "suspend",
            Self::KillAgent { .. } => "kill-agent",
            Self::KillController { .. } | Self::KillLeader { .. } => "kill-controller",
            Self::KillVmm { .. } => "kill-vmm",
            Self::StopAgent { .. } => "stop-agent",
            Self::StopController { .. } | Self::StopLeader { .. } => "stop-controller",
            Self::StopVmm { .. } => "stop-vmm",
            Self::Cut { both: true, .. } => "cut",
            Self::Cut { .. } => "cut-one-way",
            Self::Split { .. } => "split",
            Self::CutStorage { .. } => "cut-storage",
            Self::Weather { .. } => "weather",
            Self::StorageFull { .. } => "storage-full",
            Self::StorageError { .. } => "storage-error",
            Self::RuntimeFull { .. } => "runtime-full",
            Self::KillFencer { .. } => "kill-fencer",
            Self::Disarm { .. } => "disarm",
            Self::Clock { .. } => "clock",
            Self::GuestCrash { .. } => "guest-crash",
            Self::GuestShutdown { .. } => "guest-shutdown",
        }
    }
}

impl Scenario {
    /// A scenario in which nothing happens yet, and a minute for what is to happen.
    pub fn calm(cluster: Cluster) -> Self {
        Self {
            seed: 1,
            cluster,
            events: Vec::new(),
            opening: Opening::AtOnce,
            heal_at_ms: 60_000,
            settle_ms_max: Some(240_000),
        }
    }
}
