//! How an agent carries an order out: `node-agent/core/src/machine.rs`, with its VMM.

use crate::config::{Arbiter, Flaw};
use crate::marks::Mark;
use crate::model::Protocol;
use crate::state::{Answer, Attempt, Files, Order, OrderKind, Phase, Place, State, Step, Vm, Vmm};
use crate::words::{Epoch, NodeId, VmId};

impl Protocol {
    /// An order arrives. Nothing is changed where it is refused; a refusal without an effect tells
    /// the leader no more than its own impatience does, so it has no answer.
    pub(crate) fn deliver(&self, s: &mut State, id: VmId, order: Order) -> Option<()> {
        let Order { node, epoch, kind, boot } = order;
        let current = s.node(node).boot == boot || self.config.has(Flaw::OrdersWithoutBoot);
        current.then_some(())?;
        if kind == OrderKind::Release {
            return self.obey_release(s, id, node, epoch);
        }
        (epoch > s.vm(id).agent(node).floor).then_some(())?;
        match kind {
            OrderKind::Prepare => self.obey_prepare(s, id, node, epoch),
            OrderKind::TakeOver => self.obey_take_over(s, id, node, epoch),
            OrderKind::Load { file } => self.obey_load(s, id, node, epoch, file),
            OrderKind::Activate { file } => self.obey_activate(s, id, node, epoch, file),
            OrderKind::Seal { load_at } => self.obey_seal(s, id, node, epoch, load_at),
            OrderKind::ClaimBack { sealed } => self.obey_claim_back(s, id, node, epoch, sealed),
            OrderKind::Release => None,
        }
    }

    fn obey_release(&self, s: &mut State, id: VmId, node: NodeId, epoch: Epoch) -> Option<()> {
        let vm = s.vm_mut(id);
        let runs_on = vm.vmm(node).is_some_and(|vmm| vmm.phase == Phase::Running);
        match vm.vmm(node) {
            Some(vmm) if vmm.epoch > epoch => {
                let agent = vm.agent_mut(node);
                agent.floor = agent.floor.max(epoch);
            }
            Some(_) if runs_on && self.config.has(Flaw::ReleasedTooEarly) => {}
            _ => vm.release(node, epoch),
        }
        self.answer(s, id, node, epoch, Answer::Released);
        Some(())
    }

    /// At most one incarnation: one that never ran a guest, or has ended, gives way to a higher
    /// epoch.
    fn obey_prepare(&self, s: &mut State, id: VmId, node: NodeId, epoch: Epoch) -> Option<()> {
        let vm = s.vm_mut(id);
        match vm.vmm(node).copied() {
            Some(old) if old.epoch > epoch => return None,
            Some(old) if old.epoch == epoch && old.phase != Phase::Ended => {}
            Some(old) if old.may_have_run && old.phase != Phase::Ended => return None,
            Some(old) if old.may_have_run && old.epoch == epoch => return None,
            Some(old) => {
                vm.end_process(node);
                let agent = vm.agent_mut(node);
                if old.epoch < epoch {
                    agent.floor = agent.floor.max(old.epoch);
                }
                agent.vmm = Some(Vmm::preparing(epoch));
            }
            None => vm.agent_mut(node).vmm = Some(Vmm::preparing(epoch)),
        }
        self.answer(s, id, node, epoch, Answer::Prepared);
        Some(())
    }

    /// Takes the claim for the attempt. That it is held is the proof `storage`; what it says of a
    /// handover goes with the answer.
    fn obey_take_over(&self, s: &mut State, id: VmId, node: NodeId, epoch: Epoch) -> Option<()> {
        let lost = match s.vm(id).place {
            Place::Revoked(lost) => Some(lost.epoch),
            _ => None,
        };
        let vm = s.vm_mut(id);
        vm.vmm(node).filter(|vmm| vmm.epoch == epoch && vmm.phase == Phase::Idle)?;
        self.lock(vm, node)?;
        let handed = match self.config.has(Flaw::NoHandoverRecord) {
            true => lost.filter(|lost| vm.files.is_sealed(*lost)),
            false => vm.claim.handed,
        };
        self.answer(s, id, node, epoch, Answer::Held { handed });
        Some(())
    }

