//! What must hold, checked at every event: the invariants of the design, numbered as there.
//!
//! The oracle sees everything at once: the log as the first controller applied it, every VMM, every
//! write that the storage took, every promise that an agent gave. It believes nobody.

use std::collections::{BTreeMap, BTreeSet};

use bellwether_claim::record;
use bellwether_core::command::Change;
use bellwether_core::fence::Promise;
use bellwether_core::{Attempt, Desired, Outcome, Place, State, Step, StepEvent, Vm};
use bellwether_types::{BootId, Epoch, FenceProof, NodeId, VmId};

use crate::kernel::{HostId, Kernel, MS, Nanos, ProcId, SECOND};
use crate::linear::{Checked, Order};
use crate::raft::Applied;
use crate::storage::{DiskRecord, Storage};
use crate::wire::{claim_path, disk_path};

/// A pulse counts for 15 s by the clock of the node that sees it, which looks every second and gives
/// the storage five.
const SIGN_MAX: Nanos = 22 * SECOND;

/// How long a write may be under way that a host has sent: `net_ms` of the proofs by waiting.
pub const NET_MAX: Nanos = 500 * MS;

/// What is true of one VMM.
#[derive(Clone, Debug)]
pub struct Fact {
    pub vm: VmId,
    pub node: NodeId,
    pub boot: BootId,
    pub epoch: Epoch,
    /// The epoch that it was created for, which names its directory.
    pub home: Epoch,
    /// Its arbiter is the lease.
    pub leased: bool,
    /// The guest runs, as soon as the process does.
    pub open: bool,
    /// It has sent a write that has not been answered.
    pub busy: bool,
    /// Only the administrator holds it.
    pub paused: bool,
}

/// What was committed at one index.
struct Committed {
    term: u64,
    change: Option<Change>,
    outcome: Outcome,
}

/// See the module.
pub struct Oracle {
    kernel: Kernel,
    storage: Storage,
    violation: Option<String>,
    committed: BTreeMap<u64, Committed>,
    /// The state after the last entry that anybody applied.
    reference: State,
    pub vmms: BTreeMap<ProcId, Fact>,
    /// Who was ever allowed to run: VM, node, epoch.
    allowed: BTreeSet<(VmId, NodeId, Epoch)>,
    began: BTreeMap<VmId, Epoch>,
    acknowledged: BTreeMap<VmId, u64>,
    resumed: BTreeMap<[u8; 32], Epoch>,
    released: BTreeMap<(NodeId, BootId, VmId), Epoch>,
    /// The epochs of which nothing runs any more, since a proof or a seal said so.
    gone: BTreeMap<(VmId, Epoch), Nanos>,
    terms: BTreeMap<(NodeId, BootId), u64>,
    /// Whose sealed memory was handed over, durably.
    handed_over: BTreeSet<(VmId, Epoch)>,
    /// Guests that began to execute: when, which, where, and whether with their memory.
    pub begun: Vec<(u64, VmId, NodeId, bool)>,
    /// When each term had its first entry.
    leaders: BTreeMap<u64, Nanos>,
    /// What callers of the API were told.
    pub order: Order,
}

impl Oracle {
    pub fn new(kernel: &Kernel, storage: &Storage) -> Self {
        Self {
            kernel: kernel.clone(),
            storage: storage.clone(),
            violation: None,
            committed: BTreeMap::new(),
            reference: State::default(),
            vmms: BTreeMap::new(),
            allowed: BTreeSet::new(),
            began: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            resumed: BTreeMap::new(),
            released: BTreeMap::new(),
            gone: BTreeMap::new(),
            terms: BTreeMap::new(),
            handed_over: BTreeSet::new(),
            begun: Vec::new(),
            leaders: BTreeMap::new(),
            order: Order::default(),
        }
    }

    /// What was found first.
    pub fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    pub fn reference(&self) -> &State {
        &self.reference
    }

    pub fn fail(&mut self, text: impl Into<String>) {
        self.violation.get_or_insert(text.into());
    }

