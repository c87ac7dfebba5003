//! A copy of the state that lives on in virtual time.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_types::{FenceProof, NodeId, PreCopy, StateFileRef, TaskId, VmId, VmState};

use super::{Move, Pace, Scenario};
use crate::apply::is_due;
use crate::command::{Change, Command, Outcome};
use crate::config::Timing;
use crate::observe::{NodeReport, Observed, VmReport};
use crate::reconcile;
use crate::saga::{Action, next_action};
use crate::state::{Desired, Place, State, Vm};
use crate::task::{Measures, StepEvent, Task, TaskKind, TaskRequest};

/// So far a forecast looks: an hour.
const HORIZON_MS: u64 = 3_600_000;
/// So many moments are looked at at most.
const MOMENTS_MAX: usize = 200_000;

/// An order under way, and what comes of it; none while its node cannot answer.
struct Order {
    step_no: u32,
    node: NodeId,
    answer: Option<(u64, StepEvent)>,
}

pub(super) struct Run<'a> {
    pub state: State,
    observed: Observed,
    timing: &'a Timing,
    pace: &'a Pace,
    start: u64,
    now: u64,
    pub last_change: u64,
    /// Nodes that do not answer.
    dead: BTreeSet<NodeId>,
    orders: BTreeMap<TaskId, Order>,
    /// When the guest of a task's VM was stopped.
    stopped: BTreeMap<TaskId, u64>,
    /// Nodes whose next report differs from the last one.
    stale: BTreeSet<NodeId>,
    pub moves: Vec<Move>,
}

impl<'a> Run<'a> {
    pub fn new(state: &State, timing: &'a Timing, pace: &'a Pace, now: u64) -> Self {
        let away = state.nodes.values().filter(|node| !node.is_online()).map(|node| node.id);
        Self {
            observed: Observed::default(),
            timing,
            pace,
            start: now,
            now,
            last_change: now,
            dead: away.collect(),
            orders: BTreeMap::new(),
            stopped: BTreeMap::new(),
            stale: state.nodes.keys().copied().collect(),
            moves: Vec::new(),
            state: state.clone(),
        }
    }

    /// Lets the scenario happen, or says why the cluster would refuse it.
    pub fn begin(&mut self, scenario: Scenario) -> Result<(), String> {
        self.report();
        match scenario {
            Scenario::NodesDown(nodes) => self.dead.extend(nodes),
            Scenario::Drain(nodes) => {
                for node in nodes {
                    self.accept(Change::Cordon { node, cordoned: true })?;
                }
            }
            Scenario::AddVm(new) => {
                let (spec, rules) = *new;
                let vm = VmId::MIN;
                self.accept(Change::DefineVm { id: vm, spec, rules })?;
                let kind = TaskKind::Start;
                let by = "what-if".into();
                self.accept(Change::BeginTask(TaskRequest { vm, kind, node: None, by }))?;
            }
        }
        Ok(())
    }

    fn accept(&mut self, change: Change) -> Result<(), String> {
        match self.apply(change) {
            Outcome::Rejected(rejection) => Err(rejection.text),
            _ => Ok(()),
        }
    }

    fn apply(&mut self, change: Change) -> Outcome {
        let outcome = self.state.apply(Command { at: self.now, change });
        if outcome != Outcome::Unchanged {
            self.last_change = self.now;
        }
        outcome
    }

    /// Until nothing is left to do; false when that would be too long.
    pub fn play_out(&mut self) -> bool {
        for _ in 0..MOMENTS_MAX {
            self.report();
            let planned = self.plan();
            let answered = self.take_answers();
            let stepped = self.step_tasks();
            if planned || answered || stepped {
                continue;
            }
            match self.next_moment() {
                None => return true,
                Some(next) if next > self.start + HORIZON_MS => return false,
                Some(next) => self.now = next,
            }
        }
        false
    }

