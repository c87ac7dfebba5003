//! What `tidy` forgets has no effect: without it the same things happen, and every flaw is found
//! after as many steps.

use bellwether_model::{Config, Epoch, Flaw, Mark, Report, configs, explore};

/// Small enough to be explored with everything that ever happened in the state.
fn small(config: Config) -> Config {
    Config { nodes: 2, epoch_max: Epoch(3), faults_max: 1, ..config }
}

fn seen(report: &Report) -> Vec<Mark> {
    Mark::ALL.iter().copied().filter(|mark| report.count(*mark) > 0).collect()
}

#[test]
fn without_tidying_the_same_events_are_reached() {
    for config in [configs::MOVES, configs::FAILOVER] {
        let config = Config { epoch_max: Epoch(2), ..small(config) };
        let with = explore(config.clone());
        let without = explore(Config { tidy: false, ..config });
        assert!(without.states > with.states, "{without}\n{with}");
        assert!(without.counterexample.is_none(), "{without}");
        assert_eq!(seen(&with), seen(&without), "{without}\n{with}");
    }
}

#[test]
fn without_tidying_a_flaw_is_found_after_as_many_steps() {
    let found = [
        (configs::MOVES, Flaw::RestartBeforeProof),
        (configs::MOVES, Flaw::ActivateBeforeSealed),
        (configs::MOVES, Flaw::ActivateNamesNoFile),
        (configs::MOVES, Flaw::UnknownIsFailed),
        (configs::FAILOVER, Flaw::NoClaimLock),
        (configs::HANDOVER, Flaw::CalledOffAfterPromise),
    ];
    for (config, flaw) in found {
        let config = small(config).with(flaw);
        let steps = |config| {
            let found: Report = explore(config);
            found.counterexample.expect("the flaw breaks something").steps.len()
        };
        let with = steps(config.clone());
        assert_eq!(with, steps(Config { tidy: false, ..config }), "{flaw:?}");
    }
}
