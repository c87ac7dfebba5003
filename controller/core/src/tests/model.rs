//! A model of everything outside the core: agents, VMMs, the storage's locks, faults.
//!
//! It checks at every step what the core must never cause: two incarnations of a VM running, an
//! incarnation running without the locks, a state file resumed twice.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_types::{
    BootId, Epoch, FenceProof, MemberRole, NodeId, Ports, RestartPolicy, StateFileRef, TaskId,
    VmId, VmSpec, VmState,
};
use uuid::Uuid;

use crate::command::{Change, Command, Registration};
use crate::leading::Patience;
use crate::observe::{NodeReport, VmReport};
use crate::saga::{Action, next_action, timed_out};
use crate::state::{Member, Runner};
use crate::task::{Measures, Retry, TaskRequest};
use crate::{Attempt, Observed, Outcome, Place, State, StepEvent, TaskKind, Timing, reconcile};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Prepared,
    Locked,
    Loaded,
    Running,
    /// Its memory is being written; the guest stands, or is about to.
    Sealing,
    Sealed,
    Ended,
}

#[derive(Clone, Debug)]
pub struct Incarnation {
    pub phase: Phase,
    /// The state file that it was loaded from.
    from: Option<Epoch>,
    /// It was sealed before it ended, and its agent remembers the file.
    kept: bool,
    /// Which boot of the guest its memory comes from; 0 before it has any.
    pub memory: u64,
}

/// One host with its agent and its VMMs.
#[derive(Clone, Debug)]
pub struct Host {
    pub boot: BootId,
    pub up: bool,
    /// The agent process; VMMs outlive it.
    pub agent: bool,
    pub connected: bool,
    /// Its order port can be reached; without it the node renews and answers nothing.
    pub orders: bool,
    pub vmms: BTreeMap<(VmId, Epoch), Incarnation>,
    floors: BTreeMap<VmId, Epoch>,
}

/// How an order fares on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    Done,
    /// Carried out, and the answer is lost.
    AnswerLost,
    /// Never arrived.
    Lost,
    /// A seal has begun when the answer is lost; anything else is carried out without an answer.
    Slow,
    /// The agent could not do it.
    Refused,
}

pub struct Model {
    pub state: State,
    pub observed: Observed,
    pub hosts: BTreeMap<NodeId, Host>,
    /// Who holds the locks of each VM, and the epoch in its claim.
    locks: BTreeMap<VmId, (NodeId, Epoch)>,
    claims: BTreeMap<VmId, Epoch>,
    /// Whose sealed state the claim says was handed over.
    handovers: BTreeMap<VmId, Epoch>,
    /// State files by VM and sealing epoch, with their memory; and those from which a guest ran.
    files: BTreeMap<(VmId, Epoch), u64>,
    resumed: BTreeSet<(VmId, Epoch)>,
    /// The last epoch whose guest ran: what the disks belong to.
    ran: BTreeMap<VmId, Epoch>,
    patience: BTreeMap<TaskId, Patience>,
    waiting: BTreeMap<TaskId, Patience>,
    /// Seals that were ordered and are still on their way.
    late_seals: Vec<(VmId, NodeId, Epoch)>,
    pub now: u64,
    next_uuid: u128,
}

/// Why an order was not carried out.
enum Miss {
    Refused,
    Busy,
}

impl Model {
    pub fn new(nodes: u64) -> Self {
        let mut model = Self {
            state: State::default(),
            observed: Observed::default(),
            hosts: BTreeMap::new(),
            locks: BTreeMap::new(),
            claims: BTreeMap::new(),
            handovers: BTreeMap::new(),
            files: BTreeMap::new(),
            resumed: BTreeSet::new(),
            ran: BTreeMap::new(),
            patience: BTreeMap::new(),
            waiting: BTreeMap::new(),
            late_seals: Vec::new(),
            now: 1_000_000,
            next_uuid: 1,
        };
        let first =
            Member { id: 1, name: "n1".into(), address: "a".into(), ports: Ports::default() };
        let id = bellwether_types::ClusterId::from_uuid(model.uuid());
        model.apply(Change::InitCluster { id, name: "c".into(), storage: "/s".into(), first });
        for number in 1..=nodes {
            let hash = [u8::try_from(number).unwrap(); 32];
            let role = MemberRole::Agent;
            let name = format!("n{number}");
            model.apply(Change::CreateToken { hash, role, expires_at: u64::MAX });
            let (address, ports) = ("a".into(), Ports::default());
            let joined = model.apply(Change::RedeemToken { hash, role, name, address, ports });
            let Outcome::Member(id) = joined else { panic!("{joined:?}") };
            let boot = BootId::from_uuid(model.uuid());
            let host = Host {
                boot,
                up: true,
                agent: true,
                connected: true,
                orders: true,
                vmms: BTreeMap::new(),
                floors: BTreeMap::new(),
            };
            model.hosts.insert(NodeId(id), host);
            model.register(NodeId(id));
        }
        model
    }