    fn check(&mut self, holds: bool, text: impl FnOnce() -> String) {
        if !holds {
            self.fail(text());
        }
    }

    fn name(&self, vm: VmId) -> String {
        self.reference.vms.get(&vm).map_or_else(|| vm.to_string(), |vm| vm.spec.name.clone())
    }

    // --- the log ---

    /// Some controller has applied an entry. Answers whether it is the first to.
    pub fn applied(&mut self, it: &Applied<'_>) -> bool {
        let change = it.entry.command.as_ref().map(|command| &command.change);
        if let Some(known) = self.committed.get(&it.index) {
            let same = known.term == it.entry.term
                && known.change.as_ref() == change
                && known.outcome == *it.outcome;
            self.check(same, || {
                format!("2: controller {} applied another entry at {}", it.controller, it.index)
            });
            return false;
        }
        if let Outcome::Rejected(rejection) = it.outcome {
            self.check(self.reference == *it.after, || {
                format!("2: a command was refused ({rejection}) and had an effect: {change:?}")
            });
        }
        if let Err(broken) = it.after.invariants() {
            self.fail(format!("1: {broken}"));
        }
        self.check_places(it);
        self.check_step(it);
        self.check_power(it);
        self.leaders.entry(it.entry.term).or_insert(self.kernel.now());
        let committed =
            Committed { term: it.entry.term, change: change.cloned(), outcome: it.outcome.clone() };
        self.committed.insert(it.index, committed);
        let entered = self.order.entered(it.index, it.entry.by);
        self.in_order(entered);
        if let Some(command) = &it.entry.command {
            self.reference.apply((**command).clone());
            let allowed = self.reference.vms.values().filter_map(|vm| {
                vm.place.runner().map(|runner| (vm.id, runner.node, runner.epoch))
            });
            self.allowed.extend(allowed);
            self.remember(it);
        }
        true
    }

    /// Keeps how each VM is from this entry on, for those who read it.
    fn remember(&mut self, it: &Applied<'_>) {
        let known: Vec<VmId> = self.order.known().chain(it.after.vms.keys().copied()).collect();
        for id in known {
            self.order.changed(it.index, id, it.after.vms.get(&id));
        }
    }

    /// Takes note of what the order of the API says is wrong.
    pub fn in_order(&mut self, checked: Checked) {
        if let Err(what) = checked {
            self.fail(format!("2: {what}"));
        }
    }

    /// The API has acknowledged a command.
    pub fn told(&mut self, index: u64, outcome: &Outcome) {
        let kept = self.committed.get(&index).is_some_and(|known| known.outcome == *outcome);
        self.check(kept, || {
            format!("2: the API told {outcome:?} of entry {index}, which is not so")
        });
    }

    fn check_places(&mut self, it: &Applied<'_>) {
        let event = match it.entry.command.as_ref().map(|command| &command.change) {
            Some(Change::Advance { event, .. }) => Some(event),
            _ => None,
        };
        let (mut problems, mut gone) = (Vec::new(), Vec::new());
        for (id, before) in &self.reference.vms {
            let Some(after) = it.after.vms.get(id) else {
                if !matches!(before.place, Place::Stopped | Place::Sealed { .. }) {
                    problems.push(format!("4: {} was deleted while it ran", before.spec.name));
                }
                continue;
            };
            if before.place == after.place {
                continue;
            }
            if let Err(problem) = step(before, after, event) {
                problems.push(format!("4: place of {}: {problem}", before.spec.name));
            }
            if let Some(lost) = self.forgotten(before, after, event) {
                problems.push(lost);
            }
            if let Some(epoch) = must_be_gone(before, after) {
                gone.push(((*id, epoch), self.kernel.now()));
                problems.extend(self.runner_of(*id, epoch).map(|process| {
                    format!(
                        "4: {} left epoch {epoch} on {event:?}, but {} still runs it",
                        before.spec.name,
                        self.kernel.name_of(process)
                    )
                }));
            }
        }
        problems.into_iter().for_each(|problem| self.fail(problem));
        self.gone.extend(gone);
    }

