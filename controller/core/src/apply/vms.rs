//! Commands about VMs, and the beginning of tasks.

use bellwether_types::{Arbiter, TaskId, VmId, VmSpec};

use super::{About, Applied};
use crate::command::{Outcome, Rejection, RejectionKind};
use crate::state::{Desired, Level, Place, Runner, State, Vm};
use crate::task::{Measures, Step, Task, TaskKind, TaskRequest};

/// Why a task cannot begin, or that nothing is to be done.
enum Refusal {
    Nothing,
    Because(String),
}

impl State {
    pub(super) fn create_vm(&mut self, at: u64, vm: Vm) -> Applied {
        let Vm { id, spec, rules, .. } = &vm;
        let id = *id;
        spec.validate().map_err(|error| Rejection::invalid(error.to_string()))?;
        if self.index.named(&spec.name).is_some() || self.vms.contains_key(&id) {
            let text = format!("there is a VM named {} already", spec.name);
            return Err(Rejection::new(RejectionKind::AlreadyExists, text));
        }
        self.check_fits_somewhere(spec)?;
        self.check_disks_free(spec)?;
        self.check_rules(id, &spec.name, rules)?;
        let text = match vm.arbiter {
            Arbiter::Storage => format!("VM {} was created", spec.name),
            Arbiter::Lease => format!("VM {} was created, under the lease arbiter", spec.name),
        };
        self.vms.insert(id, vm);
        self.event(at, Level::Info, About::vm(id), text);
        Ok(Outcome::Done)
    }

    fn check_fits_somewhere(&self, spec: &VmSpec) -> Result<(), Rejection> {
        self.check_nodes_known(&spec.name, &spec.possible_owners)?;
        let owner = |id| spec.possible_owners.is_empty() || spec.possible_owners.contains(id);
        let known = self.nodes.iter().filter(|(id, node)| owner(id) && node.boot_id.is_some());
        let largest = known.clone().map(|(_, node)| node.memory_mib).max();
        if let Some(largest) = largest.filter(|largest| *largest < spec.memory_mib) {
            return Err(Rejection::invalid(format!(
                "VM {}: {} MiB of memory; the largest node that may own it has {largest} MiB",
                spec.name, spec.memory_mib
            )));
        }
        let most = known.map(|(_, node)| node.vcpus).max();
        match most.filter(|most| *most < spec.vcpus) {
            Some(most) => Err(Rejection::invalid(format!(
                "VM {}: {} vCPUs; the largest node that may own it has {most}",
                spec.name, spec.vcpus
            ))),
            None => Ok(()),
        }
    }

    fn check_disks_free(&self, spec: &VmSpec) -> Result<(), Rejection> {
        for disk in &spec.disks {
            let shared =
                |other: &&Vm| {
                    other.spec.disks.iter().any(|theirs| {
                        theirs.path == disk.path && !(theirs.read_only && disk.read_only)
                    })
                };
            let users = self.index.users_of(&disk.path).filter_map(|id| self.vms.get(&id));
            if let Some(other) = users.into_iter().find(shared) {
                return Err(Rejection::conflict(format!(
                    "VM {}: the disk {} belongs to VM {}; two VMs may share a disk only if both \
                     have it read-only",
                    spec.name,
                    disk.path.display(),
                    other.spec.name
                )));
            }
        }
        Ok(())
    }

    pub(super) fn set_paused(&mut self, at: u64, id: VmId, paused: bool) -> Applied {
        let Some(vm) = self.vms.get_mut(&id) else {
            return Err(Rejection::not_found(format!("there is no VM {id}")));
        };
        let name = vm.spec.name.clone();
        if vm.place.runner().is_none() {
            return Err(Rejection::conflict(format!("VM {name} is not running")));
        }
        if let Some(task) = vm.task {
            return Err(busy(&name, task, self.tasks.get(&task)));
        }
        if vm.paused == paused {
            return Ok(Outcome::Unchanged);
        }
        vm.paused = paused;
        let word = if paused { "paused" } else { "resumed" };
        self.event(at, Level::Info, About::vm(id), format!("VM {name} is {word}"));
        Ok(Outcome::Done)
    }

