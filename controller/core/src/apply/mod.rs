//! The deterministic application of commands to the state.

mod members;
mod steps;
mod vms;

pub(crate) use steps::is_due;

use bellwether_types::{TaskId, VmId};

use crate::command::{Change, Command, Outcome, Rejection};
use crate::state::{ENDED_TASKS_MAX, EVENTS_MAX, Event, Level, State};

/// The result of one kind of command.
type Applied = Result<Outcome, Rejection>;

impl State {
    /// Applies one command. The same commands in the same order give the same state and outcomes
    /// on every controller; nothing else is read.
    pub fn apply(&mut self, command: Command) -> Outcome {
        let at = command.at;
        let applied = match command.change {
            Change::InitCluster { id, name, storage, first } => {
                self.init_cluster(at, crate::state::Cluster { id, name, storage }, first)
            }
            Change::CreateToken { hash, role, expires_at } => {
                self.create_token(at, hash, role, expires_at)
            }
            Change::RedeemToken { hash, role, name, address, ports } => {
                self.redeem_token(at, hash, role, members::Newcomer { name, address, ports })
            }
            Change::RegisterNode(registration) => self.register_node(at, registration),
            Change::NodeUnknown { node, boot_id } => self.node_unknown(at, node, boot_id),
            Change::NodeOnline { node, boot_id } => self.node_online(at, node, boot_id),
            Change::Cordon { node, cordoned } => self.cordon(at, node, cordoned),
            Change::ConfirmDown { node, who } => self.confirm_down(at, node, who),
            Change::CreateVm { id, spec } => self.create_vm(at, id, spec),
            Change::BeginTask(request) => self.begin_task(at, request),
            Change::Advance { task, step_no, event } => self.advance(at, task, step_no, event),
            Change::SetPaused { vm, paused } => self.set_paused(at, vm, paused),
        };
        debug_assert!(self.invariants().is_ok(), "{:?}", self.invariants());
        applied.unwrap_or_else(Outcome::Rejected)
    }

    /// What must hold after every command; asserted in debug builds, in tests and in simulation.
    pub fn invariants(&self) -> Result<(), String> {
        for vm in self.vms.values() {
            let epoch = match &vm.place {
                crate::state::Place::Runner(runner) | crate::state::Place::Revoked(runner) => {
                    runner.epoch
                }
                crate::state::Place::Sealed { file, .. } => file.epoch,
                crate::state::Place::Stopped => continue,
            };
            if epoch > vm.epoch {
                return Err(format!("VM {}: epoch {epoch} was never given out", vm.spec.name));
            }
        }
        for task in self.active_tasks() {
            let owned = self.vms.get(&task.vm).and_then(|vm| vm.task);
            if owned != Some(task.id) {
                return Err(format!("task {} works on a VM that it does not own", task.id));
            }
        }
        Ok(())
    }

    fn event(&mut self, at: u64, level: Level, about: About<'_>, text: impl Into<String>) {
        let vm = about.vm.and_then(|id| self.vms.get(&id)).map(|vm| vm.spec.name.clone());
        let event = Event {
            seq: self.next_event,
            at,
            level,
            vm,
            node: about.node.map(str::to_owned),
            task: about.task,
            text: text.into(),
        };
        self.next_event += 1;
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Forgets the oldest ended tasks beyond the bound.
    fn trim_tasks(&mut self) {
        let ended: Vec<TaskId> =
            self.tasks.values().filter(|task| task.outcome.is_some()).map(|task| task.id).collect();
        for id in ended.iter().take(ended.len().saturating_sub(ENDED_TASKS_MAX)) {
            self.tasks.remove(id);
        }
    }
}

/// What an event is about.
#[derive(Clone, Copy, Default)]
struct About<'a> {
    vm: Option<VmId>,
    node: Option<&'a str>,
    task: Option<TaskId>,
}

impl<'a> About<'a> {
    fn vm(vm: VmId) -> Self {
        Self { vm: Some(vm), ..Self::default() }
    }
    fn node(node: &'a str) -> Self {
        Self { node: Some(node), ..Self::default() }
    }
    fn task(vm: VmId, task: TaskId) -> Self {
        Self { vm: Some(vm), task: Some(task), ..Self::default() }
    }
}
