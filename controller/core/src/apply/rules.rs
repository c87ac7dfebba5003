//! The rules of VMs and the settings of the cluster: how they are changed, and what they forbid.

use std::collections::BTreeSet;

use bellwether_types::{ClusterPatch, NodeId, TaskId, VmId, VmPatch, VmRules};

use super::{About, Applied};
use crate::command::{Outcome, Rejection};
use crate::planner;
use crate::reconcile::BY_CLUSTER;
use crate::state::{Level, Placed, State, Vm};
use crate::task::{Task, TaskKind, TaskRequest};

impl State {
    pub(super) fn set_vm(&mut self, at: u64, id: VmId, patch: VmPatch) -> Applied {
        let Some(vm) = self.vms.get(&id) else {
            return Err(Rejection::not_found(format!("there is no VM {id}")));
        };
        let (mut spec, mut rules) = (vm.spec.clone(), vm.rules.clone());
        if let Some(owners) = &patch.possible_owners {
            spec.possible_owners.clone_from(owners);
        }
        spec.priority = patch.priority.unwrap_or(spec.priority);
        spec.restart = patch.restart.unwrap_or(spec.restart);
        rules.change(patch);
        if (&spec, &rules) == (&vm.spec, &vm.rules) {
            return Ok(Outcome::Unchanged);
        }
        self.check_nodes_known(&spec.name, &spec.possible_owners)?;
        self.check_rules(id, &spec.name, &rules)?;
        let text = format!("the rules of VM {} were changed", spec.name);
        if let Some(vm) = self.vms.get_mut(&id) {
            (vm.spec, vm.rules) = (spec, rules);
        }
        self.event(at, Level::Info, About::vm(id), text);
        Ok(Outcome::Done)
    }

    pub(super) fn set_cluster(&mut self, at: u64, patch: ClusterPatch) -> Applied {
        let mut settings = self.settings;
        settings.change(patch);
        settings.validate().map_err(|error| Rejection::invalid(error.to_string()))?;
        if settings == self.settings {
            return Ok(Outcome::Unchanged);
        }
        self.settings = settings;
        let text = "the settings of the cluster were changed";
        self.event(at, Level::Info, About::default(), text);
        Ok(Outcome::Done)
    }

    pub(super) fn check_nodes_known(
        &self,
        vm: &str,
        owners: &BTreeSet<NodeId>,
    ) -> Result<(), Rejection> {
        match owners.iter().find(|owner| !self.nodes.contains_key(owner)) {
            None => Ok(()),
            Some(owner) => Err(Rejection::not_found(format!(
                "VM {vm}: there is no node {owner} to own it; see `bell node list`"
            ))),
        }
    }

    /// What the rules of a VM name has to exist, and nothing may wait for itself.
    pub(super) fn check_rules(
        &self,
        id: VmId,
        name: &str,
        rules: &VmRules,
    ) -> Result<(), Rejection> {
        rules.validate().map_err(|error| Rejection::invalid(format!("VM {name}: {error}")))?;
        self.check_nodes_known(name, &rules.preferred_owners.iter().copied().collect())?;
        if let Some(other) =
            rules.start_after.iter().find(|o| **o != id && !self.vms.contains_key(o))
        {
            return Err(Rejection::not_found(format!(
                "VM {name}: there is no VM {other} to start after; see `bell vm list`"
            )));
        }
        match self.cycle(id, rules) {
            None => Ok(()),
            Some(path) => {
                let names: Vec<String> = path.iter().map(|vm| self.vm_name(*vm)).collect();
                Err(Rejection::invalid(format!(
                    "VM {name} would wait for itself: {name} after {}",
                    names.join(" after ")
                )))
            }
        }
    }

    /// A way along the start dependencies that comes back to the VM.
    fn cycle(&self, id: VmId, rules: &VmRules) -> Option<Vec<VmId>> {
        let mut seen = BTreeSet::new();
        let mut ways: Vec<Vec<VmId>> = rules.start_after.iter().map(|next| vec![*next]).collect();
        while let Some(way) = ways.pop() {
            let last = *way.last()?;
            if last == id {
                return Some(way);
            }
            if !seen.insert(last) {
                continue;
            }
            for next in self.vms.get(&last).into_iter().flat_map(|vm| &vm.rules.start_after) {
                ways.push(way.iter().chain([next]).copied().collect());
            }
        }
        None
    }

    /// What forbids a task that could begin otherwise.
    pub(super) fn check_begin(&self, request: &TaskRequest) -> Result<(), Rejection> {
        let Some(vm) = self.vms.get(&request.vm) else { return Ok(()) };
        let by_person = request.by != BY_CLUSTER;
        match request.kind {
            TaskKind::Start | TaskKind::Restore if by_person => {
                planner::admit(self, vm).map_err(Rejection::conflict)
            }
            TaskKind::Delete => {
                let waiting: Vec<String> =
                    self.index.dependents(vm.id).map(|id| self.vm_name(id)).collect();
                match waiting.is_empty() {
                    true => Ok(()),
                    false => Err(Rejection::conflict(format!(
                        "VM {} is not deleted: {} start after it; change that with `bell vm set`",
                        vm.spec.name,
                        waiting.join(", ")
                    ))),
                }
            }
            _ => Ok(()),
        }
    }

    /// Says that the cluster has given a VM up, once.
    pub(super) fn report_halt(&mut self, at: u64, vm: VmId, task: TaskId) {
        if let Some(reason) = self.vms.get(&vm).and_then(|vm| vm.halted.clone()) {
            self.event(at, Level::Error, About::task(vm, task), reason);
        }
    }
}

/// A person's start is a new beginning for a VM that the cluster has given up.
pub(super) fn person_takes_over(vm: &mut Vm, request: &TaskRequest) {
    let starts = matches!(request.kind, TaskKind::Start | TaskKind::Restore);
    if starts && request.by != BY_CLUSTER {
        vm.halted = None;
        vm.restarts.clear();
    }
}

/// Counts that the cluster brings a VM up again. When its limit is reached, the VM is left to a
/// person instead.
pub(super) fn may_restart(at: u64, vm: &mut Vm) -> bool {
    let Some(limit) = vm.rules.restart_limit else { return true };
    let period = limit.period_s.saturating_mul(1_000);
    vm.restarts.retain(|restart| at.saturating_sub(*restart) < period);
    if vm.restarts.len() < usize::try_from(limit.times).unwrap_or(usize::MAX) {
        vm.restarts.push(at);
        return true;
    }
    vm.halted = Some(format!(
        "VM {0} was restarted {1} times within {2} s, its limit, and has ended again: it stays down; \
         start it with `bell vm start {0}`",
        vm.spec.name, limit.times, limit.period_s
    ));
    false
}

/// Remembers at a VM why it goes to this node.
pub(super) fn note_placement(at: u64, task: &Task, vm: &mut Vm, node: NodeId, why: String) {
    vm.placed = Some(Placed { node, at, task: task.id, kind: task.kind, by: task.by.clone(), why });
}