    fn obey_load(
        &self,
        s: &mut State,
        id: VmId,
        node: NodeId,
        epoch: Epoch,
        file: Epoch,
    ) -> Option<()> {
        let vm = s.vm_mut(id);
        let sealed = vm.files.is_sealed(file);
        let vmm = vm.vmm_mut(node).filter(|vmm| vmm.epoch == epoch)?;
        (sealed && vmm.phase == Phase::Idle).then_some(())?;
        (vmm.loaded.is_none_or(|loaded| loaded == file)).then_some(())?;
        vmm.loaded = Some(file);
        self.answer(s, id, node, epoch, Answer::Loaded);
        Some(())
    }

    /// What it is to go on from has to be loaded: a guest that booted instead would have lost its
    /// memory, and nobody would know.
    fn obey_activate(
        &self,
        s: &mut State,
        id: VmId,
        node: NodeId,
        epoch: Epoch,
        file: Option<Epoch>,
    ) -> Option<()> {
        let nameless = self.config.has(Flaw::ActivateNamesNoFile);
        let vmm = s.vm_mut(id).vmm_mut(node).filter(|vmm| vmm.epoch == epoch)?;
        match vmm.phase {
            Phase::Idle if vmm.loaded == file || nameless => {
                vmm.phase = Phase::Starting;
                vmm.may_have_run = true;
            }
            Phase::Running => self.answer(s, id, node, epoch, Answer::Activated),
            // It ended before it ran, so it never will: the agent makes sure of it.
            Phase::Ended if !vmm.may_have_run => {
                s.vm_mut(id).release(node, epoch);
                self.answer(s, id, node, epoch, Answer::NeverRan);
            }
            _ => return None,
        }
        Some(())
    }

    fn obey_seal(
        &self,
        s: &mut State,
        id: VmId,
        node: NodeId,
        epoch: Epoch,
        load_at: Option<Attempt>,
    ) -> Option<()> {
        let vm = s.vm_mut(id);
        let vmm = vm.vmm_mut(node).filter(|vmm| vmm.epoch == epoch)?;
        let running = vmm.phase == Phase::Running;
        (running || vmm.phase == Phase::Sealed).then_some(())?;
        vmm.promised = true;
        if running {
            seal(vm, node);
        }
        // The leader passes the file on to the destination while it commits the seal.
        if let Some(attempt) = load_at {
            self.order(s, id, attempt, OrderKind::Load { file: epoch });
            if self.config.has(Flaw::ActivateBeforeSealed) {
                self.order(s, id, attempt, OrderKind::Activate { file: Some(epoch) });
            }
        }
        self.answer(s, id, node, epoch, Answer::Sealed);
        Some(())
    }

    /// The seal ends in an error, perhaps after the header was written, and the guest goes on.
    pub(crate) fn seal_fails(&self, s: &mut State, id: VmId, node: NodeId) -> Option<()> {
        let vm = s.vm_mut(id);
        let epoch = vm.vmm(node).filter(|vmm| vmm.phase == Phase::Running)?.epoch;
        let ordered = |order: &Order| {
            let seals = matches!(order.kind, OrderKind::Seal { .. });
            seals && order.node == node && order.epoch == epoch
        };
        vm.orders.iter().any(ordered).then_some(())?;
        vm.files.seal(epoch);
        vm.files.fresh = None;
        self.answer(s, id, node, epoch, Answer::NotSealed);
        Some(())
    }

