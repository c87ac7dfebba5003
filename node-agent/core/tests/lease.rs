//! The lease against every order, delay and repetition of answers.

use bellwether_agent_core::lease::LEASE_MS_MAX;
use bellwether_agent_core::{Lease, LeaseAnswer, LeaseRequest, LeaseState, Stamp};
use bellwether_types::BootId;
use proptest::prelude::*;

fn lease() -> Lease {
    Lease::new(BootId::from_uuid(uuid::Uuid::from_u128(1)), 0)
}

fn at(ms: u64) -> Stamp {
    Stamp { boot_ns: ms * 1_000_000, raw_ns: ms * 1_000_000 }
}

#[derive(Clone, Debug)]
enum Step {
    /// Time passes, differently on the two clocks, and a request is sent.
    Request { boot_ms: u64, raw_ms: u64 },
    /// An answer to one of the requests so far arrives, perhaps again.
    Answer { which: prop::sample::Index, lease_ms: u64 },
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0_u64..5_000, 0_u64..5_000)
            .prop_map(|(boot_ms, raw_ms)| Step::Request { boot_ms, raw_ms }),
        (any::<prop::sample::Index>(), prop_oneof![Just(3_000_u64), any::<u64>()])
            .prop_map(|(which, lease_ms)| Step::Answer { which, lease_ms }),
    ]
}

proptest! {
    #[test]
    fn no_answer_extends_beyond_the_newest_stamp(
        steps in proptest::collection::vec(steps(), 1..60)
    ) {
        let mut lease = lease();
        let mut now = Stamp::default();
        let mut sent: Vec<LeaseRequest> = Vec::new();
        let mut deadline = 0;
        for step in steps {
            match step {
                Step::Request { boot_ms, raw_ms } => {
                    now.boot_ns += boot_ms * 1_000_000;
                    now.raw_ns += raw_ms * 1_000_000;
                    sent.push(lease.request(now));
                }
                Step::Answer { which, lease_ms } if !sent.is_empty() => {
                    let request = sent[which.index(sent.len())];
                    let newest = sent[sent.len() - 1];
                    let cut = lease_ms.min(LEASE_MS_MAX) * 1_000_000;
                    if let LeaseAnswer::Granted { deadline_ns } = lease.answer(request.nonce, lease_ms) {
                        prop_assert_eq!(request, newest, "only the newest request is answered");
                        prop_assert_eq!(deadline_ns, newest.stamp.boot_ns + cut);
                        prop_assert!(deadline_ns > deadline, "the deadline moved back");
                        deadline = deadline_ns;
                    }
                    // The same answer again says nothing.
                    prop_assert_eq!(lease.answer(request.nonce, lease_ms), LeaseAnswer::NotAsked);
                }
                Step::Answer { .. } => {}
            }
            if let LeaseState::GrantedUntil { deadline_ns } = lease.state(now) {
                prop_assert!(now.boot_ns < deadline_ns);
            }
        }
    }
}

#[test]
fn a_lease_is_granted_and_expires() {
    let mut lease = lease();
    assert_eq!(lease.state(at(0)), LeaseState::NeverGranted);
    let request = lease.request(at(1_000));
    let granted = lease.answer(request.nonce, 3_000);
    assert_eq!(granted, LeaseAnswer::Granted { deadline_ns: 4_000_000_000 });
    assert!(lease.is_live(at(3_999)));
    assert!(!lease.is_live(at(4_000)));
    assert_eq!(lease.state(at(4_000)), LeaseState::Expired { since_ns: 4_000_000_000 });
}

#[test]
fn either_clock_ends_the_lease() {
    let mut lease = lease();
    let request = lease.request(at(1_000));
    lease.answer(request.nonce, 3_000);
    // Suspended: only CLOCK_BOOTTIME went on. Slewed: CLOCK_MONOTONIC_RAW is ahead.
    assert!(!lease.is_live(Stamp { boot_ns: 4_000_000_000, raw_ns: 1_100_000_000 }));
    assert!(!lease.is_live(Stamp { boot_ns: 3_900_000_000, raw_ns: 4_000_000_000 }));
}

#[test]
fn an_offset_between_the_clocks_does_not_lengthen_the_lease() {
    let mut lease = lease();
    let request = lease.request(Stamp { boot_ns: 1_000_000_000, raw_ns: 44_000_000_000 });
    let granted = lease.answer(request.nonce, 3_000);
    assert_eq!(granted, LeaseAnswer::Granted { deadline_ns: 4_000_000_000 });
}
