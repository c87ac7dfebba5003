//! The simulator itself: one seed is one run, it can fail, and it says with what.

use bellwether_simulation::search::{Set, minimise, run_caught, run_set};
use bellwether_simulation::{
    Cluster, Event, Fault, Request, Run, Scenario, StorageKind, Timed, Verdict, run,
};

fn happens(at_ms: u64, event: Event) -> Timed {
    Timed { at_ms, event }
}

fn fault(at_ms: u64, fault: Fault) -> Timed {
    happens(at_ms, Event::Fault(fault))
}

fn ask(at_ms: u64, request: Request) -> Timed {
    happens(at_ms, Event::Request(request))
}

fn said(result: &Run, text: &str) -> bool {
    result.log.iter().any(|line| line.text.contains(text))
}

#[test]
fn one_seed_is_one_run_bit_for_bit() {
    for seed in [1, 2, 3, 605] {
        let scenario = Scenario::random(seed);
        let (one, other) = (run(&scenario), run(&scenario));
        assert_eq!(one, other, "seed {seed}");
        assert_eq!(one.verdict, Verdict::Held, "seed {seed}");
    }
    assert_ne!(run(&Scenario::random(1)).trace_hash, run(&Scenario::random(2)).trace_hash);
}

#[test]
fn threads_change_nothing_but_the_time() {
    let set = |threads| Set { first: 1, count: 8, threads, seconds_max: None, stop: false };
    let (one, two) = (run_set(&set(1)), run_set(&set(2)));
    assert_eq!((one.trace_hash, one.events, one.seeds), (two.trace_hash, two.events, two.seeds));
    assert_eq!(one.coverage, two.coverage);
}

#[test]
fn a_lost_host_is_proven_gone_by_the_storage() {
    let mut scenario = Scenario::calm(Cluster::of(3, &["web"]));
    scenario.cluster.storage = StorageKind::Network { lease_ms: 5_000 };
    scenario.events = vec![fault(6_000, Fault::Power { node: 1, for_ms: 40_000 })];
    let result = run(&scenario);
    assert_eq!(result.verdict, Verdict::Held);
    assert!(said(&result, "n1 is not heard from"));
    assert!(result.coverage.count("proof", "storage") > 0);
    assert_eq!(result.coverage.count("proof", "rebooted"), 0);
    assert_eq!(result.coverage.count("storage", "lock-revoked"), 1);
}

#[test]
fn a_node_that_is_cut_off_keeps_its_vm() {
    let mut scenario = Scenario::calm(Cluster::of(3, &["web"]));
    scenario.events = vec![fault(6_000, Fault::Split { side: vec![1], for_ms: 15_000 })];
    let result = run(&scenario);
    assert_eq!(result.verdict, Verdict::Held);
    assert!(said(&result, "false alarm: VM web never stopped running"));
}

#[test]
fn a_migration_seals_loads_and_leaves_no_file() {
    let mut scenario = Scenario::calm(Cluster::of(3, &["web"]));
    scenario.events = vec![ask(6_000, Request::Migrate { vm: "web".into(), node: Some(3) })];
    let result = run(&scenario);
    assert_eq!(result.verdict, Verdict::Held);
    assert!(said(&result, "VM web runs on n3, epoch 2"));
    assert_eq!(result.coverage.count("place", "sealed -> runner"), 1);
}

/// Without time to come to rest no run can hold: what fails is told, and only what matters is left.
#[test]
fn a_failure_is_told_and_made_smaller() {
    let mut scenario = Scenario::calm(Cluster::of(3, &["web"]));
    scenario.settle_ms_max = Some(1_000);
    scenario.heal_at_ms = 20_000;
    scenario.events = vec![
        fault(8_000, Fault::Clock { node: 2, jump_ms: 5_000 }),
        ask(9_000, Request::Drain { node: 2 }),
        ask(20_900, Request::Shutdown { vm: "web".into() }),
        ask(12_000, Request::Undrain { node: 2 }),
    ];
    let broken = run_caught(&scenario);
    let Verdict::Broken { what, .. } = &broken.verdict else { panic!("{:?}", broken.verdict) };
    assert!(what.starts_with("liveness: 1 s after all faults ended"), "{what}");
    let small = minimise(&scenario);
    assert!(small.events.len() <= 1, "{:?}", small.events);
    assert!(matches!(run_caught(&small).verdict, Verdict::Broken { .. }));
}
