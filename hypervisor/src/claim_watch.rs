//! The watch over the VMM's own claim: whether the storage still takes its writes, and still shows
//! its record.
//!
//! On NFSv4 the server revokes the locks of a host that it has not heard from, and the host learns
//! of it with its next write to the claim or a disk. A guest that writes nothing would run on
//! beside its successor. So the record is written anew, through the descriptor that holds the lock,
//! and flushed, every [`PERIOD`] while the guest may run:
//!
//! | the renewal | the guest |
//! |---|---|
//! | succeeds | runs; a hold for an earlier failure ends, because the lock is proven held |
//! | fails | is held (`claim-lost: …`) until one succeeds |
//! | finds a later runner's record | is held for good |
//! | has no answer yet | runs: storage that hangs proves nothing. On NFSv4 its server may have given the lock away: the disks are safe, the guest executes until there is an answer |

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, thread};

use bellwether_claim::{Claim, ClaimError};

use crate::board::Board;
use crate::gate::{Gate, Hold};

/// The pause between two renewals: a third of the default lease.
pub const PERIOD: Duration = Duration::from_secs(1);

/// A claim under watch. It is held until this is dropped or the process ends.
pub struct WatchedClaim(Arc<Shared>);

struct Shared {
    /// Locked while a renewal is under way, so that letting go waits for it: a write that lands
    /// after the lock was let go could hit the record of the next runner.
    claim: Mutex<Option<Claim>>,
    is_over: Mutex<bool>,
    ended: Condvar,
}

impl WatchedClaim {
    /// Watches over a claim with a thread of its own.
    pub fn start(claim: Claim, gate: Arc<Gate>, board: Arc<Board>) -> io::Result<Self> {
        let (claim, is_over) = (Mutex::new(Some(claim)), Mutex::default());
        let shared = Arc::new(Shared { claim, is_over, ended: Condvar::new() });
        let watched = Arc::clone(&shared);
        thread::Builder::new().name("claim".into()).spawn(move || {
            while !watched.wait() {
                // Not started, or sealed: there is no guest to hold, and locks are let go soon.
                let renewed = match gate.is_held(Hold::NotStarted) {
                    true => continue,
                    false => watched.claim().as_mut().map(Claim::renew),
                };
                if !renewed.is_some_and(|renewed| judge(renewed, &gate, &board)) {
                    return;
                }
            }
        })?;
        Ok(Self(shared))
    }

    /// Does something with the claim, when no renewal is under way.
    pub fn with<T>(&self, work: impl FnOnce(&mut Claim) -> T) -> Option<T> {
        self.0.claim().as_mut().map(work)
    }
}

impl Drop for WatchedClaim {
    fn drop(&mut self) {
        *lock(&self.0.is_over) = true;
        self.0.ended.notify_all();
        // Here and not with the thread's own reference: whoever drops this relies on the end.
        drop(self.0.claim().take());
    }
}

impl Shared {
    fn claim(&self) -> MutexGuard<'_, Option<Claim>> {
        lock(&self.claim)
    }

    /// Waits for the next renewal; true if there is none any more.
    fn wait(&self) -> bool {
        let waited = self.ended.wait_timeout_while(lock(&self.is_over), PERIOD, |over| !*over);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Holds the guest or lets it go on; false when the watch is over because the claim is lost for good.
fn judge(renewed: Result<(), ClaimError>, gate: &Gate, board: &Board) -> bool {
    let Err(error) = renewed else {
        if gate.release(Hold::Claim) {
            tracing::warn!("the claim can be written again; the guest goes on");
        }
        return true;
    };
    // The reason comes first, so that nobody sees a hold without one.
    board.update(|view| view.claim_fault = format!("claim-lost: {error}"));
    if gate.hold(Hold::Claim) {
        tracing::error!(%error, "the guest is held: its claim may be somebody else's");
    }
    !matches!(error, ClaimError::Lost { .. })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn failed() -> Result<(), ClaimError> {
        let source = io::Error::from_raw_os_error(libc::EIO);
        Err(ClaimError::Io { operation: "writing the record", path: PathBuf::from("c"), source })
    }

    #[test]
    fn a_failed_renewal_holds_at_once_and_a_good_one_releases() {
        let (gate, board) = (Gate::new(), Board::default());
        gate.release(Hold::NotStarted);
        assert!(judge(failed(), &gate, &board));
        assert!(!gate.is_open());
        assert!(board.view().claim_fault.starts_with("claim-lost: writing the record of claim c"));
        gate.hold(Hold::Administrator);
        assert!(judge(Ok(()), &gate, &board));
        assert!(gate.is_held(Hold::Administrator), "that is not ours to release");
        gate.release(Hold::Administrator);
        assert!(gate.is_open());
    }
}
