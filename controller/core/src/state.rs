//! The replicated state. Only what the cluster wants and has decided stands here; what agents
//! observe is in [`crate::observe`], in the memory of the leader alone.

mod format;
pub use format::VmSpecV1;
mod index;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;

use bellwether_types::{
    Arbiter, BootId, ClusterId, ClusterSettings, Epoch, Failback, FenceProof, MemberRole, NodeId,
    NodePhase, Ports, StateFileRef, TaskId, VmId, VmRules, VmSpec,
};
use serde::{Deserialize, Serialize};

pub use index::NodeLoad;
pub(crate) use index::{Index, Members, nodes_of};

use crate::fence::NodeWatchdog;
use crate::task::{Task, TaskKind};

/// The version of this structure in snapshots. Version 1 is read, too (`state/format.rs`).
pub const STATE_FORMAT: u32 = 2;
/// How many events are kept.
pub const EVENTS_MAX: usize = 2_000;
/// How many ended tasks are kept.
pub const ENDED_TASKS_MAX: usize = 500;

/// Everything that the controllers agree upon.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct State {
    pub format: u32,
    pub cluster: Option<Cluster>,
    pub controllers: BTreeMap<u64, Member>,
    pub nodes: BTreeMap<NodeId, Node>,
    /// By the hash of the token's secret.
    pub tokens: BTreeMap<[u8; 32], Token>,
    pub vms: BTreeMap<VmId, Vm>,
    pub tasks: BTreeMap<TaskId, Task>,
    pub events: VecDeque<Event>,
    pub next_event: u64,
    pub next_member: u64,
    pub next_task: u64,
    pub settings: ClusterSettings,
    /// Found from the rest when it is loaded, and kept right by every command.
    #[serde(skip)]
    pub(crate) index: Index,
}

impl Default for State {
    fn default() -> Self {
        Self {
            format: STATE_FORMAT,
            cluster: None,
            controllers: BTreeMap::new(),
            nodes: BTreeMap::new(),
            tokens: BTreeMap::new(),
            vms: BTreeMap::new(),
            tasks: BTreeMap::new(),
            events: VecDeque::new(),
            next_event: 1,
            next_member: 1,
            next_task: 1,
            settings: ClusterSettings::default(),
            index: Index::default(),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cluster {
    pub id: ClusterId,
    pub name: String,
    /// The shared storage: the same absolute path on every node.
    pub storage: PathBuf,
}

/// A controller of the cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Member {
    pub id: u64,
    pub name: String,
    pub address: String,
    pub ports: Ports,
}

/// A single-use leave to join.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Token {
    pub role: MemberRole,
    pub expires_at: u64,
    pub used_by: Option<String>,
}

/// What the cluster holds of a node's life. Time-bounded leases are in the leader's memory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Liveness {
    /// It has a certificate and has not registered yet.
    Joining,
    Online,
    /// Not heard from. It may still be running its VMs.
    Unknown {
        since: u64,
    },
    /// A proof says that nothing runs there any more.
    Fenced {
        proof: FenceProof,
    },
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    pub address: String,
    pub agent_port: u16,
    pub liveness: Liveness,
    /// An administrator wants it empty.
    pub cordoned: bool,
    pub boot_id: Option<BootId>,
    /// Boots that a later one has ended, the newest last: a late message of one proves nothing.
    pub past_boots: Vec<BootId>,
    pub memory_mib: u64,
    pub vcpus: u32,
    pub version: String,
    /// When it was lost, within the window that counts; the newest last.
    pub losses: Vec<u64>,
    /// It was lost too often: until then no VM is placed on it.
    pub quarantined_until: Option<u64>,
    /// What its fencer promises of its watchdog.
    pub watchdog: Option<NodeWatchdog>,
}

impl Node {
    /// The word for this node's state; `vms` is [`State::load_of`] it.
    pub fn phase(&self, vms: usize) -> NodePhase {
        match (&self.liveness, self.cordoned) {
            (Liveness::Joining, _) => NodePhase::Joining,
            (Liveness::Unknown { .. }, _) => NodePhase::Unknown,
            (Liveness::Fenced { .. }, _) => NodePhase::Fenced,
            (Liveness::Online, true) if vms > 0 => NodePhase::Draining,
            (Liveness::Online, true) => NodePhase::Maintenance,
            (Liveness::Online, false) => NodePhase::Online,
        }
    }

    pub fn is_online(&self) -> bool {
        self.liveness == Liveness::Online
    }
}

/// What the administrator wants of a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    Running,
    Stopped,
    Saved,
}

impl Desired {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Saved => "saved",
        }
    }
}

/// The one node that may run a VM, in one boot, under one epoch.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Runner {
    pub node: NodeId,
    pub epoch: Epoch,
    pub boot_id: BootId,
}

/// Who may run a VM now. This is the record on which invariant 1 rests.
///
/// ```text
///              Start                      Seal committed
///   Stopped ----------> Runner(n, e) ------------------> Sealed(file)
///      ^                 |    ^  ^                          |
///      |  released       |    |  \--- Claim committed ------/   (epoch e' > e)
///      |<----------------/    |
///      |      node lost: revocation committed
///      |                      |
///      \----- Revoked(n, e) --/   only with a FenceProof, under a higher epoch
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Place {
    /// Nobody may run it, and no memory is kept.
    Stopped,
    Runner(Runner),
    /// Nobody may run it; its memory is in the file. `sealer` may still hold the locks.
    Sealed {
        file: StateFileRef,
        sealer: Option<Runner>,
    },
    /// The runner gets no grant any more, and no proof exists yet that it is gone.
    Revoked(Runner),
}