    fn uuid(&mut self) -> Uuid {
        self.next_uuid += 1;
        Uuid::from_u128(self.next_uuid)
    }

    pub fn apply(&mut self, change: Change) -> Outcome {
        let outcome = self.state.apply(Command { at: self.now, change });
        self.state.invariants().unwrap();
        outcome
    }

    pub fn create(&mut self, name: &str) -> VmId {
        self.create_of(name, 256, 1)
    }

    pub fn create_of(&mut self, name: &str, memory_mib: u64, vcpus: u32) -> VmId {
        let id = VmId::from_uuid(self.uuid());
        let spec = VmSpec {
            name: name.into(),
            vcpus,
            memory_mib,
            kernel: "/k".into(),
            initrd: None,
            nics: vec![],
            cmdline: String::new(),
            disks: vec![],
            possible_owners: BTreeSet::new(),
            priority: 0,
            restart: RestartPolicy::Restart,
        };
        assert_eq!(
            self.apply(Change::DefineVm { id, spec, rules: Default::default() }),
            Outcome::Done
        );
        id
    }

    pub fn begin(&mut self, vm: VmId, kind: TaskKind) -> Outcome {
        self.apply(Change::BeginTask(TaskRequest { vm, kind, node: None, by: "admin".into() }))
    }

    pub fn register(&mut self, node: NodeId) {
        let boot_id = self.hosts[&node].boot;
        let registered = self.apply(Change::RegisterNode(Registration {
            node,
            name: format!("n{node}"),
            boot_id,
            address: "a".into(),
            agent_port: 1,
            memory_mib: 4_096,
            vcpus: 8,
            version: "0".into(),
            replaces: self.state.nodes[&node].boot_id,
        }));
        if registered == Outcome::Done {
            self.report(node);
        }
    }

    /// What the node's agent says now, if anybody hears it.
    pub fn report(&mut self, node: NodeId) {
        let host = &self.hosts[&node];
        if !(host.up && host.agent && host.connected) {
            return;
        }
        let known = self.state.nodes[&node].boot_id == Some(host.boot);
        if !known || matches!(self.state.nodes[&node].liveness, crate::Liveness::Fenced { .. }) {
            return self.register(node);
        }
        if !self.state.nodes[&node].is_online() {
            let boot_id = host.boot;
            self.apply(Change::NodeOnline { node, boot_id });
        }
        let host = &self.hosts[&node];
        let vms = host.vmms.iter().map(|((vm, epoch), vmm)| VmReport {
            vm: *vm,
            epoch: *epoch,
            state: match vmm.phase {
                Phase::Prepared | Phase::Locked => VmState::Starting,
                Phase::Loaded => VmState::Restoring,
                Phase::Running => VmState::Running,
                Phase::Sealing => VmState::Saving,
                Phase::Sealed => VmState::Saved,
                Phase::Ended if vmm.kept => VmState::Saved,
                Phase::Ended => VmState::Failed,
            },
            reason: "killed".into(),
            memory_loaded_bytes: 0,
            memory_total_bytes: 0,
        });
        let (boot_id, vms) = (host.boot, vms.collect());
        let report = NodeReport { boot_id, heard_at: self.now, nonce: self.now, vms };
        self.observed.take(node, report, &self.state);
    }

    /// One round of the leader's planner.
    pub fn plan(&mut self) {
        for change in reconcile::plan(&self.state, &self.observed, &Timing::default(), 0, self.now)
        {
            self.apply(change);
        }
        for stray in reconcile::strays(&self.state, &self.observed) {
            let attempt = Attempt { node: stray.node, epoch: stray.epoch };
            if self.reachable(stray.node) {
                self.release(stray.vm, attempt);
                self.report(stray.node);
            }
        }
    }

