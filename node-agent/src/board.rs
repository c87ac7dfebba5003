//! What this node tells the controllers: the newest observation of each VM.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bellwether_agent_core::Observation;
use bellwether_types::VmId;
use tokio::sync::Notify;

/// The observations of all VMs. The owner of a VM posts, the renewal reads.
#[derive(Debug, Default)]
pub struct Board {
    observations: Mutex<BTreeMap<VmId, Observation>>,
    changed: Notify,
}

impl Board {
    /// Posts what is seen of a VM; none takes it off.
    pub fn post(&self, vm: VmId, observation: Option<Observation>) {
        let mut observations = self.lock();
        let old = match observation.clone() {
            Some(new) => observations.insert(vm, new),
            None => observations.remove(&vm),
        };
        // Progress of a restore can wait for the next renewal; a change of state cannot.
        let key = |it: &Observation| (it.epoch, it.state, it.reason.clone());
        if old.as_ref().map(key) != observation.as_ref().map(key) {
            self.changed.notify_one();
        }
    }

    pub fn all(&self) -> Vec<(VmId, Observation)> {
        self.lock().iter().map(|(vm, observation)| (*vm, observation.clone())).collect()
    }

    /// Waits for a change of state that was not waited for before.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Asks for a renewal now.
    pub fn hurry(&self) {
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Observation>> {
        self.observations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