    /// A task goes on by what came of the step at which it stands, and is told that a start failed
    /// only where the agent has said that the guest never ran.
    fn check_step(&mut self, it: &Applied<'_>) {
        let command = it.entry.command.as_ref().map(|command| &command.change);
        let Some(Change::Advance { task: id, step_no, event }) = command else { return };
        if *it.outcome != Outcome::Done {
            return;
        }
        let Some(task) = self.reference.tasks.get(id) else { return };
        let (now_at, vm) = (task.step_no, task.vm);
        let started = match (&task.step, event) {
            (Step::Activate { attempt, .. }, StepEvent::Failed { .. }) => Some(*attempt),
            (Step::ClaimBack { source, .. }, StepEvent::Failed { .. }) => Some(*source),
            _ => None,
        };
        self.check(now_at == *step_no, || {
            format!("5: {event:?} of step {step_no} moved task {id} on, which stood at {now_at}")
        });
        let never_ran = started.is_none_or(|Attempt { node, epoch }| {
            let told = self.released.iter().filter(|((by, _, of), _)| (*by, *of) == (node, vm));
            told.into_iter().any(|(_, floor)| *floor >= epoch)
        });
        self.check(never_ran, || {
            format!("1: task {id} takes a start for one that never ran, which nobody has said")
        });
    }

    /// A switch proves that a boot of a host is over.
    fn check_power(&mut self, it: &Applied<'_>) {
        let command = it.entry.command.as_ref().map(|command| &command.change);
        let Some(Change::SwitchedOff { node, boot_id, device }) = command else { return };
        let host = self.kernel.host(HostId(node.0));
        let is_on = host.is_some_and(|host| host.up && host.boot_id == *boot_id);
        self.check(!is_on || *it.outcome != Outcome::Done, || {
            format!("4: {device} proves that node {node} is off, and its host runs")
        });
    }

    /// A VMM that can run the guest under this epoch and write its disks, now or when it goes on. Of one
    /// under the lease arbiter no lock says that it cannot.
    fn runner_of(&self, vm: VmId, epoch: Epoch) -> Option<ProcId> {
        let runs = |(process, fact): (&ProcId, &Fact)| {
            let is_it = fact.vm == vm && fact.epoch == epoch && fact.open;
            let may = fact.leased || self.writes(vm, *process);
            (is_it && self.kernel.lives(*process) && may).then_some(*process)
        };
        self.vmms.iter().find_map(runs)
    }

    fn writes(&self, vm: VmId, process: ProcId) -> bool {
        self.storage.server(|server| server.holds(process, &disk_path(vm)))
    }

    /// Whoever takes the claim finds what was handed over in it: a VM that is to run keeps its memory.
    fn forgotten(&self, before: &Vm, after: &Vm, event: Option<&StepEvent>) -> Option<String> {
        let (Place::Revoked(old), Place::Runner(_)) = (&before.place, &after.place) else {
            return None;
        };
        let taken = matches!(event, Some(StepEvent::Held | StepEvent::HeldWithState { .. }));
        let kept = self.handed_over.contains(&(before.id, old.epoch));
        (taken && kept && before.desired == Desired::Running).then(|| {
            let name = &before.spec.name;
            format!("2: {name} was handed over by epoch {} and boots", old.epoch)
        })
    }

    // --- VMMs ---

    /// A VMM is created on behalf of an order.
    pub fn prepared(&mut self, fact: &Fact) {
        let released = self.released.get(&(fact.node, fact.boot, fact.vm)).copied();
        let fresh = released.is_none_or(|released| fact.epoch > released);
        let text = format!(
            "1: node {} prepares {} under epoch {}, which it has released for good",
            fact.node,
            self.name(fact.vm),
            fact.epoch
        );
        self.check(fresh, || text);
    }