    fn reachable(&self, node: NodeId) -> bool {
        let reachable = |host: &Host| host.up && host.agent && host.connected && host.orders;
        self.hosts.get(&node).is_some_and(reachable)
    }

    /// One step of one task, whose order meets this fate. Returns whether the task moved.
    pub fn step(&mut self, id: TaskId, fate: Fate) -> bool {
        let Some(task) = self.state.tasks.get(&id).filter(|task| task.outcome.is_none()) else {
            return false;
        };
        let (vm, step_no) = (task.vm, task.step_no);
        let action = next_action(&self.state, &self.observed, task, self.now);
        let event = match action {
            Action::Wait { .. } => {
                let waited_ms = self.waiting.entry(id).or_default().waited_ms(step_no, self.now);
                let Some(event) = timed_out(&self.state, task, waited_ms) else { return false };
                Some(event)
            }
            Action::Advance(event) => Some(event),
            action => self.order(vm, action, fate).or_else(|| self.lose_patience(id)),
        };
        let moved = event.is_some();
        if let Some(event) = event {
            self.apply(Change::Advance { task: id, step_no, event });
        }
        self.check();
        moved
    }

    /// What the executor makes of an order without an answer.
    fn lose_patience(&mut self, id: TaskId) -> Option<StepEvent> {
        let (patience, task) = (self.patience.entry(id).or_default(), &self.state.tasks[&id]);
        patience.unanswered(&self.state, task, "no answer".into(), self.now)
    }

    fn order(&mut self, vm: VmId, action: Action, fate: Fate) -> Option<StepEvent> {
        let (node, is_abandon) = match &action {
            Action::Abandon(attempt) => (attempt.node, true),
            Action::Prepare(attempt)
            | Action::TakeOver(attempt)
            | Action::Release(attempt)
            | Action::Activate { attempt, .. }
            | Action::Load { attempt, .. } => (attempt.node, false),
            Action::ClaimBack { source, .. } => (source.node, false),
            Action::Seal { source, .. }
            | Action::PreCopy { source, .. }
            | Action::AskGuest(source) => (source.node, false),
            Action::Purge(node) => (*node, false),
            Action::Wait { .. } | Action::Advance(_) => return None,
        };
        let failed = StepEvent::Failed { error: "no".into(), retry: Retry::OtherNode };
        if let (Action::Seal { source, .. }, Fate::Lost) = (&action, fate) {
            self.late_seals.push((vm, source.node, source.epoch));
        }
        if fate == Fate::Lost || !self.reachable(node) {
            return is_abandon.then_some(failed);
        }
        if fate == Fate::Refused && self.may_refuse(vm, &action) {
            return Some(failed);
        }
        if let (Action::Seal { source, .. }, Fate::Slow) = (&action, fate) {
            self.begin_seal(vm, source.node, source.epoch);
            return None;
        }
        let result = self.carry_out(vm, action);
        if matches!(fate, Fate::AnswerLost | Fate::Slow) {
            return is_abandon.then_some(failed);
        }
        Some(result.unwrap_or_else(|miss| match miss {
            Miss::Refused => failed,
            Miss::Busy => StepEvent::Busy { holder: "old".into() },
        }))
    }

    /// An agent says that a guest has not run only if it has not; a release is never refused.
    fn may_refuse(&self, vm: VmId, action: &Action) -> bool {
        let not_run = |at: &Attempt, epoch: Epoch| {
            let vmm = self.hosts[&at.node].vmms.get(&(vm, epoch));
            vmm.is_some_and(|vmm| !matches!(vmm.phase, Phase::Running | Phase::Ended))
        };
        match action {
            Action::Activate { attempt, .. } => not_run(attempt, attempt.epoch),
            Action::ClaimBack { source, sealed, .. } => not_run(source, *sealed),
            Action::Release(_) | Action::Abandon(_) | Action::Purge(_) => false,
            _ => true,
        }
    }

