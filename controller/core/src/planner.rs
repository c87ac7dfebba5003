//! Placement: which node, and why not the others. Pure.
//!
//! A [`Planner`] knows what every node has left, and what the choices of its own round have taken
//! since. A node that fails a hard rule is refused, with its reason. Of the others the first one in
//! this order is chosen, so that the same state always gives the same answer:
//!
//! 1. the fewest VMs of the VM's own anti-affinity groups,
//! 2. the best of its preferred owners,
//! 3. the lowest load with the VM on it: the larger one of its shares of memory and vCPUs,
//! 4. the fewest VMs, then the lowest number.
//!
//! Nothing is ever moved to make room or to even the load out.

mod reason;
mod reserve;

use std::collections::{BTreeMap, BTreeSet};

use bellwether_types::{NodeId, Strength, TaskId};

pub use reason::{Choice, NoNode, Reason};
pub use reserve::admit;

use crate::state::{Members, Node, NodeLoad, State, Vm, nodes_of};
use crate::task::{Task, TaskKind};

/// How many refused nodes a decision names; the others it counts.
const NAMED_MAX: usize = 4;

/// What is wanted of a placement.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    pub vm: &'a Vm,
    /// The only node that will do, when somebody named one.
    pub wanted: Option<NodeId>,
    /// Nodes on which this task has failed already.
    pub tried: &'a BTreeSet<NodeId>,
    /// The node that the VM is leaving.
    pub leaving: Option<NodeId>,
    /// The task's own reservation must not count against it.
    pub task: Option<TaskId>,
}

impl<'a> Wish<'a> {
    /// The wish of a task that needs a node for its VM.
    pub fn of(task: &'a Task, vm: &'a Vm) -> Self {
        let leaving = match task.kind {
            TaskKind::Migrate => vm.place.runner().map(|runner| runner.node),
            _ => None,
        };
        Self { vm, wanted: task.wanted, tried: &task.tried, leaving, task: Some(task.id) }
    }
}

/// Memory and vCPUs that a node has left.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Free {
    pub memory_mib: u64,
    pub vcpus: u32,
    pub vms: usize,
}

/// What is left on a node, VMs under way to it included.
pub fn free(state: &State, node: &Node) -> Free {
    left(node, state.used_on(node.id))
}

fn left(node: &Node, used: NodeLoad) -> Free {
    Free {
        memory_mib: node.memory_mib.saturating_sub(used.memory_mib),
        vcpus: node.vcpus.saturating_sub(used.vcpus),
        vms: used.vms,
    }
}

/// The node for one VM, or why each node will not do.
pub fn choose(state: &State, wish: &Wish<'_>) -> Result<Choice, NoNode> {
    Planner::new(state).choose(wish)
}

/// Why a node that was chosen a moment ago will not do any more: something else has taken its room.
pub(crate) fn taken(state: &State, task: &Task, vm: &Vm, node: NodeId) -> Option<String> {
    let node = state.nodes.get(&node)?;
    let candidate = Candidate { node, used: state.used_on(node.id) };
    let planner = Planner { state, nodes: Vec::new(), placed: BTreeMap::new() };
    let judged = candidate.judge(&Wish::of(task, vm), &planner.neighbours(vm));
    judged.err().map(|reason| format!("{} was chosen, and now {reason}", node.name))
}

/// What speaks for or against each node now, for whoever asks why a VM is not elsewhere.
pub fn judge(state: &State, wish: &Wish<'_>) -> Vec<(NodeId, Result<Free, Reason>)> {
    let planner = Planner::new(state);
    let near = planner.neighbours(wish.vm);
    let verdict = |candidate: &Candidate<'_>| {
        let judged = candidate.judge(wish, &near);
        (candidate.node.id, judged.map(|_| left(candidate.node, candidate.used)))
    };
    planner.nodes.iter().map(verdict).collect()
}

/// One round of planning: each choice takes its room from the next ones.
pub struct Planner<'a> {
    state: &'a State,
    nodes: Vec<Candidate<'a>>,
    /// Members of anti-affinity groups that this round has placed.
    placed: BTreeMap<&'a str, BTreeMap<NodeId, Members>>,
}

struct Candidate<'a> {
    node: &'a Node,
    used: NodeLoad,
}

/// The members of a VM's own anti-affinity groups on a node.
#[derive(Clone, Copy, Default)]
struct Near<'a> {
    others: u32,
    /// A group in which either side insists on being apart.
    hard: Option<&'a str>,
}

type Neighbours<'a> = BTreeMap<NodeId, Near<'a>>;

