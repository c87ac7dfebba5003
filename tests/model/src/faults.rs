//! What goes wrong, and what a node that is cut off does by itself: the handover.
//!
//! ```text
//!   running --HandOver--> sealed --HandOverRecord--> recorded --LetGo--> gone, locks free
//!      ^                    |                           |
//!      +------ CallOff -----+----- CallOff (erases) ----+      never after a seal was promised
//! ```

use crate::action::VmmAct;
use crate::agents::seal;
use crate::config::{Arbiter, FaultKind, Flaw};
use crate::marks::Mark;
use crate::model::Protocol;
use crate::state::{Phase, Place, State, Step, Vmm};
use crate::words::{NodeId, VmId};

impl Protocol {
    pub(crate) fn fault(
        &self,
        s: &mut State,
        id: VmId,
        node: NodeId,
        kind: FaultKind,
    ) -> Option<()> {
        s.faults_left = s.faults_left.checked_sub(1)?;
        let vm = s.vm_mut(id);
        match kind {
            FaultKind::VmmDies => {
                let vmm = vm.vmm(node).filter(|vmm| vmm.phase != Phase::Ended)?;
                if vmm.handing && vm.claim.handed == Some(vmm.epoch) {
                    self.mark(Mark::HandoverCrashed);
                }
                vm.end_process(node);
            }
            FaultKind::PowerLoss => self.reset(s, node),
            FaultKind::AgentDies => {
                if self.config.has(Flaw::FloorNotDurable) {
                    vm.agent_mut(node).floor = Default::default();
                }
                if let Some(vmm) = vm.vmm_mut(node) {
                    vmm.start_lost |= vmm.phase == Phase::Starting;
                }
            }
            FaultKind::StorageRevokes => {
                let vmm = vm.vmm_mut(node).filter(|vmm| vmm.locked && !vmm.cut)?;
                vmm.cut = true;
                vm.claim.holder = None;
            }
            FaultKind::HandOver => self.hand_over(s, id, node)?,
            FaultKind::OperatorAsserts => self.assert_down(s, id, node)?,
            FaultKind::SealFails => self.seal_fails(s, id, node)?,
            FaultKind::StartFails => self.give_up(s, id, node)?,
            FaultKind::VmmStuck => {
                let vmm = vm.vmm_mut(node).filter(|vmm| vmm.lease.is_some() && !vmm.stuck)?;
                (vmm.phase == Phase::Running).then_some(())?;
                vmm.stuck = true;
            }
        }
        Some(())
    }

    fn assert_down(&self, s: &mut State, id: VmId, node: NodeId) -> Option<()> {
        let vm = s.vm(id);
        let Place::Revoked(old) = vm.place else { return None };
        let waits = vm.task.is_some_and(|task| task.step == Step::Choose);
        (waits && old.node == node && s.node(node).unknown).then_some(())?;
        s.vm_mut(id).asserted.replace(old.epoch).is_none().then_some(())?;
        self.proven(s, id, Mark::ProvenOperator)
    }

    /// A node that is cut off seals its guest. One that was sealed on an order is handed over as it
    /// stands.
    fn hand_over(&self, s: &mut State, id: VmId, node: NodeId) -> Option<()> {
        (self.config.arbiter == Arbiter::Storage).then_some(())?;
        let vm = s.vm_mut(id);
        let vmm = vm.vmm_mut(node).filter(|vmm| vmm.locked && !vmm.cut && !vmm.handing)?;
        let running = vmm.phase == Phase::Running;
        (running || vmm.phase == Phase::Sealed).then_some(())?;
        vmm.handing = true;
        if running {
            seal(vm, node);
        }
        Some(())
    }

    /// What a VMM, or its agent, does without an order.
    pub(crate) fn act(&self, s: &mut State, id: VmId, node: NodeId, act: VmmAct) -> Option<()> {
        match act {
            VmmAct::Run => return self.start(s, id, node),
            VmmAct::GiveUp => {
                self.is_refused(s.vm(id), node).then_some(())?;
                return self.give_up(s, id, node);
            }
            _ => {}
        }
        let vm = s.vm_mut(id);
        let vmm = *vm.vmm(node).filter(|vmm| vmm.phase == Phase::Sealed)?;
        let recorded = vm.claim.handed == Some(vmm.epoch);
        match act {
            VmmAct::HandOverRecord => {
                (vmm.handing && vmm.locked && !vmm.cut && !recorded).then_some(())?;
                vm.claim.handed = Some(vmm.epoch);
            }
            VmmAct::LetGo => {
                let allowed = recorded || self.config.has(Flaw::NoHandoverRecord);
                (vmm.handing && allowed).then_some(())?;
                vm.release(node, vmm.epoch);
            }
            VmmAct::CallOff => {
                let free = !vmm.promised || self.config.has(Flaw::CalledOffAfterPromise);
                (vmm.handing && !vmm.cut && free).then_some(())?;
                if !self.config.has(Flaw::CalledOffWithRecord) {
                    vm.claim.handed = None;
                }
                self.mark(Mark::HandoverCalledOff);
                self.go_on(s, id, node, vmm);
            }
            VmmAct::GoOn => self.go_on(s, id, node, vmm),
            VmmAct::Run | VmmAct::GiveUp => return None,
        }
        Some(())
    }

    /// A sealed guest goes on under the same epoch.
    fn go_on(&self, s: &mut State, id: VmId, node: NodeId, vmm: Vmm) {
        let vm = s.vm_mut(id);
        vm.files.fresh = None;
        let vmm = Vmm { phase: Phase::Running, handing: false, promised: false, ..vmm };
        vm.agent_mut(node).vmm = Some(vmm);
    }
}