    fn carry_out(&mut self, vm: VmId, action: Action) -> Result<StepEvent, Miss> {
        match action {
            Action::Prepare(attempt) => self.prepare(vm, attempt),
            Action::TakeOver(attempt) => match self.lock(vm, attempt) {
                true => Ok(match self.handovers.get(&vm) {
                    Some(epoch) => StepEvent::HeldWithState { file: file_of(*epoch) },
                    None => StepEvent::Held,
                }),
                false => Err(Miss::Busy),
            },
            Action::PreCopy { source, load_at } => self.pre_copy(vm, &source, load_at),
            Action::Seal { source, .. } => self.seal(vm, source.node, source.epoch),
            Action::Load { attempt, file } => self.load(vm, attempt, &file),
            Action::Activate { attempt, release, .. } => {
                if let Some(source) = release.filter(|source| self.reachable(source.node)) {
                    self.release(vm, Attempt { node: source.node, epoch: source.epoch });
                }
                self.activate(vm, attempt)
            }
            Action::ClaimBack { source, sealed, .. } => self.claim_back(vm, source, sealed),
            Action::Abandon(attempt) | Action::Release(attempt) => Ok(self.release(vm, attempt)),
            Action::AskGuest(runner) => {
                self.end_guest(runner.node, vm, runner.epoch);
                self.report(runner.node);
                Ok(StepEvent::Asked { until: self.now + 1_000 })
            }
            Action::Purge(_) => Ok(StepEvent::Purged),
            Action::Wait { .. } | Action::Advance(_) => Err(Miss::Refused),
        }
    }

    fn host(&mut self, node: NodeId) -> &mut Host {
        self.hosts.get_mut(&node).unwrap()
    }

    fn prepare(&mut self, vm: VmId, attempt: Attempt) -> Result<StepEvent, Miss> {
        let host = self.host(attempt.node);
        if host.floors.get(&vm).is_some_and(|floor| attempt.epoch <= *floor) {
            return Err(Miss::Refused);
        }
        let new = Incarnation { phase: Phase::Prepared, from: None, kept: false, memory: 0 };
        host.vmms.entry((vm, attempt.epoch)).or_insert(new);
        Ok(StepEvent::Prepared)
    }

    /// The guest runs on, and a destination that is gone is noticed.
    fn pre_copy(
        &mut self,
        vm: VmId,
        source: &Runner,
        load_at: Option<Attempt>,
    ) -> Result<StepEvent, Miss> {
        let phase = |this: &Self, node: NodeId, epoch: Epoch| {
            this.hosts[&node].vmms.get(&(vm, epoch)).map(|vmm| vmm.phase)
        };
        let runs = phase(self, source.node, source.epoch) == Some(Phase::Running);
        let prepared = load_at.is_none_or(|attempt| {
            self.reachable(attempt.node)
                && phase(self, attempt.node, attempt.epoch) == Some(Phase::Prepared)
        });
        match runs && prepared {
            true => Ok(StepEvent::PreCopied { measures: Measures::new() }),
            false => Err(Miss::Refused),
        }
    }

    /// Takes claim and locks, as the storage allows.
    fn lock(&mut self, vm: VmId, attempt: Attempt) -> bool {
        let free = self.locks.get(&vm).is_none_or(|held| *held == (attempt.node, attempt.epoch));
        let newer = self.claims.get(&vm).is_some_and(|epoch| *epoch > attempt.epoch);
        let Some(vmm) = self.host(attempt.node).vmms.get_mut(&(vm, attempt.epoch)) else {
            return false;
        };
        if !free || newer || vmm.phase == Phase::Ended {
            return false;
        }
        if vmm.phase == Phase::Prepared {
            vmm.phase = Phase::Locked;
        }
        self.locks.insert(vm, (attempt.node, attempt.epoch));
        self.claims.insert(vm, attempt.epoch);
        true
    }

    fn load(&mut self, vm: VmId, attempt: Attempt, file: &StateFileRef) -> Result<StepEvent, Miss> {
        let memory = self.files.get(&(vm, file.epoch)).copied();
        let vmm = self.host(attempt.node).vmms.get_mut(&(vm, attempt.epoch));
        let vmm =
            vmm.filter(|vmm| matches!(vmm.phase, Phase::Prepared | Phase::Locked | Phase::Loaded));
        let (vmm, memory) = vmm.zip(memory).ok_or(Miss::Refused)?;
        (vmm.phase, vmm.from, vmm.memory) = (Phase::Loaded, Some(file.epoch), memory);
        Ok(StepEvent::Loaded { measures: Measures::new() })
    }

