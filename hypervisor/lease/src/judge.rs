//! What a page means for the VMM that reads it. Pure.
//!
//! | arbiter | the page shows | the guest |
//! |---|---|---|
//! | lease | our epoch, a deadline ahead | runs until then |
//! | lease | anything else, or it is corrupt | is held until a new grant |
//! | lease, storage | a higher epoch than ours | is held: it is superseded |
//! | storage, none | anything else | runs: the locks decide |

use crate::LeaseView;

/// Who decides whether the VM goes on without a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arbiter {
    /// The locks that the VMM holds.
    Storage,
    /// The deadline in the shared page.
    Lease,
    /// Nobody: a VMM that works alone.
    None,
}

/// Whether the VM may run now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Until this instant, CLOCK_BOOTTIME nanoseconds, if there is an end.
    Valid {
        until_ns: Option<u64>,
    },
    Expired,
    Superseded,
}

/// Decides from what the page says; `None` stands for a corrupt page.
pub fn judge(arbiter: Arbiter, epoch: u64, page: Option<LeaseView>, now_ns: u64) -> Verdict {
    match (arbiter, page) {
        (Arbiter::None, _) => Verdict::Valid { until_ns: None },
        (_, Some(view)) if epoch != 0 && view.epoch > epoch => Verdict::Superseded,
        (Arbiter::Storage, _) => Verdict::Valid { until_ns: None },
        (Arbiter::Lease, Some(LeaseView { epoch: granted, deadline_ns }))
            if granted == epoch && deadline_ns > now_ns =>
        {
            Verdict::Valid { until_ns: Some(deadline_ns) }
        }
        (Arbiter::Lease, _) => Verdict::Expired,
    }
}

/// What becomes of a page that gets a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// It says this now.
    Write(LeaseView),
    /// It stays: within an epoch the deadline never moves back.
    Keep,
    /// The page is for a newer epoch: an older one gets no lease.
    OlderEpoch,
}

/// Decides what a grant of `epoch` until `deadline_ns` does to a page that says `current`.
pub fn grant(current: LeaseView, epoch: u64, deadline_ns: u64) -> Grant {
    match epoch.cmp(&current.epoch) {
        std::cmp::Ordering::Less => Grant::OlderEpoch,
        std::cmp::Ordering::Equal if deadline_ns <= current.deadline_ns => Grant::Keep,
        _ => Grant::Write(LeaseView { epoch, deadline_ns }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: LeaseView = LeaseView { epoch: 7, deadline_ns: 1000 };

    #[test]
    fn a_lease_arbiter_needs_a_grant_of_its_own_epoch() {
        let lease = |epoch, page, now| judge(Arbiter::Lease, epoch, page, now);
        assert_eq!(lease(7, Some(PAGE), 999), Verdict::Valid { until_ns: Some(1000) });
        assert_eq!(lease(7, Some(PAGE), 1000), Verdict::Expired);
        assert_eq!(lease(8, Some(PAGE), 0), Verdict::Expired);
        assert_eq!(lease(6, Some(PAGE), 0), Verdict::Superseded);
        assert_eq!(lease(7, None, 0), Verdict::Expired);
        assert_eq!(lease(0, Some(PAGE), 0), Verdict::Expired);
    }

    #[test]
    fn a_storage_arbiter_stops_for_a_higher_epoch_only() {
        let storage = |epoch, page, now| judge(Arbiter::Storage, epoch, page, now);
        let on = Verdict::Valid { until_ns: None };
        assert_eq!(storage(7, Some(PAGE), 5000), on);
        assert_eq!(storage(8, Some(PAGE), 5000), on);
        assert_eq!(storage(7, None, 0), on);
        assert_eq!(storage(6, Some(PAGE), 0), Verdict::Superseded);
    }
}
