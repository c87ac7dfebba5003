//! How the state is read from snapshots of this and of earlier releases.
//!
//! The encoding has no names, so that a field that is added changes everything behind it. A struct
//! that has changed since format 1 keeps its old form here, frozen, and becomes today's.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use bellwether_types::{
    Arbiter, BootId, ClusterSettings, DiskSpec, Epoch, FenceProof, NodeId, RestartPolicy, TaskId,
    VmId, VmSpec,
};
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{Desired, Index, Liveness, Node, Place, STATE_FORMAT, State, Vm};
use crate::task::Task;

/// The names of the fields, in the order in which they are written.
const FIELDS: &[&str] = &[
    "format",
    "cluster",
    "controllers",
    "nodes",
    "tokens",
    "vms",
    "tasks",
    "events",
    "next_event",
    "next_member",
    "next_task",
    "settings",
];

impl<'de> Deserialize<'de> for State {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_struct("State", FIELDS, StateVisitor)
    }
}

struct StateVisitor;

impl<'de> Visitor<'de> for StateVisitor {
    type Value = State;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a state of format 1 to {STATE_FORMAT}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<State, A::Error> {
        match next::<u32, A>(&mut seq)? {
            1 => read::<NodeV1, VmV1, A>(&mut seq, |_| Ok(ClusterSettings::default())),
            STATE_FORMAT => read::<Node, Vm, A>(&mut seq, next),
            format => Err(A::Error::custom(format!(
                "the state has format {format}; this release reads 1 to {STATE_FORMAT}"
            ))),
        }
    }
}

/// Reads everything behind the format; `settings` is the last field, or what stands for it.
fn read<'de, N, V, A>(
    seq: &mut A,
    settings: impl FnOnce(&mut A) -> Result<ClusterSettings, A::Error>,
) -> Result<State, A::Error>
where
    N: Deserialize<'de> + Into<Node>,
    V: Deserialize<'de> + Into<Vm>,
    A: SeqAccess<'de>,
{
    // The fields of a struct expression are evaluated in the order in which they stand.
    let mut state = State {
        format: STATE_FORMAT,
        cluster: next(seq)?,
        controllers: next(seq)?,
        nodes: next::<Mapped<NodeId, N, Node>, A>(seq)?.map,
        tokens: next(seq)?,
        vms: next::<Mapped<VmId, V, Vm>, A>(seq)?.map,
        tasks: next::<BTreeMap<TaskId, Task>, A>(seq)?,
        events: next::<VecDeque<_>, A>(seq)?,
        next_event: next(seq)?,
        next_member: next(seq)?,
        next_task: next(seq)?,
        settings: settings(seq)?,
        index: Index::default(),
    };
    state.index = Index::of(&state);
    Ok(state)
}

fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(seq: &mut A) -> Result<T, A::Error> {
    seq.next_element()?.ok_or_else(|| A::Error::custom("the state ends too early"))
}

/// A map whose values are read in one form and kept in another, without a second map.
struct Mapped<K, From, To> {
    map: BTreeMap<K, To>,
    from: PhantomData<From>,
}

impl<'de, K, From, To> Deserialize<'de> for Mapped<K, From, To>
where
    K: Deserialize<'de> + Ord,
    From: Deserialize<'de> + Into<To>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MapVisitor(PhantomData))
    }
}

struct MapVisitor<K, From, To>(PhantomData<(K, From, To)>);

impl<'de, K, From, To> Visitor<'de> for MapVisitor<K, From, To>
where
    K: Deserialize<'de> + Ord,
    From: Deserialize<'de> + Into<To>,
{
    type Value = Mapped<K, From, To>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(
        self,
        mut access: A,
    ) -> Result<Self::Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some((key, value)) = access.next_entry::<K, From>()? {
            map.insert(key, value.into());
        }
        Ok(Mapped { map, from: PhantomData })
    }
}

/// A node as format 1 has it.
#[derive(Deserialize)]
struct NodeV1 {
    id: NodeId,
    name: String,
    address: String,
    agent_port: u16,
    liveness: Liveness,
    cordoned: bool,
    boot_id: Option<BootId>,
    past_boots: Vec<BootId>,
    memory_mib: u64,
    vcpus: u32,
    version: String,
}

impl From<NodeV1> for Node {
    fn from(old: NodeV1) -> Self {
        Self {
            id: old.id,
            name: old.name,
            address: old.address,
            agent_port: old.agent_port,
            liveness: old.liveness,
            cordoned: old.cordoned,
            boot_id: old.boot_id,
            past_boots: old.past_boots,
            memory_mib: old.memory_mib,
            vcpus: old.vcpus,
            version: old.version,
            losses: Vec::new(),
            quarantined_until: None,
            watchdog: None,
        }
    }
}

/// A specification as format 1 has it; the command `CreateVm` as well.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmSpecV1 {
    pub name: String,
    pub vcpus: u32,
    pub memory_mib: u64,
    pub kernel: PathBuf,
    pub cmdline: String,
    pub disks: Vec<DiskSpec>,
    pub possible_owners: BTreeSet<NodeId>,
    pub priority: u32,
    pub restart: RestartPolicy,
}

impl From<VmSpecV1> for VmSpec {
    fn from(old: VmSpecV1) -> Self {
        Self {
            name: old.name,
            vcpus: old.vcpus,
            memory_mib: old.memory_mib,
            kernel: old.kernel,
            initrd: None,
            cmdline: old.cmdline,
            disks: old.disks,
            nics: Vec::new(),
            possible_owners: old.possible_owners,
            priority: old.priority,
            restart: old.restart,
        }
    }
}

/// A VM as format 1 has it.
#[derive(Deserialize)]
struct VmV1 {
    id: VmId,
    spec: VmSpecV1,
    desired: Desired,
    paused: bool,
    epoch: Epoch,
    place: Place,
    task: Option<TaskId>,
    last_proof: Option<FenceProof>,
    pending: Option<String>,
    failures: u32,
    retry_at: u64,
    changed_at: u64,
}

impl From<VmV1> for Vm {
    fn from(old: VmV1) -> Self {
        Self {
            id: old.id,
            spec: old.spec.into(),
            desired: old.desired,
            paused: old.paused,
            epoch: old.epoch,
            place: old.place,
            task: old.task,
            last_proof: old.last_proof,
            pending: old.pending,
            failures: old.failures,
            retry_at: old.retry_at,
            changed_at: old.changed_at,
            rules: Default::default(),
            restarts: Vec::new(),
            halted: None,
            placed: None,
            arbiter: Arbiter::Storage,
        }
    }
}