    /// The source raises its claim to the new epoch, under which its guest goes on.
    fn obey_claim_back(
        &self,
        s: &mut State,
        id: VmId,
        node: NodeId,
        epoch: Epoch,
        sealed: Epoch,
    ) -> Option<()> {
        let exact = self.config.arbiter == Arbiter::Storage;
        let vm = s.vm_mut(id);
        let vmm = vm.vmm_mut(node)?;
        match vmm.phase {
            Phase::Running if vmm.epoch == epoch => {}
            Phase::Sealed if vmm.epoch == sealed && vmm.cut => {
                return self.never_ran(s, id, node, epoch);
            }
            Phase::Sealed if vmm.epoch == sealed => {
                vmm.epoch = epoch;
                vmm.loaded = Some(sealed);
                (vmm.handing, vmm.promised, vmm.lease) = (false, false, None);
                if !exact {
                    // Held until a grant names the new epoch.
                    vmm.phase = Phase::Starting;
                    return Some(());
                }
                vm.claim.epoch = epoch;
                self.run(vm, node);
            }
            Phase::Ended if vmm.epoch == sealed => return self.never_ran(s, id, node, epoch),
            _ => return None,
        }
        self.answer(s, id, node, epoch, Answer::ClaimedBack);
        Some(())
    }

    /// The agent makes sure that the guest never runs under this epoch, and then says so.
    fn never_ran(&self, s: &mut State, id: VmId, node: NodeId, epoch: Epoch) -> Option<()> {
        s.vm_mut(id).release(node, epoch);
        self.answer(s, id, node, epoch, Answer::NeverRan);
        Some(())
    }

    /// A VMM that was told to start takes its locks and runs the guest.
    pub(crate) fn start(&self, s: &mut State, id: VmId, node: NodeId) -> Option<()> {
        let vm = s.vm_mut(id);
        let vmm = *vm.vmm(node).filter(|vmm| vmm.phase == Phase::Starting)?;
        // Under the arbiter `lease` the guest is held until a grant names its epoch.
        (self.config.arbiter == Arbiter::Storage || vmm.lease.is_some()).then_some(())?;
        if !self.config.has(Flaw::NoClaimLock) {
            self.lock(vm, node)?;
        }
        if vmm.loaded.is_none() && resumes(vm, vmm.epoch) {
            vm.cold = true;
        }
        self.run(vm, node);
        self.answer(s, id, node, vmm.epoch, Answer::Activated);
        self.answer(s, id, node, vmm.epoch, Answer::ClaimedBack);
        Some(())
    }

    /// A start that was refused. Only if no earlier one is unaccounted for is it known that the
    /// guest never ran; then the VMM is released before that is told.
    pub(crate) fn give_up(&self, s: &mut State, id: VmId, node: NodeId) -> Option<()> {
        let vm = s.vm_mut(id);
        let vmm = *vm.vmm(node).filter(|vmm| vmm.phase == Phase::Starting)?;
        if self.config.arbiter == Arbiter::Storage && vm.claim.epoch > vmm.epoch {
            self.mark(Mark::LateStartRefused);
        }
        if vmm.start_lost {
            vm.agent_mut(node).vmm = Some(Vmm { phase: Phase::Idle, ..vmm });
            return Some(());
        }
        if vm.asserted.is_some() && vm.claim.holder.is_some_and(|holder| holder != node) {
            self.mark(Mark::OperatorWasWrong);
        }
        self.never_ran(s, id, node, vmm.epoch)
    }

    /// Whether a start is refused by the locks: somebody else holds them, a higher epoch did, or
    /// the storage took them away.
    pub(crate) fn is_refused(&self, vm: &Vm, node: NodeId) -> bool {
        self.config.arbiter == Arbiter::Storage && self.lock(&mut vm.clone(), node).is_none()
    }