    /// The guest begins under an epoch, with this much memory of its own; `file` if it is resumed.
    pub fn started(&mut self, process: ProcId, file: Option<[u8; 32]>, counter: u64) {
        let Some(fact) = self.vmms.get(&process).cloned() else { return };
        let (vm, epoch) = (fact.vm, fact.epoch);
        let name = self.name(vm);
        self.prepared(&fact);
        let allowed = self.allowed.contains(&(vm, fact.node, epoch));
        self.check(allowed, || {
            format!("3: {name} begins on node {} under epoch {epoch} without leave", fact.node)
        });
        let began = self.began.get(&vm).copied().unwrap_or(Epoch(0));
        self.check(epoch >= began, || {
            format!("1: {name} begins under epoch {epoch} after epoch {began} has begun")
        });
        self.began.insert(vm, epoch.max(began));
        self.begun.push((self.kernel.now(), vm, fact.node, file.is_some()));
        self.check_claim(vm, epoch);
        let top = self.storage.server(|server| server.top_of(&disk_path(vm)));
        let kept = self.acknowledged.get(&vm).copied().unwrap_or(0);
        self.check(top >= kept, || {
            format!("2: the disk of {name} ends at {top}, but {kept} was acknowledged")
        });
        if let Some(hash) = file {
            self.check(counter == top, || {
                format!("3: {name} resumes at {counter}, but its disk has moved on to {top}")
            });
            if let Some(by) = self.resumed.insert(hash, epoch) {
                self.fail(format!(
                    "3: {name} resumes a state file under {epoch} that {by} resumed"
                ));
            }
        }
        self.instruction(process);
    }

    /// A runner has recorded durably in the claim that it sealed the VM and lets go of it.
    pub fn handed_over(&mut self, vm: VmId, epoch: Epoch) {
        self.handed_over.insert((vm, epoch));
    }

    /// From now on the disks move on, so nothing may say that the VM is in a file.
    fn check_claim(&mut self, vm: VmId, epoch: Epoch) {
        let path = claim_path(vm);
        let claim = self.storage.server(|server| server.claims.get(&path).cloned());
        let left = claim.as_deref().and_then(record::current).and_then(|(slot, _)| slot.handover);
        if let Some(left) = left {
            let (name, of) = (self.name(vm), left.epoch);
            self.fail(format!(
                "3: {name} begins under epoch {epoch}, and its claim still hands epoch {of} over"
            ));
        }
    }

    /// The guest executes.
    pub fn instruction(&mut self, process: ProcId) {
        let Some(fact) = self.vmms.get(&process) else { return };
        let vm = fact.vm;
        let (writes, expelled) = self.storage.server(|server| {
            (server.holds(process, &claim_path(vm)), server.was_expelled(process))
        });
        // A guest whose locks the server took away may execute for a moment; its writes fail.
        if expelled && !fact.leased {
            return;
        }
        let is_gone = self.gone.contains_key(&(vm, fact.epoch));
        let others: Vec<String> = self
            .vmms
            .iter()
            .filter(|(other, it)| **other != process && it.vm == vm && it.open)
            .filter(|(other, _)| self.kernel.lives(**other) && !self.kernel.is_standing(**other))
            .filter(|(other, _)| !self.storage.server(|server| server.was_expelled(**other)))
            .map(|(other, it)| format!("{} under epoch {}", self.kernel.name_of(*other), it.epoch))
            .collect();
        let name = self.name(vm);
        let us = format!("{} under epoch {}", self.kernel.name_of(process), fact.epoch);
        self.check(!is_gone, || format!("4: {us} executes, which was proven gone"));
        self.check(others.is_empty(), || format!("1: {name} runs twice: {us}, and {others:?}"));
        self.check(writes || expelled, || format!("1: {name} runs without its claim: {us}"));
    }