    pub(super) fn begin_task(
        &mut self,
        at: u64,
        request: TaskRequest,
        because: Option<String>,
    ) -> Applied {
        if !self.vms.contains_key(&request.vm) {
            return Err(Rejection::not_found(format!("there is no VM {}", request.vm)));
        }
        // What is refused calls nothing off.
        if request.kind == TaskKind::Delete {
            self.check_begin(&request)?;
        }
        if let Some(outcome) = self.call_off(at, &request)? {
            return Ok(outcome);
        }
        let Some(vm) = self.vms.get(&request.vm) else {
            return Ok(Outcome::Unchanged);
        };
        if let Some(node) = request.node.filter(|node| !self.nodes.contains_key(node)) {
            return Err(Rejection::not_found(format!("there is no node {node}")));
        }
        let step = match first_step(self, vm, &request) {
            Ok(step) => step,
            Err(Refusal::Nothing) => return Ok(Outcome::Unchanged),
            Err(Refusal::Because(text)) => return Err(Rejection::conflict(text)),
        };
        self.check_begin(&request)?;
        Ok(Outcome::Task(self.insert_task(at, request, step, because)))
    }

    /// A task that only waits for a node or a proof gives way to a stop or a delete; any other one
    /// is waited for. Returns what is left to say, or that the new task may begin.
    fn call_off(&mut self, at: u64, request: &TaskRequest) -> Result<Option<Outcome>, Rejection> {
        let Some(vm) = self.vms.get_mut(&request.vm) else {
            return Ok(None);
        };
        let Some(id) = vm.task else {
            return Ok(None);
        };
        let name = vm.spec.name.clone();
        let ends_it = matches!(request.kind, TaskKind::Stop | TaskKind::Delete);
        // A stop of a VM whose runner is lost needs no pause of the failover: whatever that has under
        // way only leads to the proof.
        let lost = matches!(vm.place, Place::Revoked(_)) && request.kind == TaskKind::Stop;
        let gives_way = |task: &&mut Task| ends_it && (task.is_waiting() || lost);
        let Some(task) = self.tasks.get_mut(&id).filter(gives_way) else {
            return Err(busy(&name, id, self.tasks.get(&id)));
        };
        // A delete of a VM that runs would be refused afterwards, so it calls nothing off.
        if request.kind == TaskKind::Delete && vm.place.runner().is_some() {
            return Err(busy(&name, id, self.tasks.get(&id)));
        }
        if let (Place::Revoked(old), TaskKind::Delete) = (&vm.place, request.kind) {
            return Err(Rejection::conflict(format!(
                "VM {name}: its old runner, on node {}, is not proven gone yet. Stop it first with \
                 `bell vm stop {name}`; delete it when it is stopped",
                old.node
            )));
        }
        vm.desired = Desired::Stopped;
        if matches!(vm.place, Place::Revoked(_)) {
            // The old runner still has to be proven gone: that goes on, and nothing starts after it.
            return Ok(Some(Outcome::Task(id)));
        }
        if matches!(vm.place, Place::Sealed { .. }) {
            vm.desired = Desired::Saved;
        }
        let text = format!("called off by {}", request.by);
        task.say(at, &text);
        task.outcome = Some(Err(text));
        task.ended_at = at;
        (vm.task, vm.pending) = (None, None);
        Ok((request.kind == TaskKind::Stop).then_some(Outcome::Unchanged))
    }

    fn insert_task(
        &mut self,
        at: u64,
        request: TaskRequest,
        step: Step,
        because: Option<String>,
    ) -> TaskId {
        let id = TaskId(self.next_task);
        self.next_task += 1;
        let Some(vm) = self.vms.get_mut(&request.vm) else {
            return id;
        };
        vm.task = Some(id);
        let since = std::mem::replace(&mut vm.changed_at, at);
        super::rules::person_takes_over(vm, &request);
        match request.kind {
            TaskKind::Start | TaskKind::Restore => vm.desired = Desired::Running,
            TaskKind::Stop => vm.desired = Desired::Stopped,
            _ => {}
        }
        // Revocation: from this commit on the lost runner is granted nothing.
        if let (TaskKind::Failover, Place::Runner(runner)) = (request.kind, &vm.place) {
            vm.place = Place::Revoked(runner.clone());
        }
        let source = match &vm.place {
            Place::Runner(runner) | Place::Revoked(runner) => Some(runner.node),
            _ => None,
        };
        let vm_name = vm.spec.name.clone();
        let kind = request.kind.as_str();
        let text = match because {
            None => format!("{kind} of VM {vm_name} begins, asked for by {}", request.by),
            Some(because) => format!("{kind} of VM {vm_name} begins: {because}"),
        };
        let mut task = Task {
            id,
            kind: request.kind,
            vm: request.vm,
            vm_name,
            by: request.by,
            step,
            step_no: 1,
            retry_at: 0,
            wanted: request.node,
            tried: Default::default(),
            failures: 0,
            source,
            destination: None,
            proof: None,
            outcome: None,
            since,
            created_at: at,
            ended_at: 0,
            measures: Measures::new(),
            log: Vec::new(),
        };
        task.say(at, &text);
        self.tasks.insert(id, task);
        self.event(at, Level::Info, About::task(request.vm, id), text);
        id
    }
}