    /// Takes the claim's lock and writes the epoch, unless this VMM has done both already.
    fn lock(&self, vm: &mut Vm, node: NodeId) -> Option<()> {
        if self.config.arbiter == Arbiter::Lease {
            return Some(());
        }
        let vmm = *vm.vmm(node)?;
        if vmm.cut {
            return None;
        }
        if vmm.locked {
            return Some(());
        }
        let newer = vmm.epoch > vm.claim.epoch || self.config.has(Flaw::NoEpochCompare);
        (vm.claim.holder.is_none() && newer).then_some(())?;
        vm.claim.epoch = vm.claim.epoch.max(vmm.epoch);
        vm.claim.holder = Some(node);
        vm.agent_mut(node).vmm = Some(Vmm { locked: true, ..vmm });
        Some(())
    }

    /// The guest executes: what was sealed before is not the VM any more.
    pub(crate) fn run(&self, vm: &mut Vm, node: NodeId) {
        let Some(vmm) = vm.vmm(node).copied() else { return };
        if let Some(file) = vmm.loaded {
            let says_so = is_named(&vm.place, node, vmm.epoch) || vm.asserted == Some(vmm.epoch);
            vm.misused |= vm.files.fresh != Some(file) || !says_so;
        }
        vm.files.fresh = None;
        if !self.config.has(Flaw::RecordKept) {
            vm.claim.handed = None;
        }
        for other in vm.agents.iter_mut().filter_map(|agent| agent.vmm.as_mut()) {
            other.overtaken |= other.cut && other.phase == Phase::Running;
        }
        let vmm = Vmm { phase: Phase::Running, loaded: None, start_lost: false, ..vmm };
        vm.agent_mut(node).vmm = Some(vmm);
    }

    /// An answer sets out, if the task still stands at the step that asks for it.
    pub(crate) fn answer(
        &self,
        s: &mut State,
        id: VmId,
        node: NodeId,
        epoch: Epoch,
        answer: Answer,
    ) {
        let vm = s.vm_mut(id);
        if awaits(vm, Attempt { node, epoch }, answer) {
            vm.answers.insert(answer);
        }
    }
}

/// Whether this attempt is to go on from a state file.
fn resumes(vm: &Vm, epoch: Epoch) -> bool {
    vm.task.is_some_and(|task| match task.step {
        Step::Activate { attempt, file, .. } => attempt.epoch == epoch && file.is_some(),
        _ => false,
    })
}

/// Seals the guest of a VMM that runs.
pub(crate) fn seal(vm: &mut Vm, node: NodeId) {
    let Some(vmm) = vm.vmm_mut(node) else { return };
    vmm.phase = Phase::Sealed;
    let (epoch, overtaken) = (vmm.epoch, vmm.overtaken);
    let Files { fresh, .. } = vm.files;
    vm.files.seal(epoch);
    vm.files.fresh = if overtaken { fresh } else { Some(epoch) };
}

/// Whether the state says, or said until the revocation, that this incarnation runs the VM.
pub(crate) fn is_named(place: &Place, node: NodeId, epoch: Epoch) -> bool {
    match place {
        Place::Runner(runner) | Place::Revoked(runner) => {
            runner.node == node && runner.epoch == epoch
        }
        Place::Stopped | Place::Sealed { .. } => false,
    }
}

fn awaits(vm: &Vm, from: Attempt, answer: Answer) -> bool {
    let Some(task) = vm.task else { return false };
    let here = is_named(&vm.place, from.node, from.epoch);
    match (task.step, answer) {
        (Step::Prepare(it), Answer::Prepared)
        | (Step::TakeOver(it), Answer::Held { .. })
        | (Step::Load(it), Answer::Loaded)
        | (Step::Activate { attempt: it, .. }, Answer::Activated | Answer::NeverRan)
        | (Step::ClaimBack { source: it, .. }, Answer::ClaimedBack | Answer::NeverRan)
        | (Step::Reap(it), Answer::Released) => it == from,
        (Step::Seal(_), Answer::Sealed | Answer::NotSealed) => here,
        (Step::Release(it), Answer::Released) => (it.node, it.epoch) == (from.node, from.epoch),
        (Step::Choose, Answer::Released | Answer::Fenced) => {
            here && matches!(vm.place, Place::Revoked(_))
        }
        _ => false,
    }
}