/// Lower is better.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Rank {
    neighbours: u32,
    preference: usize,
    load_permyriad: u64,
    vms: usize,
    node: NodeId,
}

/// The best two of the nodes that will do, and why the others will not.
#[derive(Default)]
struct Ballot {
    best: Option<(Rank, usize)>,
    next: Option<(Rank, usize)>,
    /// All of them as long as no node will do, then as many as a decision names.
    refused: Vec<(String, Reason)>,
    refused_count: usize,
}

impl Ballot {
    fn stand(&mut self, rank: Rank, index: usize) {
        if self.best.is_none_or(|(best, _)| rank < best) {
            (self.next, self.best) = (self.best, Some((rank, index)));
        } else if self.next.is_none_or(|(next, _)| rank < next) {
            self.next = Some((rank, index));
        }
    }

    fn refuse(&mut self, node: &str, reason: Reason) {
        self.refused_count += 1;
        if self.best.is_none() || self.refused.len() < NAMED_MAX {
            self.refused.push((node.to_owned(), reason));
        }
    }
}

impl<'a> Planner<'a> {
    pub fn new(state: &'a State) -> Self {
        let mut loads = state.index.loads().peekable();
        let nodes = state.nodes.values().map(|node| {
            while loads.next_if(|(id, _)| *id < node.id).is_some() {}
            let used = loads.next_if(|(id, _)| *id == node.id).map(|(_, load)| load);
            Candidate { node, used: used.unwrap_or_default() }
        });
        Self { state, nodes: nodes.collect(), placed: BTreeMap::new() }
    }

    /// The node for one VM; the room that it takes there is not reserved yet.
    pub fn choose(&self, wish: &Wish<'_>) -> Result<Choice, NoNode> {
        let name = &wish.vm.spec.name;
        if let Some(reason) = waits_for(self.state, wish.vm) {
            return Err(NoNode { vm: name.clone(), waits_for: Some(reason), reasons: Vec::new() });
        }
        let near = self.neighbours(wish.vm);
        let mut ballot = Ballot::default();
        for (index, candidate) in self.nodes.iter().enumerate() {
            match candidate.judge(wish, &near) {
                Ok(rank) => ballot.stand(rank, index),
                Err(reason) => ballot.refuse(&candidate.node.name, reason),
            }
        }
        match ballot.best {
            Some((rank, index)) => Ok(self.explain(wish.vm, rank, index, ballot)),
            None => Err(NoNode { vm: name.clone(), waits_for: None, reasons: ballot.refused }),
        }
    }

    fn explain(&self, vm: &Vm, rank: Rank, index: usize, mut ballot: Ballot) -> Choice {
        let Candidate { node, used } = &self.nodes[index];
        let name = |(_, index): (Rank, usize)| self.nodes[index].node.name.clone();
        ballot.refused.truncate(NAMED_MAX);
        Choice {
            node: node.id,
            name: node.name.clone(),
            free: left(node, *used),
            total: (node.memory_mib, node.vcpus),
            preference: vm.rules.preferred_owners.get(rank.preference).map(|_| rank.preference),
            neighbours: rank.neighbours,
            next_best: ballot.next.map(name),
            others: self.nodes.len() - ballot.refused_count - 1,
            refused: ballot.refused,
            refused_count: ballot.refused_count,
        }
    }

    /// The same without words, and without regard to the VMs that have to run before.
    fn choose_place(&self, wish: &Wish<'_>) -> Option<NodeId> {
        let near = self.neighbours(wish.vm);
        let ranks = self.nodes.iter().filter_map(|candidate| candidate.judge(wish, &near).ok());
        ranks.min().map(|rank| rank.node)
    }

    /// Takes a VM's room on a node from whatever is chosen later.
    pub fn take(&mut self, node: NodeId, vm: &'a Vm) {
        let Ok(index) = self.nodes.binary_search_by_key(&node, |candidate| candidate.node.id)
        else {
            return;
        };
        let used = &mut self.nodes[index].used;
        used.memory_mib += vm.spec.memory_mib;
        used.vcpus += vm.spec.vcpus;
        used.vms += 1;
        for (group, strength) in &vm.rules.anti_affinity {
            let members = self.placed.entry(group).or_default().entry(node).or_default();
            members.all += 1;
            members.hard += u32::from(*strength == Strength::Hard);
        }
    }

    /// How many VMs of a VM's groups are on a node.
    pub fn neighbours_on(&self, vm: &Vm, node: NodeId) -> u32 {
        self.neighbours(vm).get(&node).map_or(0, |near| near.others)
    }

