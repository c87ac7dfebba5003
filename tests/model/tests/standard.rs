//! Every standard configuration, explored completely: no reachable state breaks an invariant, and
//! what the configuration is there for does happen in it.

#![allow(clippy::print_stdout)]

use bellwether_model::{Config, Mark, configs, explore};

/// Explores a configuration; `expected` events must be reachable in it.
fn holds(config: Config, expected: &[Mark]) {
    let report = explore(config);
    println!("{report}");
    assert!(report.counterexample.is_none(), "{report}");
    for mark in expected {
        assert!(report.count(*mark) > 0, "never: {}\n{report}", mark.text());
    }
}

#[test]
fn moves() {
    holds(
        configs::MOVES,
        &[
            Mark::Started,
            Mark::Migrated,
            Mark::Saved,
            Mark::Restored,
            Mark::Stopped,
            Mark::ClaimedBack,
            Mark::ClaimBackRefused,
            Mark::SealFailed,
            Mark::TakenOver,
            Mark::Busy,
            Mark::Reinstated,
            Mark::ProvenReleased,
            Mark::ProvenRebooted,
            Mark::Reaped,
            Mark::NeverRan,
            Mark::LateStartRefused,
            Mark::StrayReleased,
        ],
    );
}

#[test]
fn failover() {
    holds(
        configs::FAILOVER,
        &[
            Mark::TakenOver,
            Mark::Busy,
            Mark::Reinstated,
            Mark::ProvenReleased,
            Mark::ProvenRebooted,
            Mark::ProvenOperator,
            Mark::OperatorWasWrong,
            Mark::LateStartRefused,
        ],
    );
}

#[test]
fn handover() {
    holds(
        configs::HANDOVER,
        &[Mark::HandedOver, Mark::HandoverCalledOff, Mark::HandoverCrashed, Mark::Migrated],
    );
}

#[test]
fn lease() {
    holds(
        configs::LEASE,
        &[
            Mark::ProvenWatchdog,
            Mark::PausedAtDeadline,
            Mark::WentOnAfterGrant,
            Mark::WatchdogFired,
            Mark::StuckUntilReset,
            Mark::Reinstated,
        ],
    );
}

#[test]
fn lease_moves() {
    holds(configs::LEASE_MOVES, &[Mark::Migrated, Mark::Restored, Mark::PausedAtDeadline]);
}

#[test]
fn lease_of_two() {
    holds(configs::LEASE_OF_TWO, &[Mark::ProvenWatchdog, Mark::StuckUntilReset]);
}

#[test]
fn storage_of_two() {
    holds(configs::STORAGE_OF_TWO, &[Mark::TakenOver, Mark::ProvenRebooted]);
}
