//! Which events an exploration has seen, and how often: a model in which a migration never
//! completes would satisfy every invariant.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! marks {
    ($($name:ident: $text:literal,)*) => {
        /// An event that is counted.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Mark { $($name,)* }

        impl Mark {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

marks! {
    Started: "a VM is started from its disks",
    Migrated: "a migration completes",
    Restored: "a saved VM is resumed",
    Saved: "a VM is saved",
    Stopped: "a VM is stopped",
    ClaimedBack: "a source claims its VM back",
    ClaimBackRefused: "a claim back is refused, and the file is kept",
    SealFailed: "a seal fails, and the guest goes on",
    TakenOver: "a VM is taken over with the proof `storage`",
    Busy: "a takeover finds the locks held",
    HandedOver: "a VM that was handed over is resumed elsewhere",
    HandoverCalledOff: "a handover is called off",
    HandoverCrashed: "a VMM dies between its handover record and its end",
    Reinstated: "a false alarm: the guest ran on",
    ProvenReleased: "a lost VM is started with the proof `released`",
    ProvenRebooted: "a lost VM is started with the proof `rebooted`",
    ProvenOperator: "a lost VM is started with the proof `operator`",
    ProvenWatchdog: "a lost VM is started with the proof `watchdog`",
    OperatorWasWrong: "an operator's word is wrong, and the locks hold",
    Reaped: "a start of unknown outcome is proven gone",
    NeverRan: "a refused start is given up",
    LateStartRefused: "a start that comes late is refused by the claim",
    StrayReleased: "a stray is released",
    PausedAtDeadline: "a guest is held at its deadline",
    WentOnAfterGrant: "a held guest goes on when it is granted again",
    WatchdogFired: "a watchdog resets its host",
    StuckUntilReset: "only the watchdog ends a guest that does not stop",
}

/// The counters of one exploration.
#[derive(Debug)]
pub struct Marks(Vec<AtomicU64>);

impl Default for Marks {
    fn default() -> Self {
        Self(Mark::ALL.iter().map(|_| AtomicU64::new(0)).collect())
    }
}

impl Marks {
    pub fn note(&self, mark: Mark) {
        self.0[mark as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn count(&self, mark: Mark) -> u64 {
        self.0[mark as usize].load(Ordering::Relaxed)
    }
}
