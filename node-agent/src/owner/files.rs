//! Files on the shared storage that a VM leaves behind.

use std::path::{Path, PathBuf};

use bellwether_agent_core::Phase;
use bellwether_claim::{Claim, ClaimRecord, claim_path};
use bellwether_types::Epoch;

use super::execute::on_storage;
use super::{Command, Failure, Owner, Reply};
use crate::storage::{self, StorageError};

impl Owner {
    /// Removes old state files; `purge` also removes the claim of a VM that is being deleted.
    pub(super) async fn remove_state(
        &self,
        command: &Command,
        storage: &Path,
        purge: bool,
    ) -> Result<Reply, Failure> {
        let (vm, up_to, in_use) = (self.vm, command.stamped.epoch, self.files_in_use());
        let root = storage.to_owned();
        let claim = purge.then(|| (claim_path(storage, vm), self.claimant(command)));
        let remove = move || {
            let states = storage::remove_states(&root, vm, up_to, &in_use)?;
            let claim = claim.map(|(path, ours)| remove_claim(&path, ours)).transpose()?;
            Ok(states + u64::from(claim.unwrap_or(false)))
        };
        Ok(Reply::Removed { files: on_storage(storage, remove).await? })
    }

    fn claimant(&self, command: &Command) -> ClaimRecord {
        ClaimRecord {
            vm_id: self.vm,
            epoch: command.stamped.epoch,
            node: self.node.id,
            boot_id: self.node.boot_id,
            nonce: command.stamped.task,
        }
    }

    /// State files that a VMM on this node may still read or write.
    fn files_in_use(&self) -> Vec<PathBuf> {
        let Some(current) = self.machine.current().filter(|current| current.is_live()) else {
            return Vec::new();
        };
        let sealed = current.sealed.as_ref().map(|sealed| sealed.file.path.clone());
        let loaded_all = self.sight.as_ref().is_some_and(|sight| {
            current.phase == Phase::Active && sight.memory_loaded_bytes == sight.memory_total_bytes
        });
        let loaded = self.body.as_ref().and_then(|body| body.loaded_file.clone());
        sealed.into_iter().chain(loaded.filter(|_| !loaded_all)).collect()
    }
}

/// Removes a claim file; false when there is none. One that somebody holds is an error: whoever
/// runs the VM would go on, and nobody would know.
fn remove_claim(path: &Path, ours: ClaimRecord) -> Result<bool, StorageError> {
    if !path.exists() {
        return Ok(false);
    }
    // Attempts may have raised the record beyond the VM's epoch; the lock is what counts here.
    let stored = Claim::peek(path).ok().and_then(|view| view.record).map(|record| record.epoch);
    let epoch = ours.epoch.max(stored.map_or(Epoch(0), Epoch::next));
    let removed = Claim::acquire(path, ClaimRecord { epoch, ..ours }).and_then(Claim::remove);
    removed.map(|()| true).map_err(StorageError::Claim)
}
