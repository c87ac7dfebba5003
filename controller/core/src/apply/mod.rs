//! The deterministic application of commands to the state.

mod members;
mod quarantine;
mod rules;
mod seal;
mod steps;
mod vms;

pub(crate) use steps::is_due;

use bellwether_types::{TaskId, VmId, VmRules};

use crate::command::{Change, Command, Outcome, Rejection};
use crate::state::{ENDED_TASKS_MAX, EVENTS_MAX, Event, Index, Level, State, Vm};

/// The result of one kind of command.
type Applied = Result<Outcome, Rejection>;

impl State {
    /// Applies one command. The same commands in the same order give the same state and outcomes
    /// on every controller; nothing else is read.
    pub fn apply(&mut self, command: Command) -> Outcome {
        let touched = command.change.vm(self);
        let task = touched.and_then(|id| self.unindex(id));
        let outcome = self.change(command).unwrap_or_else(Outcome::Rejected);
        if let Some(id) = touched {
            self.reindex(id, task);
        }
        debug_assert!(self.invariants().is_ok(), "{:?}", self.invariants());
        outcome
    }

    /// Takes out of the index what a VM adds, and says which task works on it.
    fn unindex(&mut self, id: VmId) -> Option<TaskId> {
        let mut index = std::mem::take(&mut self.index);
        let vm = self.vms.get(&id);
        if let Some(vm) = vm {
            index.take_out(vm, self);
        }
        let task = vm.and_then(|vm| vm.task);
        self.index = index;
        task
    }

    /// Puts in what it adds now; `before` is the task that worked on it.
    fn reindex(&mut self, id: VmId, before: Option<TaskId>) {
        let mut index = std::mem::take(&mut self.index);
        let vm = self.vms.get(&id);
        if let Some(vm) = vm {
            index.put_in(vm, self);
        }
        let tasks = [before, vm.and_then(|vm| vm.task)];
        for task in tasks.into_iter().flatten().filter_map(|id| self.tasks.get(&id)) {
            index.note_task(task);
        }
        self.index = index;
        self.trim_tasks();
    }

    fn change(&mut self, command: Command) -> Applied {
        let at = command.at;
        match command.change {
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
            Change::CreateVm { id, spec } => {
                self.create_vm(at, Vm::new(id, spec.into(), VmRules::default(), at))
            }
            Change::BeginTask(request) => self.begin_task(at, request, None),
            Change::Advance { task, step_no, event } => self.advance(at, task, step_no, event),
            Change::SetPaused { vm, paused } => self.set_paused(at, vm, paused),
            Change::DefineVm { id, spec, rules } => {
                self.create_vm(at, Vm::new(id, spec, rules, at))
            }
            Change::DefineVmUnder { id, spec, rules, arbiter } => {
                self.create_vm(at, Vm { arbiter, ..Vm::new(id, spec, rules, at) })
            }
            Change::SwitchedOff { node, boot_id, device } => {
                self.switched_off(at, node, boot_id, device)
            }
            Change::NoteWatchdog { node, said } => self.note_watchdog(at, node, said),
            Change::SetVm { vm, patch } => self.set_vm(at, vm, patch),
            Change::SetCluster { patch } => self.set_cluster(at, patch),
            Change::LiftQuarantine { node, by } => self.lift_quarantine(at, node, &by),
            Change::Begin { request, because } => self.begin_task(at, request, Some(because)),
            Change::Stays { vm, node, why } => self.stays(at, vm, node, &why),
        }
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
        match self.index == Index::of(self) {
            true => Ok(()),
            false => Err("the index is not that of the state".into()),
        }
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
        while let Some(oldest) = self.index.pop_ended(ENDED_TASKS_MAX) {
            self.tasks.remove(&oldest);
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