    /// What the agents of all nodes that are up say now.
    fn report(&mut self) {
        let stale = std::mem::take(&mut self.stale);
        for (id, node) in &self.state.nodes {
            let Some(boot_id) = node.boot_id.filter(|_| !self.dead.contains(id)) else { continue };
            let (heard_at, nonce) = (self.now, self.now);
            let known = self.observed.nodes.get_mut(id).filter(|_| !stale.contains(id));
            match known {
                Some(report) => (report.heard_at, report.nonce) = (heard_at, nonce),
                None => {
                    let vms = self.state.vms_of(*id).filter_map(running).collect();
                    let report = NodeReport { boot_id, heard_at, nonce, vms };
                    self.observed.nodes.insert(*id, report);
                }
            }
        }
    }

    fn plan(&mut self) -> bool {
        let changes =
            reconcile::plan(&self.state, &self.observed, self.timing, self.start, self.now);
        let mut changed = false;
        for change in changes {
            changed |= self.apply(change) != Outcome::Unchanged;
        }
        changed
    }

    fn take_answers(&mut self) -> bool {
        let due = |order: &Order| order.answer.as_ref().is_some_and(|(at, _)| *at <= self.now);
        let ready: Vec<TaskId> =
            self.orders.iter().filter(|(_, order)| due(order)).map(|(id, _)| *id).collect();
        for task in &ready {
            if let Some(Order { step_no, answer: Some((_, event)), .. }) = self.orders.remove(task)
            {
                self.advance(*task, step_no, event);
            }
        }
        // Nobody waits for a node that is known to be away.
        let nodes = &self.state.nodes;
        let waiting = self.orders.len();
        self.orders.retain(|_, order| {
            order.answer.is_some() || nodes.get(&order.node).is_some_and(|node| node.is_online())
        });
        !ready.is_empty() || self.orders.len() < waiting
    }

    fn advance(&mut self, id: TaskId, step_no: u32, event: StepEvent) {
        let activated = matches!(event, StepEvent::Activated { .. });
        self.apply(Change::Advance { task: id, step_no, event });
        let Some(task) = self.state.tasks.get(&id) else { return };
        let ends = [task.source, task.destination];
        self.stale.extend(ends.into_iter().flatten());
        if activated {
            self.note_move(id);
        }
    }

    fn note_move(&mut self, id: TaskId) {
        let Some(task) = self.state.tasks.get(&id) else { return };
        let Some(to) = task.destination else { return };
        let vm = self.state.vms.get(&task.vm);
        let why = vm.and_then(|vm| vm.placed.as_ref()).map(|placed| placed.why.clone());
        // A VM of a lost node stands still from the beginning on.
        let stopped = match task.kind {
            TaskKind::Failover => self.start,
            _ => self.stopped.get(&id).copied().unwrap_or(self.now),
        };
        self.moves.push(Move {
            vm: task.vm_name.clone(),
            kind: task.kind,
            from: task.source,
            to,
            at_ms: self.now - self.start,
            outage_ms: self.now - stopped,
            why: why.unwrap_or_default(),
        });
    }

    /// Asks each task without an order what it does next.
    fn step_tasks(&mut self) -> bool {
        let idle = |task: &&Task| !self.orders.contains_key(&task.id);
        let tasks: Vec<TaskId> =
            self.state.active_tasks().filter(idle).map(|task| task.id).collect();
        let mut stepped = false;
        for id in tasks {
            let Some(task) = self.state.tasks.get(&id) else { continue };
            let step_no = task.step_no;
            match next_action(&self.state, &self.observed, task, self.now) {
                Action::Wait { .. } => continue,
                Action::Advance(event) => self.advance(id, step_no, event),
                action => self.order(id, action),
            }
            stepped = true;
        }
        stepped
    }

    fn order(&mut self, id: TaskId, action: Action) {
        let Some(task) = self.state.tasks.get(&id) else { return };
        let Some(vm) = self.state.vms.get(&task.vm) else { return };
        let step_no = task.step_no;
        let Some((node, takes_ms, event)) = self.carried_out(vm, &action) else { return };
        let answer = (!self.dead.contains(&node))
            .then(|| (self.now + takes_ms + self.pace.commit_ms, event));
        if matches!(action, Action::Seal { .. }) {
            self.stopped.insert(id, self.now);
        }
        self.orders.insert(id, Order { step_no, node, answer });
    }