    fn activate(&mut self, vm: VmId, attempt: Attempt) -> Result<StepEvent, Miss> {
        let done = Ok(StepEvent::Activated { measures: Measures::new() });
        let key = (vm, attempt.epoch);
        let vmm = self.host(attempt.node).vmms.get(&key).cloned();
        match vmm {
            Some(vmm) if vmm.phase == Phase::Running => return done,
            // Whether it ran before it ended is not known.
            None => return Ok(StepEvent::TimedOut),
            Some(vmm) if vmm.phase == Phase::Ended => return Ok(StepEvent::TimedOut),
            Some(_) => {}
        }
        if !self.lock(vm, attempt) {
            return Err(Miss::Refused);
        }
        self.handovers.remove(&vm);
        let boot = u64::try_from(self.uuid().as_u128()).unwrap();
        let vmm = self.host(attempt.node).vmms.get_mut(&key).unwrap();
        vmm.phase = Phase::Running;
        match vmm.from {
            Some(file) => {
                assert!(self.resumed.insert((vm, file)), "a state file was resumed twice");
                assert_eq!(
                    self.ran.get(&vm),
                    Some(&file),
                    "the disks have moved on since the seal"
                );
                self.files.remove(&(vm, file));
            }
            None => vmm.memory = boot,
        }
        self.ran.insert(vm, attempt.epoch);
        self.check();
        done
    }

    /// Stops the guest, unless it has another epoch by now.
    fn begin_seal(&mut self, vm: VmId, node: NodeId, epoch: Epoch) {
        let vmm = self.host(node).vmms.get_mut(&(vm, epoch));
        if let Some(vmm) = vmm.filter(|vmm| vmm.phase == Phase::Running) {
            vmm.phase = Phase::Sealing;
        }
    }

    /// Asked again it answers as before, also for a VMM that was sealed and has ended since.
    fn seal(&mut self, vm: VmId, node: NodeId, epoch: Epoch) -> Result<StepEvent, Miss> {
        self.begin_seal(vm, node, epoch);
        self.end_seal(node, vm, epoch, true);
        let vmm = self.host(node).vmms.get(&(vm, epoch)).ok_or(Miss::Refused)?;
        if vmm.phase != Phase::Sealed && !vmm.kept {
            return Err(Miss::Refused);
        }
        Ok(StepEvent::Sealed { file: file_of(epoch), measures: Measures::new() })
    }

    /// A seal that is under way succeeds, or fails and the guest goes on.
    pub fn end_seal(&mut self, node: NodeId, vm: VmId, epoch: Epoch, good: bool) {
        let vmm = self.host(node).vmms.get_mut(&(vm, epoch));
        let Some(vmm) = vmm.filter(|vmm| vmm.phase == Phase::Sealing) else { return };
        vmm.phase = if good { Phase::Sealed } else { Phase::Running };
        let memory = vmm.memory;
        if good {
            self.files.insert((vm, epoch), memory);
        }
        self.check();
    }

    /// A node that is cut off seals a VM, records it in the claim, and lets its VMM end.
    pub fn hand_over(&mut self, node: NodeId, vm: VmId, epoch: Epoch) {
        assert!(self.seal(vm, node, epoch).is_ok());
        self.handovers.insert(vm, epoch);
        self.kill_vmm(node, vm, epoch);
    }

    /// A seal order that was held up arrives after all, whatever has become of its task.
    pub fn deliver_late_seal(&mut self) {
        let Some((vm, node, epoch)) = self.late_seals.pop() else { return };
        if self.hosts[&node].up && self.hosts[&node].agent {
            self.begin_seal(vm, node, epoch);
        }
    }

    fn claim_back(&mut self, vm: VmId, source: Attempt, sealed: Epoch) -> Result<StepEvent, Miss> {
        let done = Ok(StepEvent::ClaimedBack { measures: Measures::new() });
        let host = self.host(source.node);
        if host.vmms.get(&(vm, source.epoch)).is_some_and(|vmm| vmm.phase == Phase::Running) {
            return done;
        }
        match host.vmms.remove(&(vm, sealed)) {
            Some(vmm) if vmm.phase == Phase::Sealed => {
                let back = Incarnation { phase: Phase::Running, ..vmm };
                host.vmms.insert((vm, source.epoch), back);
                assert!(self.resumed.insert((vm, sealed)), "a state file was resumed twice");
                assert_eq!(self.ran.insert(vm, source.epoch), Some(sealed), "not the last to run");
                self.locks.insert(vm, (source.node, source.epoch));
                self.claims.insert(vm, source.epoch);
                self.files.remove(&(vm, sealed));
                self.check();
                done
            }
            Some(vmm) => {
                host.vmms.insert((vm, sealed), vmm);
                Err(Miss::Refused)
            }
            // Whether it went on before it ended is not known.
            None => Ok(StepEvent::TimedOut),
        }
    }

