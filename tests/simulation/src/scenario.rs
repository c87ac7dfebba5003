//! What is simulated, as data: a cluster, its VMs, and events with their times. Nothing in here is
//! drawn while the run goes on, so that events can be taken out of a failing run one by one.

use std::fmt;

use bellwether_types::RestartPolicy;

use crate::rng::Rng;
use crate::storage::StorageKind;

/// One run: the same scenario gives the same run, bit for bit.
#[derive(Clone, PartialEq, Debug)]
pub struct Scenario {
    /// Seeds everything that the cluster and the world leave to chance.
    pub seed: u64,
    pub cluster: Cluster,
    pub events: Vec<Timed>,
    /// All faults end here; the cluster must then come to rest.
    pub heal_at_ms: u64,
    /// How long it may take to.
    pub settle_ms_max: u64,
}

/// The cluster at the beginning. Controllers 1 to `controllers` share hosts with nodes 1 to `nodes`.
#[derive(Clone, PartialEq, Debug)]
pub struct Cluster {
    pub nodes: u64,
    pub controllers: u64,
    pub storage: StorageKind,
    pub vms: Vec<VmSetup>,
    pub node_memory_mib: u64,
    /// How far the hosts' clocks are wrong, parts per million, either way.
    pub drift_ppm: i64,
}

impl Cluster {
    /// Three controllers, so many nodes on one kernel, and these VMs, running.
    pub fn of(nodes: u64, vms: &[&str]) -> Self {
        Self {
            nodes,
            controllers: nodes.min(3),
            storage: StorageKind::OneKernel,
            vms: vms.iter().map(|name| VmSetup::new(*name)).collect(),
            node_memory_mib: 4_096,
            drift_ppm: 0,
        }
    }
}

/// A VM that is created, and started, at the beginning.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmSetup {
    pub name: String,
    pub memory_mib: u64,
    pub priority: u32,
    pub restart: RestartPolicy,
    pub possible_owners: Vec<u64>,
    /// Its VMM is told the arbiter `lease` and not `storage`, so that it enforces the deadline.
    pub lease_arbiter: bool,
    pub start: bool,
}

impl VmSetup {
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            memory_mib: 256,
            priority: 0,
            restart: RestartPolicy::Restart,
            possible_owners: Vec::new(),
            lease_arbiter: false,
            start: true,
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
    Pause { vm: String },
    Resume { vm: String },
    Drain { node: u64 },
    Undrain { node: u64 },
    ConfirmDown { node: u64 },
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
            Self::KillController { .. } => "kill-controller",
            Self::KillVmm { .. } => "kill-vmm",
            Self::StopAgent { .. } => "stop-agent",
            Self::StopController { .. } => "stop-controller",
            Self::StopVmm { .. } => "stop-vmm",
            Self::Cut { both: true, .. } => "cut",
            Self::Cut { .. } => "cut-one-way",
            Self::Split { .. } => "split",
            Self::CutStorage { .. } => "cut-storage",
            Self::Weather { .. } => "weather",
            Self::StorageFull { .. } => "storage-full",
            Self::StorageError { .. } => "storage-error",
            Self::RuntimeFull { .. } => "runtime-full",
            Self::Clock { .. } => "clock",
            Self::GuestCrash { .. } => "guest-crash",
            Self::GuestShutdown { .. } => "guest-shutdown",
        }
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03} s", ms / 1_000, ms % 1_000)
}