    /// Who carries an order out, how long it takes, and what comes of it.
    fn carried_out(&self, vm: &Vm, action: &Action) -> Option<(NodeId, u64, StepEvent)> {
        let (pace, measures) = (self.pace, Measures::new());
        Some(match action {
            Action::Prepare(attempt) => (attempt.node, pace.prepare_ms, StepEvent::Prepared),
            Action::TakeOver(attempt) => (attempt.node, pace.take_over_ms, StepEvent::Held),
            Action::Seal { source, .. } => {
                let bytes = vm.spec.memory_mib << 20;
                // After a pre-copy only what has changed last is left to write.
                let left_mib = match vm.rules.pre_copy {
                    PreCopy::Never => vm.spec.memory_mib,
                    PreCopy::Finish | PreCopy::GiveUp => 0,
                };
                let takes = pace.seal_ms + left_mib / pace.seal_mib_per_ms.max(1);
                let path = format!("{}.{}", vm.id, source.epoch).into();
                let file = StateFileRef { path, hash: [0; 32], epoch: source.epoch, bytes };
                (source.node, takes, StepEvent::Sealed { file, measures })
            }
            Action::PreCopy { source, .. } => {
                let takes = vm.spec.memory_mib / pace.seal_mib_per_ms.max(1);
                (source.node, takes, StepEvent::PreCopied { measures })
            }
            Action::Load { attempt, .. } => {
                (attempt.node, pace.load_ms, StepEvent::Loaded { measures })
            }
            Action::Activate { attempt, .. } => {
                (attempt.node, pace.activate_ms, StepEvent::Activated { measures })
            }
            Action::ClaimBack { source, .. } => {
                (source.node, pace.activate_ms, StepEvent::ClaimedBack { measures })
            }
            Action::Abandon(attempt) | Action::Release(attempt) => {
                let boot_id = self.state.nodes.get(&attempt.node)?.boot_id?;
                let proof = FenceProof::Released { node: attempt.node, boot_id };
                let reason = "released".into();
                (attempt.node, pace.release_ms, StepEvent::Released { proof, reason })
            }
            Action::AskGuest(runner) => (runner.node, pace.shutdown_ms, StepEvent::GuestEnded),
            Action::Purge(node) => (*node, pace.release_ms, StepEvent::Purged),
            Action::Wait { .. } | Action::Advance(_) => return None,
        })
    }

    /// When something happens next by itself.
    fn next_moment(&self) -> Option<u64> {
        let answers = self.orders.values().filter_map(|order| Some(order.answer.as_ref()?.0));
        let tasks = self.state.active_tasks().map(|task| task.retry_at);
        let wanted = |vm: &&Vm| vm.task.is_none() && vm.desired == Desired::Running;
        let vms = self.state.vms.values().filter(wanted).map(|vm| vm.retry_at);
        let later = |at: &u64| *at > self.now && !is_due(*at, self.now);
        let pauses = tasks.chain(vms).filter(later);
        let silent = self.dead.iter().filter_map(|id| {
            let heard = self.observed.nodes.get(id).map_or(self.start, |report| report.heard_at);
            let suspected = heard.max(self.start) + self.timing.suspect_after_ms + 1;
            self.state.nodes.get(id)?.is_online().then_some(suspected.max(self.now + 1))
        });
        answers.chain(pauses).chain(silent).min()
    }
}

fn running(vm: &Vm) -> Option<VmReport> {
    let Place::Runner(runner) = &vm.place else { return None };
    Some(VmReport {
        vm: vm.id,
        epoch: runner.epoch,
        state: if vm.paused { VmState::Paused } else { VmState::Running },
        reason: String::new(),
        memory_loaded_bytes: 0,
        memory_total_bytes: 0,
    })
}
