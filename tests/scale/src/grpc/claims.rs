//! Who holds each VM's claim: what the shared storage says of all simulated hosts, and the check
//! that no VM is started beside a runner that lives.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bellwether_types::{Epoch, NodeId, VmId};
use tokio::sync::watch;
use tonic::Status;

/// The last that took a VM's claim.
#[derive(Clone, Copy, Debug)]
struct Claim {
    node: NodeId,
    epoch: Epoch,
    /// Its VMM lives, and so the lock is held.
    held: bool,
    runs: bool,
}

#[derive(Debug, Default)]
struct Inner {
    by_vm: BTreeMap<VmId, Claim>,
    running: usize,
    /// The first order that would have run a VM twice.
    broken: Option<String>,
}

impl Inner {
    fn put(&mut self, vm: VmId, claim: Claim) {
        let before = self.by_vm.insert(vm, claim);
        self.running += usize::from(claim.runs);
        self.running -= usize::from(before.is_some_and(|claim| claim.runs));
    }
}

/// The claims of all VMs.
#[derive(Debug, Default)]
pub struct Claims {
    inner: Mutex<Inner>,
    running: watch::Sender<usize>,
}

impl Claims {
    /// Takes a claim whose last holder is gone, or says who holds it.
    pub fn take(&self, vm: VmId, epoch: Epoch, node: NodeId) -> Result<(), String> {
        let mut inner = self.lock();
        match inner.by_vm.get(&vm) {
            Some(claim) if claim.held && claim.node != node => {
                Err(format!("node {} under epoch {}", claim.node, claim.epoch))
            }
            Some(claim) if claim.held => Ok(()),
            _ => {
                inner.put(vm, Claim { node, epoch, held: true, runs: false });
                Ok(())
            }
        }
    }

    /// A guest is to run its first instruction.
    pub fn run(&self, vm: VmId, epoch: Epoch, node: NodeId) -> Result<(), Status> {
        let mut inner = self.lock();
        match inner.by_vm.get(&vm).copied() {
            Some(claim) if claim.held && claim.node != node => {
                let text = format!("VM {vm} is to start on {node} while {} runs it", claim.node);
                inner.broken.get_or_insert_with(|| text.clone());
                return Err(Status::aborted(text));
            }
            Some(claim) if epoch < claim.epoch => {
                return Err(Status::aborted(format!("the claim has epoch {}", claim.epoch)));
            }
            _ => inner.put(vm, Claim { node, epoch, held: true, runs: true }),
        }
        self.tell(&inner);
        Ok(())
    }

    /// The VMM has ended.
    pub fn let_go(&self, vm: VmId, up_to: Epoch, node: NodeId) {
        let mut inner = self.lock();
        let known = inner.by_vm.get(&vm).copied();
        if let Some(claim) = known.filter(|claim| claim.node == node && claim.epoch <= up_to) {
            inner.put(vm, Claim { held: false, runs: false, ..claim });
            self.tell(&inner);
        }
    }

    /// The hosts have lost power, and with it every lock. Returns how many VMs ran there.
    pub fn lose(&self, nodes: &[NodeId]) -> usize {
        let mut inner = self.lock();
        let before = inner.running;
        let lost = inner.by_vm.iter().filter(|(_, claim)| nodes.contains(&claim.node));
        let lost: Vec<(VmId, Claim)> = lost.map(|(vm, claim)| (*vm, *claim)).collect();
        for (vm, claim) in lost {
            inner.put(vm, Claim { held: false, runs: false, ..claim });
        }
        self.tell(&inner);
        before - inner.running
    }

    /// Follows how many VMs run.
    pub fn running(&self) -> watch::Receiver<usize> {
        self.running.subscribe()
    }

    /// The first order that would have run a VM twice, if there was one.
    pub fn broken(&self) -> Option<String> {
        self.lock().broken.clone()
    }

    fn tell(&self, inner: &Inner) {
        let now = inner.running;
        self.running.send_if_modified(|known| std::mem::replace(known, now) != now);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_vm_that_runs_is_not_started_elsewhere_before_its_host_is_lost() {
        let (claims, vm) = (Claims::default(), VmId::from_uuid(Uuid::from_u128(1)));
        claims.run(vm, Epoch(1), NodeId(1)).unwrap();
        assert_eq!(*claims.running().borrow(), 1);
        claims.take(vm, Epoch(2), NodeId(2)).unwrap_err();
        assert_eq!(claims.broken(), None, "it was only asked");
        claims.run(vm, Epoch(2), NodeId(2)).unwrap_err();
        assert!(claims.broken().is_some());
        assert_eq!(claims.lose(&[NodeId(1)]), 1);
        claims.take(vm, Epoch(2), NodeId(2)).unwrap();
        assert_eq!(*claims.running().borrow(), 0);
        claims.run(vm, Epoch(2), NodeId(2)).unwrap();
        claims.run(vm, Epoch(1), NodeId(2)).unwrap_err();
        assert_eq!(*claims.running().borrow(), 1);
        claims.let_go(vm, Epoch(2), NodeId(2));
        assert_eq!(*claims.running().borrow(), 0);
    }
}