    fn release(&mut self, vm: VmId, attempt: Attempt) -> StepEvent {
        let node = attempt.node;
        let host = self.host(node);
        let floor = host.floors.entry(vm).or_insert(attempt.epoch);
        *floor = (*floor).max(attempt.epoch);
        host.vmms.retain(|(of, epoch), _| *of != vm || *epoch > attempt.epoch);
        let boot_id = host.boot;
        if self.locks.get(&vm).is_some_and(|(at, e)| *at == node && *e <= attempt.epoch) {
            self.locks.remove(&vm);
        }
        StepEvent::Released {
            proof: FenceProof::Released { node, boot_id },
            reason: "stopped".into(),
        }
    }

    /// The VMM process dies: its locks go with it.
    pub fn kill_vmm(&mut self, node: NodeId, vm: VmId, epoch: Epoch) {
        if let Some(vmm) = self.host(node).vmms.get_mut(&(vm, epoch)) {
            vmm.kept |= vmm.phase == Phase::Sealed;
            vmm.phase = Phase::Ended;
        }
        if self.locks.get(&vm) == Some(&(node, epoch)) {
            self.locks.remove(&vm);
        }
    }

    fn end_guest(&mut self, node: NodeId, vm: VmId, epoch: Epoch) {
        self.kill_vmm(node, vm, epoch);
    }

    pub fn power_off(&mut self, node: NodeId) {
        let host = self.host(node);
        host.up = false;
        host.vmms.clear();
        host.floors.clear();
        self.locks.retain(|_, (holder, _)| *holder != node);
    }

    pub fn power_on(&mut self, node: NodeId) {
        let boot = BootId::from_uuid(self.uuid());
        let host = self.host(node);
        if !host.up {
            (host.up, host.agent, host.boot) = (true, true, boot);
        }
    }

    /// Which boot of the guest the running incarnation has the memory of.
    pub fn memory(&self, vm: VmId) -> Option<u64> {
        let (node, epoch) = self.running(vm).first().copied()?;
        Some(self.hosts[&node].vmms[&(vm, epoch)].memory)
    }

    /// The incarnations of a VM whose guest runs, anywhere.
    pub fn running(&self, vm: VmId) -> Vec<(NodeId, Epoch)> {
        let of_host = |(node, host): (&NodeId, &Host)| {
            let node = *node;
            let runs = host.vmms.iter().filter(|(_, vmm)| vmm.phase == Phase::Running);
            runs.map(|((vm, epoch), _)| (*vm, node, *epoch)).collect::<Vec<_>>()
        };
        let all = self.hosts.iter().flat_map(of_host);
        all.filter(|(of, ..)| *of == vm).map(|(_, node, epoch)| (node, epoch)).collect()
    }

    /// What must hold at every moment.
    pub fn check(&self) {
        for vm in self.state.vms.keys() {
            let running = self.running(*vm);
            assert!(running.len() <= 1, "VM {vm} runs twice: {running:?}");
            for at in running {
                assert_eq!(self.locks.get(vm), Some(&at), "VM {vm} runs without its locks");
            }
        }
    }

    /// Lets everything go well until nothing is left to do.
    pub fn settle(&mut self, rounds: usize) {
        for _ in 0..rounds {
            self.now += 250;
            let nodes: Vec<NodeId> = self.hosts.keys().copied().collect();
            nodes.iter().for_each(|node| self.report(*node));
            self.plan();
            let tasks: Vec<TaskId> = self.state.active_tasks().map(|task| task.id).collect();
            for task in tasks {
                while self.step(task, Fate::Done) {}
            }
        }
    }

    pub fn place(&self, vm: VmId) -> &Place {
        &self.state.vms[&vm].place
    }
}

fn file_of(epoch: Epoch) -> StateFileRef {
    StateFileRef { path: "/s/f".into(), hash: [0; 32], epoch, bytes: 1 }
}