impl fmt::Display for Timed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>4}.{:03}  ", self.at_ms / 1_000, self.at_ms % 1_000)?;
        match &self.event {
            Event::Request(request) => write!(f, "ask   {request}"),
            Event::Fault(fault) => write!(f, "fault {fault}"),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |node: &Option<u64>| node.map_or_else(String::new, |node| format!(" on n{node}"));
        match self {
            Self::Create { vm } => write!(f, "create {}", vm.name),
            Self::Start { vm, node } => write!(f, "start {vm}{}", on(node)),
            Self::Stop { vm } => write!(f, "stop {vm}"),
            Self::Shutdown { vm } => write!(f, "shutdown {vm}"),
            Self::Migrate { vm, node } => write!(f, "migrate {vm}{}", on(node)),
            Self::Save { vm } => write!(f, "save {vm}"),
            Self::Restore { vm } => write!(f, "restore {vm}"),
            Self::Delete { vm } => write!(f, "delete {vm}"),
            Self::Pause { vm } => write!(f, "pause {vm}"),
            Self::Resume { vm } => write!(f, "resume {vm}"),
            Self::Drain { node } => write!(f, "drain n{node}"),
            Self::Undrain { node } => write!(f, "resume-node n{node}"),
            Self::ConfirmDown { node } => write!(f, "confirm-down n{node}"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind();
        match self {
            Self::Power { node, for_ms }
            | Self::Freeze { node, for_ms }
            | Self::Suspend { node, for_ms }
            | Self::KillAgent { node, for_ms }
            | Self::StopAgent { node, for_ms }
            | Self::CutStorage { node, for_ms }
            | Self::RuntimeFull { node, for_ms } => {
                write!(f, "{kind} n{node} for {}", seconds(*for_ms))
            }
            Self::KillController { id, for_ms } | Self::StopController { id, for_ms } => {
                write!(f, "{kind} c{id} for {}", seconds(*for_ms))
            }
            Self::KillVmm { vm } | Self::GuestCrash { vm } | Self::GuestShutdown { vm } => {
                write!(f, "{kind} {vm}")
            }
            Self::StopVmm { vm, for_ms } => write!(f, "{kind} {vm} for {}", seconds(*for_ms)),
            Self::Cut { from, to, for_ms, .. } => {
                write!(f, "{kind} n{from} n{to} for {}", seconds(*for_ms))
            }
            Self::Split { side, for_ms } => {
                write!(f, "{kind} {side:?} from the others for {}", seconds(*for_ms))
            }
            Self::Weather { loss_permille, repeat_permille, extra_ms, for_ms } => write!(
                f,
                "{kind} loss {loss_permille}‰, repeats {repeat_permille}‰, up to {extra_ms} ms late \
                 for {}",
                seconds(*for_ms)
            ),
            Self::StorageFull { for_ms } | Self::StorageError { for_ms } => {
                write!(f, "{kind} for {}", seconds(*for_ms))
            }
            Self::Clock { node, jump_ms } => write!(f, "{kind} n{node} jumps by {jump_ms} ms"),
        }
    }
}

impl Scenario {
    /// A scenario in which nothing happens yet, and a minute for what is to happen.
    pub fn calm(cluster: Cluster) -> Self {
        Self { seed: 1, cluster, events: Vec::new(), heal_at_ms: 60_000, settle_ms_max: 240_000 }
    }

    /// The scenario of a seed: a cluster, and a minute in which nearly everything goes wrong.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng::of(seed, "scenario");
        let cluster = cluster(&mut rng);
        let calm_ms = 8_000;
        let heal_at_ms = calm_ms + rng.within(30_000, 80_000);
        let mut events = Vec::new();
        let faults = rng.within(4, 24);
        let requests = rng.within(4, 20);
        for _ in 0..faults {
            let at_ms = rng.within(calm_ms, heal_at_ms - 2_000);
            events.push(Timed { at_ms, event: Event::Fault(fault(&mut rng, &cluster)) });
        }
        for _ in 0..requests {
            let at_ms = rng.within(calm_ms - 2_000, heal_at_ms);
            events.push(Timed { at_ms, event: Event::Request(request(&mut rng, &cluster)) });
        }
        // A person asserts that a node is down while it is: the one proof that rests on a word.
        let downs: Vec<Timed> = events.iter().filter_map(|it| assertion(&mut rng, it)).collect();
        events.extend(downs);
        events.sort_by_key(|timed| timed.at_ms);
        Self { seed, cluster, events, heal_at_ms, settle_ms_max: 240_000 }
    }
}

fn assertion(rng: &mut Rng, timed: &Timed) -> Option<Timed> {
    let Event::Fault(Fault::Power { node, for_ms }) = timed.event else { return None };
    let at_ms = timed.at_ms + rng.within(2_000, 8_000);
    let event = Event::Request(Request::ConfirmDown { node });
    (for_ms > 5_000 && rng.below(4) == 0).then_some(Timed { at_ms, event })
}

