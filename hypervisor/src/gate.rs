//! The gate: one place that decides whether the guest runs and its disks work.
//!
//! ```text
//! holds: not-started, administrator, lease, superseded, claim, unlocked, io-error, save, ended
//! open  <=>  no hold is set
//!
//!   vCPU thread:  enter (waits while closed) -> KVM_RUN ... -> kicked -> leave
//!   disk worker:  try_enter -> requests, each after `may_submit` -> leave
//!   whoever:      hold(reason) -> kicks the vCPUs;  release(reason) -> opens if it was the last
//! ```
//!
//! Each reason is set and released by its own owner only, so that a lease that returns never
//! resumes what an administrator paused. A crash of the process takes the gate with it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;

/// Why the guest does not run. The lowest bit that is set is the one to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hold {
    /// The guest ended its own life, or cannot go on.
    Ended = 1 << 0,
    /// Not started yet, or sealed.
    NotStarted = 1 << 1,
    /// Restored memory cannot be read.
    IoError = 1 << 2,
    /// The shared page shows a higher epoch: another runner may own the VM.
    Superseded = 1 << 3,
    /// The lease's deadline has passed.
    Lease = 1 << 4,
    Administrator = 1 << 5,
    /// A save is in progress.
    Save = 1 << 6,
    /// The claim cannot be written, or shows a later runner.
    Claim = 1 << 7,
    /// The locks were let go after the lease had run out.
    Unlocked = 1 << 8,
}

/// What must hold at each disk submission; cheap, no system call but the clock.
pub type Permit = Box<dyn Fn() -> bool + Send + Sync>;
/// Gets the vCPUs out of the guest.
pub type Kick = Box<dyn Fn() + Send + Sync>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Vcpu,
    Disk,
}

#[derive(Default)]
struct Inside {
    vcpus: u32,
    disks: u32,
    /// CLOCK_BOOTTIME of the first vCPU that came in after the gate opened.
    first_entry_ns: Option<u64>,
}

pub struct Gate {
    holds: AtomicU32,
    inside: Mutex<Inside>,
    changed: Condvar,
    kick: OnceLock<Kick>,
    permit: OnceLock<Permit>,
}