impl Place {
    pub fn runner(&self) -> Option<&Runner> {
        match self {
            Self::Runner(runner) => Some(runner),
            _ => None,
        }
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Vm {
    pub id: VmId,
    pub spec: VmSpec,
    pub desired: Desired,
    /// The administrator paused it; it must be resumed before it is moved.
    pub paused: bool,
    /// The highest epoch ever given out for this VM.
    pub epoch: Epoch,
    pub place: Place,
    /// The task that owns this VM; no other may touch it.
    pub task: Option<TaskId>,
    pub last_proof: Option<FenceProof>,
    /// Why it is not running although it should.
    pub pending: Option<String>,
    /// Failed starts and crashes since it last ran well.
    pub failures: u32,
    /// No automatic start before this time.
    pub retry_at: u64,
    pub changed_at: u64,
    pub rules: VmRules,
    /// When the cluster brought it up again, within the period of its limit; the newest last.
    pub restarts: Vec<u64>,
    /// Why the cluster does not start it any more; a person's start takes this away.
    pub halted: Option<String>,
    /// Why it is where it is.
    pub placed: Option<Placed>,
    /// Who decides whether it goes on where its node has lost its lease.
    pub arbiter: Arbiter,
}

/// The decision that put a VM onto its node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Placed {
    pub node: NodeId,
    pub at: u64,
    pub task: TaskId,
    pub kind: TaskKind,
    /// Who asked for the task: a person, or the cluster itself.
    pub by: String,
    /// What spoke for this node, and against the others.
    pub why: String,
}

impl Vm {
    /// A VM that has never run.
    pub fn new(id: VmId, spec: VmSpec, rules: VmRules, at: u64) -> Self {
        Self {
            id,
            desired: Desired::Stopped,
            paused: false,
            epoch: Epoch(0),
            place: Place::Stopped,
            task: None,
            last_proof: None,
            pending: None,
            failures: 0,
            retry_at: 0,
            changed_at: at,
            spec,
            rules,
            restarts: Vec::new(),
            halted: None,
            placed: None,
            arbiter: Arbiter::Storage,
        }
    }

    /// The storage, unless a person has said otherwise: disks on shared storage carry exact locks,
    /// and without a disk to write the claim file on the storage still does.
    pub fn arbiter(&self) -> Arbiter {
        self.arbiter
    }

    /// Whether it needs no report to see that something is to be done for it, perhaps after a pause.
    pub(crate) fn is_unsettled(&self) -> bool {
        match &self.place {
            Place::Revoked(_) => true,
            Place::Runner(_) => self.desired == Desired::Stopped,
            Place::Stopped | Place::Sealed { .. } => self.desired == Desired::Running,
        }
    }

    /// Whether the cluster has put it onto a node that it does not like best, and it is to go back
    /// at some time. One that a person put there stays.
    pub(crate) fn is_away(&self) -> bool {
        let by_cluster = || {
            let placed = self.placed.as_ref();
            placed.is_some_and(|placed| placed.by == crate::reconcile::BY_CLUSTER)
        };
        let Some(runner) = self.place.runner() else { return false };
        let returns = self.rules.failback != Failback::Never;
        returns && self.rules.preference(runner.node) > 0 && by_cluster()
    }

    /// Gives out the next epoch.
    pub(crate) fn next_epoch(&mut self) -> Epoch {
        self.epoch = self.epoch.next();
        self.epoch
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Info,
    Warn,
    Error,
}

impl Level {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    pub seq: u64,
    pub at: u64,
    pub level: Level,
    pub vm: Option<String>,
    pub node: Option<String>,
    pub task: Option<TaskId>,
    pub text: String,
}

impl State {
    /// A VM by its name or id.
    pub fn find_vm(&self, name_or_id: &str) -> Option<&Vm> {
        let id = name_or_id.parse().ok().or_else(|| self.index.named(name_or_id));
        self.vms.get(&id?)
    }

    /// A node by its name or number.
    pub fn find_node(&self, name_or_id: &str) -> Option<&Node> {
        let by_name = self.nodes.values().find(|node| node.name == name_or_id);
        by_name.or_else(|| self.nodes.get(&NodeId(name_or_id.parse().ok()?)))
    }

    /// The node's name for people, or its number when it is gone.
    pub fn node_name(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| format!("node {id}"), |node| node.name.clone())
    }

    /// The VM's name for people, or its id when it is gone.
    pub fn vm_name(&self, id: VmId) -> String {
        self.vms.get(&id).map_or_else(|| id.to_string(), |vm| vm.spec.name.clone())
    }

    /// VMs that this node alone may run.
    pub fn vms_of(&self, node: NodeId) -> impl Iterator<Item = &Vm> {
        self.index.runs(node).filter_map(|id| self.vms.get(&id))
    }

    /// Whether a VM runs, and is not just being started.
    pub fn is_up(&self, id: VmId) -> bool {
        let Some(vm) = self.vms.get(&id).filter(|vm| vm.place.runner().is_some()) else {
            return false;
        };
        let kind = vm.task.and_then(|id| self.tasks.get(&id)).map(|task| task.kind);
        !matches!(kind, Some(TaskKind::Start | TaskKind::Restore | TaskKind::Failover))
    }

    /// How many VMs keep a node from being empty: those that it may run, and those that it has
    /// sealed and still holds.
    pub fn load_of(&self, node: NodeId) -> usize {
        self.index.load(node).map_or(0, |load| load.keep_it_busy)
    }

    /// What the VMs of a node use, those included that are under way to it or may still be there.
    pub fn used_on(&self, node: NodeId) -> NodeLoad {
        self.index.load(node).copied().unwrap_or_default()
    }

    /// Tasks that have not ended.
    pub fn active_tasks(&self) -> impl Iterator<Item = &Task> {
        self.index.active_tasks().filter_map(|id| self.tasks.get(&id))
    }
}