fn cluster(rng: &mut Rng) -> Cluster {
    let nodes = rng.within(3, 4);
    let storage = match rng.below(2) {
        0 => StorageKind::OneKernel,
        _ => StorageKind::Network { lease_ms: rng.within(4_000, 12_000) },
    };
    let vms = rng.within(2, 4);
    let vms = (0..vms).map(|number| vm(rng, nodes, &format!("vm{number}"))).collect();
    Cluster {
        nodes,
        controllers: 3,
        storage,
        vms,
        node_memory_mib: rng.within(2, 4) * 512,
        drift_ppm: i64::try_from(rng.below(500)).unwrap_or(0),
    }
}

fn vm(rng: &mut Rng, nodes: u64, name: &str) -> VmSetup {
    let mut vm = VmSetup::new(name);
    vm.priority = u32::try_from(rng.below(3)).unwrap_or(0);
    vm.lease_arbiter = rng.below(4) == 0;
    if rng.below(8) == 0 {
        vm.restart = RestartPolicy::Never;
    }
    if rng.below(6) == 0 {
        let first = rng.within(1, nodes);
        vm.possible_owners = vec![first, first % nodes + 1];
    }
    vm
}

fn duration(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => rng.within(100, 1_500),
        1 | 2 => rng.within(1_500, 8_000),
        _ => rng.within(8_000, 30_000),
    }
}

fn fault(rng: &mut Rng, cluster: &Cluster) -> Fault {
    let node = rng.within(1, cluster.nodes);
    let id = rng.within(1, cluster.controllers);
    let vm = rng.pick(&cluster.vms).map(|vm| vm.name.clone()).unwrap_or_default();
    let for_ms = duration(rng);
    match rng.below(26) {
        0 | 1 => Fault::Power { node, for_ms },
        2 => Fault::Freeze { node, for_ms },
        3 => Fault::Suspend { node, for_ms },
        4..=6 => Fault::KillAgent { node, for_ms },
        7 | 8 => Fault::KillController { id, for_ms },
        9 | 10 => Fault::KillVmm { vm },
        11 => Fault::StopAgent { node, for_ms },
        12 => Fault::StopController { id, for_ms },
        13 => Fault::StopVmm { vm, for_ms },
        14 | 15 => {
            let to = rng.within(1, cluster.nodes - 1);
            let to = if to >= node { to + 1 } else { to };
            Fault::Cut { from: node, to, both: rng.below(2) == 0, for_ms }
        }
        16 | 17 => Fault::Split { side: vec![node], for_ms },
        18 => Fault::CutStorage { node, for_ms },
        19 | 20 => Fault::Weather {
            loss_permille: u32::try_from(rng.below(80)).unwrap_or(0),
            repeat_permille: u32::try_from(rng.below(150)).unwrap_or(0),
            extra_ms: rng.below(3_000),
            for_ms,
        },
        21 => Fault::StorageFull { for_ms },
        22 => match rng.below(2) {
            0 => Fault::StorageError { for_ms: for_ms.min(3_000) },
            _ => Fault::RuntimeFull { node, for_ms },
        },
        23 => Fault::Clock {
            node,
            jump_ms: 3_600_000 - i64::try_from(rng.below(7_200_000)).unwrap_or(0),
        },
        24 => Fault::GuestCrash { vm },
        _ => Fault::GuestShutdown { vm },
    }
}

fn request(rng: &mut Rng, cluster: &Cluster) -> Request {
    let node = rng.within(1, cluster.nodes);
    let vm = rng.pick(&cluster.vms).map(|vm| vm.name.clone()).unwrap_or_default();
    let named = (rng.below(3) == 0).then_some(node);
    match rng.below(22) {
        0..=6 => Request::Migrate { vm, node: named },
        7..=9 => Request::Save { vm },
        10..=12 => Request::Restore { vm },
        13 | 14 => Request::Start { vm, node: named },
        15 => Request::Stop { vm },
        16 => Request::Shutdown { vm },
        17 => Request::Pause { vm },
        18 => Request::Resume { vm },
        19 => Request::Drain { node },
        20 => Request::Undrain { node },
        _ => Request::Delete { vm },
    }
}