    /// Where the other members of a VM's groups are.
    fn neighbours<'v>(&self, vm: &'v Vm) -> Neighbours<'v> {
        let mut near = Neighbours::new();
        if vm.rules.anti_affinity.is_empty() {
            return near;
        }
        let task = vm.task.and_then(|id| self.state.tasks.get(&id));
        // While a command changes the VM, the index is without it.
        let counted = self.state.index.named(&vm.spec.name) == Some(vm.id);
        let own: Vec<NodeId> = nodes_of(vm, task).filter(|_| counted).collect();
        for (group, strength) in &vm.rules.anti_affinity {
            let hard = u32::from(*strength == Strength::Hard);
            let known = self.state.index.members(group).into_iter().flatten();
            let known = known.map(|(node, members)| match own.contains(node) {
                true => (*node, Members { all: members.all - 1, hard: members.hard - hard }),
                false => (*node, *members),
            });
            let placed = self.placed.get(group.as_str()).into_iter().flatten();
            for (node, members) in known.chain(placed.map(|(node, members)| (*node, *members))) {
                let entry = near.entry(node).or_default();
                entry.others += members.all;
                if members.all > 0 && (hard > 0 || members.hard > 0) {
                    entry.hard = Some(group);
                }
            }
        }
        near
    }
}

impl Candidate<'_> {
    /// How good this node would be, or why it will not do.
    fn judge(&self, wish: &Wish<'_>, near: &Neighbours<'_>) -> Result<Rank, Reason> {
        let (node, spec) = (self.node, &wish.vm.spec);
        refuse_outright(node, wish)?;
        let near = near.get(&node.id).copied().unwrap_or_default();
        if let Some(group) = near.hard {
            return Err(Reason::Apart { group: group.to_owned() });
        }
        let (memory_mib, vcpus) =
            (self.used.memory_mib + spec.memory_mib, self.used.vcpus + spec.vcpus);
        let free = left(node, self.used);
        if memory_mib > node.memory_mib {
            return Err(Reason::Memory { free_mib: free.memory_mib, needed_mib: spec.memory_mib });
        }
        if vcpus > node.vcpus {
            return Err(Reason::Vcpus { free: free.vcpus, needed: spec.vcpus });
        }
        let memory_share = memory_mib * 10_000 / node.memory_mib.max(1);
        let vcpu_share = u64::from(vcpus) * 10_000 / u64::from(node.vcpus.max(1));
        Ok(Rank {
            neighbours: near.others,
            preference: wish.vm.rules.preference(node.id),
            load_permyriad: memory_share.max(vcpu_share),
            vms: self.used.vms,
            node: node.id,
        })
    }
}

/// What needs no numbers.
fn refuse_outright(node: &Node, wish: &Wish<'_>) -> Result<(), Reason> {
    let owners = &wish.vm.spec.possible_owners;
    if wish.wanted.is_some_and(|wanted| wanted != node.id) {
        return Err(Reason::NotWanted);
    }
    if !node.is_online() {
        return Err(Reason::NotOnline(node.phase(0).as_str()));
    }
    if node.cordoned {
        return Err(Reason::Cordoned);
    }
    if node.quarantined_until.is_some() {
        return Err(Reason::Quarantined);
    }
    if !owners.is_empty() && !owners.contains(&node.id) {
        return Err(Reason::NotAnOwner);
    }
    if wish.leaving == Some(node.id) {
        return Err(Reason::Leaving);
    }
    match wish.tried.contains(&node.id) {
        true => Err(Reason::TriedBefore),
        false => Ok(()),
    }
}

/// Who is placed first: the higher priority, then the larger VM, because it fits in fewer places.
pub fn urgency(vm: &Vm) -> impl Ord + use<> {
    use std::cmp::Reverse;
    let size = Reverse((vm.spec.memory_mib, vm.spec.vcpus));
    (Reverse(vm.spec.priority), size, vm.id)
}

/// The VM for which another one has to wait, and how that one is.
fn waits_for(state: &State, vm: &Vm) -> Option<String> {
    if vm.place.runner().is_some() || vm.rules.start_after.is_empty() {
        return None;
    }
    let missing = vm.rules.start_after.iter().find(|other| !state.is_up(**other))?;
    let name = state.vm_name(*missing);
    Some(match state.vms.get(missing).map(|other| other.desired) {
        Some(crate::Desired::Running) => format!("{name}, which is not running yet"),
        _ => format!("{name}, which is stopped; start it with `bell vm start {name}`"),
    })
}