    /// The storage took a write.
    pub fn written(&mut self, vm: VmId, record: DiskRecord, top: u64) {
        let name = self.name(vm);
        let began = self.began.get(&vm).copied().unwrap_or(Epoch(0));
        self.check(record.epoch >= began, || {
            format!("1: epoch {} writes to {name} after epoch {began} began", record.epoch)
        });
        let gone = self.gone.get(&(vm, record.epoch));
        let sent_before = gone.is_none_or(|since| self.kernel.now() <= since + NET_MAX);
        self.check(sent_before, || {
            format!("4: epoch {} writes to {name}, which was proven gone", record.epoch)
        });
        self.check(record.number == top + 1, || {
            format!("3: {name} writes record {} after record {top}", record.number)
        });
    }

    /// The guest's flush was acknowledged.
    pub fn acknowledged(&mut self, vm: VmId, number: u64) {
        let top = self.storage.server(|server| server.top_of(&disk_path(vm)));
        let name = self.name(vm);
        self.check(top >= number, || {
            format!("2: {name}: {number} acknowledged, disk ends at {top}")
        });
        self.acknowledged.insert(vm, number);
    }

    // --- agents ---

    /// A node begins to hand its VMs over: it heard a controller last at `contact`, and the highest
    /// pulse in the heartbeats of the others rose last at `rose`.
    pub fn verdict(&mut self, node: NodeId, contact: Nanos, rose: Option<Nanos>) {
        let now = self.kernel.now();
        let is_sign = rose.is_some_and(|rose| rose > contact && now - rose <= SIGN_MAX);
        self.check(is_sign, || {
            format!("4: node {node} hands its VMs over without a sign that a quorum lives")
        });
    }

    /// A leader has granted something to a node whose agent said this of its watchdog: no later leader
    /// may count on one that was disarmed. (That an armed one is not known yet only takes longer.)
    pub fn granted(&mut self, node: NodeId, boot: BootId, told: &Promise) {
        let known = self.reference.nodes.get(&node).and_then(|node| node.watchdog.as_ref());
        let counted =
            known.filter(|known| known.boot_id == boot).map(|known| known.promise.is_ok());
        self.check(told.is_ok() || counted != Some(true), || {
            format!("4: node {node} got a grant on {told:?}, and the state counts on its watchdog")
        });
    }

    /// A fencer pets its watchdog without a fresh grant: nothing may depend on the lease there.
    pub fn petted_without_grant(&mut self, node: NodeId, boot: BootId) {
        let runs = self.vmms.iter().find(|(process, fact)| {
            (fact.node, fact.boot) == (node, boot)
                && fact.leased
                && (fact.open || fact.busy)
                && self.kernel.lives(**process)
        });
        if let Some((process, _)) = runs {
            let text = format!(
                "6: the watchdog of node {node} is petted without a fresh grant while {} runs",
                self.kernel.name_of(*process)
            );
            self.fail(text);
        }
    }

    /// An agent has told that nothing at or below an epoch runs there, or ever will in this boot.
    pub fn promised(&mut self, node: NodeId, boot: BootId, vm: VmId, epoch: Epoch) {
        let floor = self.released.entry((node, boot, vm)).or_default();
        *floor = (*floor).max(epoch);
        let floor = *floor;
        let lives = self.vmms.iter().find(|(process, fact)| {
            (fact.node, fact.boot, fact.vm) == (node, boot, vm)
                && fact.epoch <= floor
                && self.kernel.lives(**process)
        });
        if let Some((_, fact)) = lives {
            let text = format!(
                "4: node {node} tells that {} is released up to epoch {floor}, and epoch {} lives",
                self.name(vm),
                fact.epoch
            );
            self.fail(text);
        }
    }

    /// An agent has heard of a leader of this term, and goes by it.
    pub fn heard(&mut self, node: NodeId, boot: BootId, term: u64) {
        let highest = self.terms.entry((node, boot)).or_default();
        *highest = term.max(*highest);
    }

