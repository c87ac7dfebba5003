//! Leases, the watchdog and the leader's wait.
//!
//! A tick is real time. Each clock may drift within its bound, and the bound is in the numbers: a
//! node's deadline and its watchdog come *at the latest* after so many ticks, because its clock may
//! be slow; the leader's wait is over *at the earliest* after so many, because its clock may be
//! fast. Whatever happens earlier than at the latest is covered by other transitions: a host may
//! lose its power at any time, an order may be late, a leader may wait longer.

use crate::config::Flaw;
use crate::marks::Mark;
use crate::model::Protocol;
use crate::state::{Answer, Node, Phase, Place, Renewal, State, Step, VMS_MAX, Vm, Vmm};
use crate::words::{Boot, Epoch, NodeId, VmId};

/// `L/(1-d) + stop + drain`: so long after the stamp a guest may write at the latest.
const LEASE_TICKS: u8 = 2;
/// `P/(1-d) + Twd*(1+e) + reset`: so long after the stamp the watchdog has reset the host.
const RESET_TICKS: u8 = 3;
/// `W/(1+d)`: so long the leader waits at the least; the design asks for the larger of the two.
const WAIT_TICKS: u8 = 3;

impl Protocol {
    /// Whether a VMM may write the disks: its gate is open, and nothing rejects its writes.
    pub(crate) fn writes(&self, vmm: &Vmm) -> bool {
        let leave = match self.config.arbiter {
            crate::config::Arbiter::Storage => !vmm.cut,
            crate::config::Arbiter::Lease => vmm.lease.is_some() || vmm.stuck,
        };
        vmm.phase == Phase::Running && leave
    }

    pub(crate) fn ask(&self, s: &mut State, id: NodeId) -> Option<()> {
        let node = s.node_mut(id);
        (node.renewal != Renewal::Asked { age: 0 }).then_some(())?;
        node.renewal = Renewal::Asked { age: 0 };
        Some(())
    }

    /// `reconcile.rs::grants`, by a leader that a quorum has confirmed since the request came in.
    pub(crate) fn grant(&self, s: &mut State, id: NodeId) -> Option<()> {
        let Node { renewal: Renewal::Asked { age }, boot, known_boot, .. } = *s.node(id) else {
            return None;
        };
        (boot == known_boot).then_some(())?;
        let mut names = [None; VMS_MAX];
        for (name, vm) in names.iter_mut().zip(&s.vms) {
            *name = self.granted_epoch(vm, id, boot);
        }
        let node = s.node_mut(id);
        node.renewal = Renewal::Granted { age, names };
        if !(self.config.has(Flaw::NoRevocation) && node.unknown) {
            node.quiet = 0;
        }
        Some(())
    }

    fn granted_epoch(&self, vm: &Vm, node: NodeId, boot: Boot) -> Option<Epoch> {
        let runner = match vm.place {
            Place::Runner(runner) => runner,
            Place::Revoked(runner) if self.config.has(Flaw::NoRevocation) => runner,
            _ => return None,
        };
        (runner.node == node && runner.boot == boot).then_some(runner.epoch)
    }

    /// The deadline is the stamp's, however long the answer was under way, and never moves back.
    pub(crate) fn grant_arrives(&self, s: &mut State, id: NodeId) -> Option<()> {
        let Renewal::Granted { age, names } = s.node(id).renewal else { return None };
        let age = if self.config.has(Flaw::LeaseFromArrival) { 0 } else { age };
        let node = s.node_mut(id);
        node.renewal = Renewal::None;
        node.granted = Some(node.granted.map_or(age, |old| old.min(age)));
        for (vm, name) in s.vms.iter_mut().zip(names) {
            let Some(vmm) = vm.vmm_mut(id).filter(|vmm| Some(vmm.epoch) == name) else { continue };
            if vmm.phase == Phase::Running && vmm.lease.is_none() && !vmm.stuck {
                self.mark(Mark::WentOnAfterGrant);
            }
            vmm.lease = Some(vmm.lease.map_or(age, |old| old.min(age)));
        }
        Some(())
    }

    /// A tick passes: deadlines and watchdogs that are due come now.
    pub(crate) fn tick(&self, s: &mut State) -> Option<()> {
        for id in self.node_ids() {
            let node = s.node_mut(id);
            node.quiet = (node.quiet + 1).min(WAIT_TICKS);
            node.renewal = older(node.renewal);
            node.granted = node.granted.map(|age| age + 1);
            let fires = node.granted.is_some_and(|age| age >= RESET_TICKS);
            for vm in &mut s.vms {
                self.tick_vmm(vm, id, fires);
            }
            if fires {
                self.mark(Mark::WatchdogFired);
                self.reset(s, id);
            }
        }
        Some(())
    }

    fn tick_vmm(&self, vm: &mut Vm, id: NodeId, fires: bool) {
        let Some(vmm) = vm.vmm_mut(id) else { return };
        let leased = vmm.lease.is_some();
        vmm.lease = vmm.lease.map(|age| age + 1).filter(|age| *age < LEASE_TICKS);
        if vmm.phase == Phase::Running && leased && vmm.lease.is_none() && !vmm.stuck {
            self.mark(Mark::PausedAtDeadline);
        }
        if fires && vmm.stuck {
            self.mark(Mark::StuckUntilReset);
        }
    }

    /// The host stops dead and boots anew, whatever the reason.
    pub(crate) fn reset(&self, s: &mut State, id: NodeId) {
        let node = s.node_mut(id);
        node.boot = Boot(node.boot.0 + 1);
        node.granted = None;
        node.renewal = Renewal::None;
        for vm in &mut s.vms {
            vm.end_process(id);
            *vm.agent_mut(id) = crate::state::Agent::default();
        }
    }

    /// The leader decides that the watchdog's bound has passed. It is committed later.
    pub(crate) fn fence_by_watchdog(&self, s: &mut State, id: VmId) -> Option<()> {
        let vm = s.vm(id);
        let Place::Revoked(old) = vm.place else { return None };
        let wait = WAIT_TICKS - u8::from(self.config.has(Flaw::WaitTooShort));
        let chooses = vm.task.is_some_and(|task| task.step == Step::Choose);
        (chooses && s.node(old.node).quiet >= wait).then_some(())?;
        s.vm_mut(id).answers.insert(Answer::Fenced);
        Some(())
    }

    /// Another leader: it heard nobody, so it waits from its own election.
    pub(crate) fn leader_lost(&self, s: &mut State) -> Option<()> {
        let nodes = self.node_ids();
        for id in nodes {
            let quiet = &mut s.node_mut(id).quiet;
            *quiet = if self.config.has(Flaw::WaitIgnoresElection) { WAIT_TICKS } else { 0 };
        }
        for vm in &mut s.vms {
            vm.answers.clear();
        }
        Some(())
    }
}

/// A request, or its grant, that is older than the lease is worth nothing: it pets no watchdog and
/// moves no deadline.
fn older(renewal: Renewal) -> Renewal {
    match renewal {
        Renewal::Asked { age } if age + 1 < LEASE_TICKS => Renewal::Asked { age: age + 1 },
        Renewal::Granted { age, names } if age + 1 < LEASE_TICKS => {
            Renewal::Granted { age: age + 1, names }
        }
        _ => Renewal::None,
    }
}
