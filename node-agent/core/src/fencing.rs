//! What the fencer decides: when to pet the watchdog, and whom to kill. Functions of the time and of
//! what others wrote.
//!
//! ```text
//!                    +-------------------- a fresh grant -------------------+
//!                    v                                                      |
//!   start ---> pets (granted) --- the grant is P old ---> does a VM depend on the lease here?
//!                    ^                                       | no, none        | yes, or unknown
//!                    |                                       v                 v
//!                    |                              pets (nobody depends)    holds ---> Twd later the
//!                    +---- a fresh grant, or the last of them stopped ---------+        host is reset
//! ```
//!
//! A VM whose arbiter is the storage never depends on the lease: losing all controllers does not
//! reset the host that runs it. Of the others, one that has stopped its guest, or whose process is
//! gone, does not depend on it any more. So a host is reset only if something on it runs on though
//! it must not, or if nothing on it can be known.

/// The VMs of this node that may run under the lease only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dependents {
    None,
    Some,
    /// What the agent wrote cannot be read.
    Unknown,
}

impl Dependents {
    /// Both together.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
            (Self::None, Self::None) => Self::None,
            _ => Self::Some,
        }
    }
}

/// What the grant page says, judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Grant {
    Fresh,
    /// No grant was ever given, or the page is corrupt.
    Missing,
    Stale,
    /// Its end is further ahead than any grant's: it is nobody's.
    TooFarAhead,
}

/// Judges the deadline of the grant page, `t_s + P`; `None` stands for a corrupt one.
pub fn grant(deadline_ns: Option<u64>, now_ns: u64, pet_ns: u64) -> Grant {
    match deadline_ns.unwrap_or(0) {
        0 => Grant::Missing,
        deadline_ns if deadline_ns <= now_ns => Grant::Stale,
        deadline_ns if deadline_ns - now_ns > pet_ns => Grant::TooFarAhead,
        _ => Grant::Fresh,
    }
}

/// Whether the watchdog is petted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Petting {
    Granted,
    NobodyDepends,
    /// The host is reset when the watchdog's period has passed.
    Held,
}

pub fn petting(grant: Grant, dependents: Dependents) -> Petting {
    match (grant, dependents) {
        (Grant::Fresh, _) => Petting::Granted,
        (_, Dependents::None) => Petting::NobodyDepends,
        (_, Dependents::Some | Dependents::Unknown) => Petting::Held,
    }
}

/// A VMM whose arbiter is the lease, and that may have let its guest run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vmm {
    /// The deadline of its lease page, 0 before any grant; `None` if the page is corrupt or gone, which
    /// counts as expired long ago.
    pub deadline_ns: Option<u64>,
    /// It says that its guest is stopped and its I/O drained.
    pub held: bool,
}

/// What is to be done about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It has stopped, or never had leave to run.
    Quiet,
    /// It may run.
    Runs,
    /// Its deadline has passed a moment ago; it should be stopping.
    Stops,
    Kill,
}

impl Verdict {
    pub fn dependents(self) -> Dependents {
        match self {
            Self::Quiet => Dependents::None,
            Self::Runs | Self::Stops | Self::Kill => Dependents::Some,
        }
    }
}

/// Judges a VMM. `stop_ns` is how long it may take to stop.
pub fn verdict(vmm: Vmm, now_ns: u64, stop_ns: u64) -> Verdict {
    match vmm.deadline_ns {
        _ if vmm.held => Verdict::Quiet,
        Some(0) => Verdict::Quiet,
        Some(deadline_ns) if deadline_ns > now_ns => Verdict::Runs,
        Some(deadline_ns) if now_ns - deadline_ns < stop_ns => Verdict::Stops,
        _ => Verdict::Kill,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const P: u64 = 1_000;

    #[test]
    fn a_grant_is_fresh_until_its_end_and_not_at_it() {
        assert_eq!(grant(Some(1_001), 1_000, P), Grant::Fresh);
        assert_eq!(grant(Some(2_000), 1_000, P), Grant::Fresh);
        assert_eq!(grant(Some(2_001), 1_000, P), Grant::TooFarAhead);
        assert_eq!(grant(Some(1_000), 1_000, P), Grant::Stale);
        assert_eq!(grant(Some(0), 1_000, P), Grant::Missing);
        assert_eq!(grant(None, 1_000, P), Grant::Missing);
    }

    #[test]
    fn a_vmm_is_killed_only_after_its_time_to_stop() {
        let at = |now_ns, held| verdict(Vmm { deadline_ns: Some(1_000), held }, now_ns, 100);
        assert_eq!(at(999, false), Verdict::Runs);
        assert_eq!(at(1_000, false), Verdict::Stops);
        assert_eq!(at(1_099, false), Verdict::Stops);
        assert_eq!(at(1_100, false), Verdict::Kill);
        assert_eq!(at(9_999, true), Verdict::Quiet);
        assert_eq!(verdict(Vmm { deadline_ns: Some(0), held: false }, 9, 100), Verdict::Quiet);
        assert_eq!(verdict(Vmm { deadline_ns: None, held: false }, 9, 100), Verdict::Kill);
    }

    fn dependents() -> impl Strategy<Value = Dependents> {
        prop_oneof![Just(Dependents::None), Just(Dependents::Some), Just(Dependents::Unknown)]
    }

    proptest! {
        /// The promise behind the proof `watchdog`: while something depends on the lease, no pet
        /// comes later than a grant's own end, and so none later than P after its stamp.
        #[test]
        fn with_dependents_the_last_pet_is_under_a_grant(
            stamps in proptest::collection::vec(0u64..20_000, 0..8), now in 1u64..40_000,
            known in any::<bool>(),
        ) {
            let last = stamps.iter().filter(|stamp| **stamp <= now).max();
            let page = Some(last.map_or(0, |stamp| stamp + P));
            let who = if known { Dependents::Some } else { Dependents::Unknown };
            let pets = petting(grant(page, now, P), who) != Petting::Held;
            prop_assert_eq!(pets, last.is_some_and(|stamp| now < stamp + P));
        }

        /// A host on which nothing depends on the lease is never reset, whatever the page says.
        #[test]
        fn without_dependents_nothing_resets_the_host(deadline in any::<u64>(), now in any::<u64>()) {
            let petting = petting(grant(Some(deadline), now, P), Dependents::None);
            prop_assert_ne!(petting, Petting::Held);
        }

        /// Nobody with leave to run is killed, and nobody that has stopped.
        #[test]
        fn only_the_overdue_are_killed(
            deadline in 1u64..1 << 40, now in 0u64..1 << 40, stop in 1u64..1 << 30, held in any::<bool>(),
        ) {
            let vmm = Vmm { deadline_ns: Some(deadline), held };
            let killed = verdict(vmm, now, stop) == Verdict::Kill;
            prop_assert_eq!(killed, !held && now >= deadline + stop);
        }

        #[test]
        fn the_worse_of_two_counts(a in dependents(), b in dependents()) {
            prop_assert_eq!(a.and(b), b.and(a));
            prop_assert_eq!(a.and(Dependents::None), a);
            prop_assert_eq!(a.and(Dependents::Unknown), Dependents::Unknown);
        }
    }
}