    /// An agent carries out an order of this term; `kept` is the term that its next agent would know.
    pub fn obeyed(&mut self, node: NodeId, boot: BootId, (term, kept): (u64, u64), what: &str) {
        let heard = self.terms.get(&(node, boot)).copied().unwrap_or(0);
        self.heard(node, boot, term);
        self.check(term >= heard, || {
            format!("1: node {node} obeys {what} of term {term} after it heard of term {heard}")
        });
        self.check(kept >= term, || {
            format!("1: node {node} obeys term {term}, and its next agent would obey an older one")
        });
    }

    /// A leader of this term has answered an agent's message that was sent at a time.
    pub fn counted(&mut self, node: NodeId, term: u64, sent: Nanos) {
        let newer = self.leaders.range(term + 1..).find(|(_, since)| **since < sent);
        if let Some((newer, _)) = newer {
            let text = format!(
                "6: a leader of term {term} counts what node {node} sent when term {newer} had begun"
            );
            self.fail(text);
        }
    }
}

/// Whether a place may follow another, as drawn at [`Place`].
fn step(before: &Vm, after: &Vm, event: Option<&StepEvent>) -> Result<(), String> {
    use Place::{Revoked, Runner, Sealed, Stopped};
    let fail = |text: &str| Err(format!("{text} on {event:?}"));
    let proven = matches!(
        event,
        Some(
            StepEvent::Proven(_)
                | StepEvent::Released { .. }
                | StepEvent::Held
                | StepEvent::HeldWithState { .. }
        )
    );

    match (&before.place, &after.place) {
        (Stopped, Runner(_)) | (Sealed { .. }, Sealed { .. }) => Ok(()),
        (Runner(old), Sealed { file, .. }) => match event {
            Some(StepEvent::Sealed { .. }) if file.epoch == old.epoch => Ok(()),
            Some(StepEvent::Failed { .. }) if file.epoch < old.epoch => Ok(()),
            _ => fail("sealed without a seal"),
        },
        (Runner(old), Revoked(new)) if old == new => Ok(()),
        (Runner(_), Stopped) => match event {
            Some(StepEvent::Released { .. } | StepEvent::Failed { .. }) => Ok(()),
            _ => fail("stopped without a proof"),
        },
        (Sealed { file, .. }, Runner(new)) if new.epoch > file.epoch => Ok(()),
        (Revoked(old), Runner(new)) if old == new => match event {
            Some(StepEvent::Reinstated) => Ok(()),
            _ => fail("reinstated"),
        },
        // A lost runner turns out to have sealed its VM, which is whose file that is, or goes on there.
        (Revoked(old), Sealed { file, .. }) => match event {
            Some(StepEvent::Sealed { .. } | StepEvent::HeldWithState { .. })
                if file.epoch == old.epoch =>
            {
                Ok(())
            }
            _ => fail("sealed without its runner's seal"),
        },
        (Revoked(old), Runner(new)) if matches!(event, Some(StepEvent::Sealed { .. })) => {
            match new.node == old.node && new.boot_id == old.boot_id && new.epoch > old.epoch {
                true => Ok(()),
                false => fail("taken back by somebody else"),
            }
        }
        (Revoked(_), Runner(new)) => match &after.last_proof {
            Some(FenceProof::Storage { holder, epoch })
                if proven && (*holder, *epoch) == (new.node, new.epoch) =>
            {
                Ok(())
            }
            _ => fail("started elsewhere without a proof"),
        },
        (Revoked(_), Stopped) if proven => Ok(()),
        (from, to) => fail(&format!("{from:?} -> {to:?}")),
    }
}

/// The epoch of which nothing may run when the VM has left its place.
fn must_be_gone(before: &Vm, after: &Vm) -> Option<Epoch> {
    let by_word = matches!(after.last_proof, Some(FenceProof::Operator { .. }));
    match (&before.place, &after.place) {
        (Place::Revoked(old), Place::Runner(new)) if old == new => None,
        (Place::Revoked(old), Place::Runner(_) | Place::Stopped) if !by_word => Some(old.epoch),
        (Place::Runner(old) | Place::Revoked(old), Place::Sealed { .. })
        | (Place::Runner(old), Place::Stopped) => Some(old.epoch),
        _ => None,
    }
}
