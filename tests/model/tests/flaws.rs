//! Every flaw breaks an invariant, and the model shows the shortest way to it. A model that could
//! not tell a broken protocol from a sound one would prove nothing.
#![allow(clippy::print_stdout)]

use bellwether_model::{
    Config, Flaw, MEMORY_KEPT, ONE_WRITER, RESUMED_ONCE, UNKNOWN_IS_NOT_DEAD, configs, explore,
};

/// The shortest way to break an invariant.
fn breaks(flaw: Flaw, config: Config, invariants: &'static [&'static str]) {
    let report = explore(Config { invariants, ..config.with(flaw) });
    println!("{report}");
    assert!(report.counterexample.is_some(), "{report}");
}

macro_rules! flaws {
    ($($test:ident: $flaw:ident in $config:ident breaks $invariant:ident;)*) => {
        $(#[test]
        fn $test() {
            breaks(Flaw::$flaw, configs::$config, &[$invariant]);
        })*

        #[test]
        fn every_flaw_has_a_test() {
            let tested = [$(Flaw::$flaw),*];
            for flaw in Flaw::ALL {
                assert!(tested.contains(flaw), "{flaw:?} has no test");
            }
        }
    };
}

flaws! {
    no_revocation: NoRevocation in LEASE breaks UNKNOWN_IS_NOT_DEAD;
    restart_before_proof: RestartBeforeProof in MOVES breaks UNKNOWN_IS_NOT_DEAD;
    no_claim_lock: NoClaimLock in FAILOVER breaks ONE_WRITER;
    no_epoch_compare: NoEpochCompare in MOVES breaks UNKNOWN_IS_NOT_DEAD;
    activate_before_sealed: ActivateBeforeSealed in MOVES breaks UNKNOWN_IS_NOT_DEAD;
    floor_not_durable: FloorNotDurable in MOVES breaks UNKNOWN_IS_NOT_DEAD;
    orders_without_boot: OrdersWithoutBoot in MOVES breaks UNKNOWN_IS_NOT_DEAD;
    activate_names_no_file: ActivateNamesNoFile in MOVES breaks MEMORY_KEPT;
    wait_too_short: WaitTooShort in LEASE breaks UNKNOWN_IS_NOT_DEAD;
    wait_ignores_election: WaitIgnoresElection in LEASE breaks UNKNOWN_IS_NOT_DEAD;
    lease_from_arrival: LeaseFromArrival in LEASE breaks UNKNOWN_IS_NOT_DEAD;
    silence_is_reboot: SilenceIsReboot in MOVES breaks UNKNOWN_IS_NOT_DEAD;
    unknown_is_failed: UnknownIsFailed in MOVES breaks UNKNOWN_IS_NOT_DEAD;
    released_too_early: ReleasedTooEarly in MOVES breaks UNKNOWN_IS_NOT_DEAD;
    consumed_file_again: ConsumedFileAgain in MOVES breaks RESUMED_ONCE;
    source_goes_on: SourceGoesOn in MOVES breaks UNKNOWN_IS_NOT_DEAD;
    no_handover_record: NoHandoverRecord in HANDOVER breaks RESUMED_ONCE;
    record_kept: RecordKept in HANDOVER breaks RESUMED_ONCE;
    called_off_with_record: CalledOffWithRecord in HANDOVER breaks RESUMED_ONCE;
    called_off_after_promise: CalledOffAfterPromise in HANDOVER breaks UNKNOWN_IS_NOT_DEAD;
}

/// Under a lease no lock stands behind a false proof: the guest does run twice.
#[test]
fn a_false_proof_under_a_lease_lets_two_guests_write() {
    for flaw in
        [Flaw::NoRevocation, Flaw::WaitTooShort, Flaw::WaitIgnoresElection, Flaw::LeaseFromArrival]
    {
        breaks(flaw, configs::LEASE, &[ONE_WRITER]);
    }
}