/// The right to be inside; leaving is dropping it.
pub struct Pass<'a> {
    gate: &'a Gate,
    who: Who,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// A closed gate: the guest has not started.
    pub fn new() -> Self {
        Self {
            holds: AtomicU32::new(Hold::NotStarted as u32),
            inside: Mutex::default(),
            changed: Condvar::new(),
            kick: OnceLock::new(),
            permit: OnceLock::new(),
        }
    }

    /// Sets how vCPUs are kicked; once.
    pub fn set_kick(&self, kick: Kick) {
        let _set_before = self.kick.set(kick);
    }

    /// Sets what is checked before each disk submission; once.
    pub fn set_permit(&self, permit: Permit) {
        let _set_before = self.permit.set(permit);
    }

    /// Closes the gate for `reason`, without waiting for anyone to leave. True if it was not held
    /// for this reason before.
    pub fn hold(&self, reason: Hold) -> bool {
        let before = {
            let _inside = self.lock();
            self.holds.fetch_or(reason as u32, Ordering::SeqCst)
        };
        // After the lock: a vCPU that entered before sees the kick, one that comes later the hold.
        if let Some(kick) = self.kick.get() {
            kick();
        }
        before & reason as u32 == 0
    }

    /// Takes `reason` back; true if it was held. The gate opens if that was the last one.
    pub fn release(&self, reason: Hold) -> bool {
        let before = {
            let mut inside = self.lock();
            inside.first_entry_ns = None;
            self.holds.fetch_and(!(reason as u32), Ordering::SeqCst)
        };
        self.changed.notify_all();
        before & reason as u32 != 0
    }

    pub fn is_held(&self, reason: Hold) -> bool {
        self.holds.load(Ordering::SeqCst) & reason as u32 != 0
    }

    pub fn is_open(&self) -> bool {
        self.holds.load(Ordering::SeqCst) == 0
    }

    /// Whether a disk may be written or read now.
    pub fn may_submit(&self) -> bool {
        self.is_open() && self.permit.get().is_none_or(|permit| permit())
    }

    /// Waits until the gate is open, then enters as a vCPU. `prepare` runs when nobody can close
    /// the gate unseen: a kick that comes after it is not lost.
    pub fn enter(&self, prepare: impl FnOnce()) -> Pass<'_> {
        let mut inside = self.wait_open_locked();
        prepare();
        inside.vcpus += 1;
        inside.first_entry_ns.get_or_insert_with(clock::boottime_ns);
        drop(inside);
        self.changed.notify_all();
        Pass { gate: self, who: Who::Vcpu }
    }

    /// Enters as a disk, if the gate is open.
    pub fn try_enter(&self) -> Option<Pass<'_>> {
        let mut inside = self.lock();
        if !self.is_open() {
            return None;
        }
        inside.disks += 1;
        Some(Pass { gate: self, who: Who::Disk })
    }

    /// Waits until the gate is open.
    pub fn wait_open(&self) {
        drop(self.wait_open_locked());
    }

    /// Waits until no vCPU is in the guest; false after `longest`.
    pub fn wait_vcpus_out(&self, longest: Duration) -> bool {
        self.wait_until(longest, |inside| inside.vcpus == 0)
    }

    /// Waits until no disk request is outstanding; false after `longest`.
    pub fn wait_disks_idle(&self, longest: Duration) -> bool {
        self.wait_until(longest, |inside| inside.disks == 0)
    }

    /// Whether no vCPU is in the guest and no disk request is outstanding.
    pub fn is_still(&self) -> bool {
        let inside = self.lock();
        inside.vcpus == 0 && inside.disks == 0
    }

    /// Waits until a vCPU runs; returns when that was, CLOCK_BOOTTIME.
    pub fn wait_entered(&self, longest: Duration) -> Option<u64> {
        self.wait_until(longest, |inside| inside.first_entry_ns.is_some() || !self.is_open());
        self.lock().first_entry_ns
    }

    fn wait_until(&self, longest: Duration, done: impl Fn(&Inside) -> bool) -> bool {
        let deadline = Instant::now() + longest;
        let mut inside = self.lock();
        loop {
            if done(&inside) {
                return true;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            let result = self.changed.wait_timeout(inside, left);
            inside = result.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn wait_open_locked(&self) -> MutexGuard<'_, Inside> {
        let mut inside = self.lock();
        while !self.is_open() {
            inside = self.changed.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        inside
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut inside = self.gate.lock();
        match self.who {
            Who::Vcpu => inside.vcpus -= 1,
            Who::Disk => inside.disks -= 1,
        }
        drop(inside);
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn each_hold_is_released_by_its_own_reason() {
        let gate = Gate::new();
        assert!(gate.release(Hold::NotStarted));
        assert!(gate.hold(Hold::Administrator));
        assert!(gate.hold(Hold::Lease));
        assert!(!gate.hold(Hold::Lease));
        assert!(gate.release(Hold::Lease));
        assert!(!gate.is_open());
        assert!(gate.try_enter().is_none());
        assert!(gate.release(Hold::Administrator));
        assert!(gate.is_open());
    }

    #[test]
    fn a_closing_gate_waits_for_those_inside() {
        let gate = Arc::new(Gate::new());
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        gate.set_kick(Box::new(move || seen.store(true, Ordering::SeqCst)));
        gate.release(Hold::NotStarted);
        let inner = Arc::clone(&gate);
        let vcpu = std::thread::spawn(move || {
            let pass = inner.enter(|| {});
            while !stop.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            drop(pass);
        });
        assert!(gate.wait_entered(LONG).is_some());
        assert!(!gate.wait_vcpus_out(Duration::from_millis(1)));
        gate.hold(Hold::Save);
        assert!(gate.wait_vcpus_out(LONG));
        vcpu.join().unwrap();
    }

    #[test]
    fn a_permit_that_is_gone_stops_submissions() {
        let gate = Gate::new();
        gate.release(Hold::NotStarted);
        let valid = Arc::new(AtomicBool::new(true));
        let permit = Arc::clone(&valid);
        gate.set_permit(Box::new(move || permit.load(Ordering::SeqCst)));
        assert!(gate.may_submit());
        valid.store(false, Ordering::SeqCst);
        assert!(!gate.may_submit());
    }
}