fn busy(vm: &str, id: TaskId, task: Option<&Task>) -> Rejection {
    let kind = task.map_or("a task", |task| task.kind.as_str());
    Rejection::conflict(format!(
        "VM {vm}: task {id} ({kind}) is working on it; wait for it with `bell task show {id}`"
    ))
}

/// Where a task of this kind begins, given where the VM is.
fn first_step(state: &State, vm: &Vm, request: &TaskRequest) -> Result<Step, Refusal> {
    let name = &vm.spec.name;
    let because = |text: String| Err(Refusal::Because(text));
    match (request.kind, &vm.place) {
        (TaskKind::Start, Place::Stopped) => Ok(Step::Choose),
        (TaskKind::Start, Place::Runner(_)) => Err(Refusal::Nothing),
        (TaskKind::Start, Place::Sealed { .. }) => {
            because(format!("VM {name} is saved; continue it with `bell vm restore {name}`"))
        }
        (TaskKind::Restore, Place::Sealed { .. }) => Ok(Step::Choose),
        (TaskKind::Restore, Place::Runner(_)) => Err(Refusal::Nothing),
        (TaskKind::Restore, _) => because(format!("VM {name} is not saved")),
        (TaskKind::Stop, Place::Stopped) => Err(Refusal::Nothing),
        (TaskKind::Stop, Place::Sealed { .. }) => because(format!(
            "VM {name} is saved and runs nowhere; restore it, or delete it with its saved state"
        )),
        (TaskKind::Stop | TaskKind::Settle, Place::Runner(runner)) => {
            Ok(Step::Release(runner.clone()))
        }
        (TaskKind::Shutdown, Place::Runner(_)) if vm.paused => because(paused(name, "shut down")),
        (TaskKind::Shutdown, Place::Runner(_)) => Ok(Step::AskGuest),
        (TaskKind::Migrate, Place::Runner(runner)) => migration(state, vm, runner, request),
        (TaskKind::Save, Place::Runner(_)) if vm.paused => because(paused(name, "saved")),
        (TaskKind::Save, Place::Runner(_)) => Ok(crate::saga::stop_for(vm, None)),
        (TaskKind::Save, Place::Sealed { .. }) => Err(Refusal::Nothing),
        (TaskKind::Failover, Place::Runner(_) | Place::Revoked(_)) => Ok(Step::Choose),
        (TaskKind::Delete, Place::Stopped | Place::Sealed { .. }) => Ok(Step::Choose),
        (TaskKind::Delete, _) => {
            because(format!("VM {name} is running; stop it first with `bell vm stop {name}`"))
        }
        (kind, _) => {
            because(format!("VM {name} is not running; {} needs it to run", kind.as_str()))
        }
    }
}

fn paused(name: &str, done: &str) -> String {
    format!(
        "VM {name} is paused and cannot be {done}; resume it first with `bell vm resume {name}`"
    )
}

fn migration(
    state: &State,
    vm: &Vm,
    runner: &Runner,
    request: &TaskRequest,
) -> Result<Step, Refusal> {
    let name = &vm.spec.name;
    if vm.paused {
        return Err(Refusal::Because(paused(name, "moved")));
    }
    match request.node {
        Some(node) if node == runner.node => {
            Err(Refusal::Because(format!("VM {name} runs on {} already", state.node_name(node))))
        }
        _ => Ok(Step::Choose),
    }
}
