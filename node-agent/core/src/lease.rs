//! The lease of this node: until when it may run VMs whose arbiter is the lease.
//!
//! ```text
//!                  matching answer                     either clock passes t_s + L
//!   never granted -----------------> granted until D --------------------------> expired
//!                                      ^   |  ^                                     |
//!                                      +---+  +-------------------------------------+
//!                                 later answer         matching answer to a newer request
//! ```
//!
//! The owner is the renewal task. Each request is stamped by this node before it is sent, and an
//! answer extends the lease to the stamp plus L, so that the network's delay only shortens it. The
//! answer counts only for the newest request, and once; the deadline never moves back. A crash of
//! the agent forgets the lease: the next agent starts at `never granted` and asks. The VMMs keep the
//! deadline that their pages show.
//!
//! *Two clocks.* The deadline goes to the VMMs as CLOCK_BOOTTIME, on which they set their timers:
//! it counts suspension, and nobody can set it. It can be slewed, though, so the agent also reads
//! CLOCK_MONOTONIC_RAW and takes the lease for expired as soon as *either* clock has progressed by
//! L since the request. Only the progress since the request is compared and never the progress
//! since the start: the difference of the two clocks grows without bound while they run (500 ppm
//! are 43 s a day), and a deadline that contained it would be late by as much. Over one lease the
//! rates differ by far less than the drift d = 0.1 that the waiting formulas of protocol 1 allow.

use bellwether_types::BootId;

/// The longest lease that an agent takes from a controller; a longer one is cut to this, because
/// it can only be a mistake and would defeat the waiting formulas.
pub const LEASE_MS_MAX: u64 = 60_000;

/// A contact is recent for this many leases, and for no less than [`CONTACT_NS_MIN`].
const CONTACT_LEASES: u64 = 10;
const CONTACT_NS_MIN: u64 = 30_000_000_000;

/// Whether the last registration or renewal of this boot was recent enough to start a guest.
pub fn is_recent(last_contact: Option<Stamp>, now: Stamp, lease_ms: u64) -> bool {
    let recent_ns = lease_ms.saturating_mul(CONTACT_LEASES * 1_000_000).max(CONTACT_NS_MIN);
    last_contact.is_some_and(|at| now.since(&at) < recent_ns)
}

/// One reading of both clocks, nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stamp {
    /// CLOCK_BOOTTIME.
    pub boot_ns: u64,
    /// CLOCK_MONOTONIC_RAW.
    pub raw_ns: u64,
}

impl Stamp {
    /// What has passed since `earlier`: the larger progress of the two clocks.
    pub fn since(&self, earlier: &Self) -> u64 {
        let boot = self.boot_ns.saturating_sub(earlier.boot_ns);
        let raw = self.raw_ns.saturating_sub(earlier.raw_ns);
        boot.max(raw)
    }
}

/// What a renewal carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseRequest {
    pub nonce: u64,
    pub boot_id: BootId,
    /// t_s.
    pub stamp: Stamp,
}

/// What an answer did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseAnswer {
    /// The lease now ends at this CLOCK_BOOTTIME, nanoseconds.
    Granted { deadline_ns: u64 },
    /// It answers another request than the newest, or answers it again: it is ignored.
    NotAsked,
    /// It grants nothing that the node does not have already.
    NotLater,
}

/// Where the lease stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseState {
    NeverGranted,
    GrantedUntil { deadline_ns: u64 },
    Expired { since_ns: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Granted {
    stamp: Stamp,
    length_ns: u64,
}

impl Granted {
    fn deadline_ns(&self) -> u64 {
        self.stamp.boot_ns.saturating_add(self.length_ns)
    }
}

/// The lease machine.
#[derive(Clone, Debug)]
pub struct Lease {
    boot_id: BootId,
    nonce: u64,
    /// The newest request, until it is answered.
    pending: Option<LeaseRequest>,
    granted: Option<Granted>,
}

impl Lease {
    /// `first_nonce` keeps the answers to an earlier agent of this boot from matching.
    pub fn new(boot_id: BootId, first_nonce: u64) -> Self {
        Self { boot_id, nonce: first_nonce, pending: None, granted: None }
    }

    /// A new request, stamped now. It makes every earlier one unanswerable.
    pub fn request(&mut self, now: Stamp) -> LeaseRequest {
        self.nonce = self.nonce.wrapping_add(1);
        let request = LeaseRequest { nonce: self.nonce, boot_id: self.boot_id, stamp: now };
        self.pending = Some(request);
        request
    }

    /// An answer has come.
    pub fn answer(&mut self, nonce: u64, lease_ms: u64) -> LeaseAnswer {
        let Some(request) = self.pending.take_if(|request| request.nonce == nonce) else {
            return LeaseAnswer::NotAsked;
        };
        let length_ns = lease_ms.min(LEASE_MS_MAX).saturating_mul(1_000_000);
        let granted = Granted { stamp: request.stamp, length_ns };
        if self.granted.is_some_and(|old| granted.deadline_ns() <= old.deadline_ns()) {
            return LeaseAnswer::NotLater;
        }
        self.granted = Some(granted);
        LeaseAnswer::Granted { deadline_ns: granted.deadline_ns() }
    }

    /// Where the lease stands now. Both clocks must still be before its end.
    pub fn state(&self, now: Stamp) -> LeaseState {
        match self.granted {
            None => LeaseState::NeverGranted,
            Some(granted) if now.since(&granted.stamp) < granted.length_ns => {
                LeaseState::GrantedUntil { deadline_ns: granted.deadline_ns() }
            }
            Some(granted) => LeaseState::Expired { since_ns: granted.deadline_ns() },
        }
    }

    pub fn is_live(&self, now: Stamp) -> bool {
        matches!(self.state(now), LeaseState::GrantedUntil { .. })
    }
}
