//! The store on a device that fails: at every operation of a short script, and at random ones of
//! random scripts.
//!
//! Whatever happens, what is found afterwards is what the script had made after some number of
//! its steps: all that were acknowledged, and of the others only whole ones.

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;

use super::device::{Device, Fault};
use super::disk::random;
use super::*;

/// One thing that openraft asks of the store.
#[derive(Clone, Debug)]
enum Step {
    Vote(u64),
    /// Entries of a term, at these indexes.
    Append(u64, RangeInclusive<u64>),
    /// Keep the entries up to this index.
    TruncateAfter(u64),
    Purge(u64),
    Snapshot(u64),
}

/// What the store holds after some steps.
#[derive(Clone, PartialEq, Default, Debug)]
struct Contents {
    vote: Option<Vote>,
    /// Index to term.
    log: BTreeMap<u64, u64>,
    purged: Option<LogId>,
    /// The last index that the snapshot covers.
    snapshot: Option<u64>,
}

impl Contents {
    fn after(&self, step: &Step) -> Self {
        let mut next = self.clone();
        match step {
            Step::Vote(term) => next.vote = Some(Vote::new(*term, 1)),
            Step::Append(term, range) => next.log.extend(range.clone().map(|i| (i, *term))),
            Step::TruncateAfter(last) => drop(next.log.split_off(&(last + 1))),
            Step::Purge(upto) => {
                next.purged = next.log.get(upto).map(|term| log_id(*term, *upto));
                next.log = next.log.split_off(&(upto + 1));
            }
            Step::Snapshot(last) => next.snapshot = Some(*last),
        }
        next
    }
}

fn image(last: u64) -> Vec<u8> {
    crate::codec::encode_snapshot(&vec![last; 300]).unwrap()
}

fn meta(last: u64) -> SnapshotMeta {
    SnapshotMeta { last_log_id: Some(log_id(1, last)), ..Default::default() }
}

async fn take(store: &mut Store, contents: &Contents, step: &Step) -> Result<(), io::Error> {
    match step {
        Step::Vote(term) => store.save_vote(&Vote::new(*term, 1)).await,
        Step::Append(term, range) => {
            let entries = range.clone().map(|index| normal(*term, index));
            store.blocking_append(entries).await.map_err(io::Error::other)
        }
        Step::TruncateAfter(last) => {
            store.truncate_after(Some(log_id(contents.log[last], *last))).await
        }
        Step::Purge(upto) => store.purge(log_id(contents.log[upto], *upto)).await,
        Step::Snapshot(last) => Ok(store.write_snapshot(&meta(*last), &image(*last)).await?),
    }
}

/// Reads everything back, checked as the store checks it.
async fn contents(store: &Store) -> Result<Contents, io::Error> {
    let mut reader = store.clone();
    let found = reader.try_get_log_entries(0..1000).await?;
    for entry in &found {
        assert_eq!(*entry, normal(entry.log_id.leader_id.term, entry.log_id.index));
    }
    let snapshot = store.read_snapshot().await?;
    let snapshot = snapshot.map(|it| {
        let last = it.meta.last_log_id.map_or(0, |id| id.index);
        assert_eq!((it.meta, it.snapshot), (meta(last), image(last)));
        last
    });
    Ok(Contents {
        vote: reader.read_vote().await?,
        log: found.iter().map(|it| (it.log_id.index, it.log_id.leader_id.term)).collect(),
        purged: reader.get_log_state().await?.last_purged_log_id,
        snapshot,
    })
}

fn open(device: &Device) -> Result<Store, StoreError> {
    Store::open_backend(device.clone(), store_options(1))
}

/// How a script fared on a device.
struct Run {
    /// What the store holds after each number of steps.
    history: Vec<Contents>,
    acknowledged: usize,
    started: usize,
}

/// Carries a script out. After the first error nothing may succeed any more.
async fn run(device: &Device, script: &[Step]) -> Run {
    let mut run = Run { history: vec![Contents::default()], acknowledged: 0, started: 0 };
    let Ok(mut store) = open(device) else {
        assert!(device.has_failed(), "a sound device is opened");
        return run;
    };
    let mut broken = false;
    for step in script {
        let before = run.history.last().unwrap().clone();
        if !broken {
            run.started += 1;
        }
        match take(&mut store, &before, step).await {
            Ok(()) => {
                assert!(!broken, "{step:?} succeeded after a failed commit");
                run.acknowledged += 1;
            }
            Err(error) => {
                assert!(device.has_failed(), "{step:?} failed on a sound device: {error}");
                broken = true;
            }
        }
        run.history.push(before.after(step));
    }
    let closed = store.close().await;
    assert!(closed.is_err() || !broken, "a failed database was closed as if it were well");
    run
}

/// Opens what a power failure left, and compares it with what was promised.
///
/// A database that was still being made has no name yet: see `make_database`.
async fn check(device: &Device, run: &Run, seed: u64, what: &str) {
    if run.started == 0 {
        return;
    }
    for (number, image) in device.after_power_failure(seed).iter().enumerate() {
        let what = format!("{what}, image {number}");
        let mut store = open(&Device::holding(image)).unwrap_or_else(|e| panic!("{what}: {e}"));
        let found = contents(&store).await.unwrap_or_else(|e| panic!("{what}: {e}"));
        let allowed = &run.history[run.acknowledged..=run.started];
        assert!(
            allowed.contains(&found),
            "{what}: {} steps were acknowledged and {} begun, and the store holds {found:?}",
            run.acknowledged,
            run.started
        );
        if number == 0 {
            // It goes on from there.
            let went_on = store.save_vote(&Vote::new(1_000, 1)).await;
            went_on.unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    }
}

fn short_script() -> Vec<Step> {
    vec![
        Step::Vote(1),
        Step::Append(1, 0..=4),
        Step::Vote(2),
        Step::Append(2, 5..=9),
        Step::TruncateAfter(6),
        Step::Append(3, 7..=8),
        Step::Snapshot(6),
        Step::Purge(5),
        Step::Append(3, 9..=12),
        Step::Vote(4),
        Step::Snapshot(10),
        Step::Purge(10),
    ]
}

/// Every operation of the short script fails in every way.
#[tokio::test]
async fn a_fault_at_any_operation_loses_nothing_acknowledged() {
    let script = short_script();
    let sound = Device::default();
    let whole = run(&sound, &script).await;
    assert_eq!(whole.acknowledged, script.len());
    let operations = sound.operations();
    assert!(operations > 50, "{operations}");
    let mut refused = 0;
    for fault in [Fault::Once, Fault::Torn, Fault::Forever] {
        for at in 0..operations {
            let device = Device::default();
            device.fail_at(at, fault);
            let run = run(&device, &script).await;
            assert!(device.has_failed());
            refused += usize::from(run.acknowledged < script.len());
            check(&device, &run, at, &format!("{fault:?} at operation {at}")).await;
        }
    }
    assert!(refused > 100, "{refused} faults were noticed");
}

/// A fault while a database that has something in it is opened.
#[tokio::test]
async fn a_fault_while_opening_is_an_error_and_loses_nothing() {
    let script = short_script();
    let before = Device::default();
    let whole = run(&before, &script).await;
    let image = before.after_power_failure(0).swap_remove(0);
    let expected = whole.history.last().unwrap();
    for fault in [Fault::Once, Fault::Torn, Fault::Forever, Fault::Reads] {
        for at in 0.. {
            let device = Device::holding(&image);
            device.fail_at(at, fault);
            if let Ok(store) = open(&device) {
                match contents(&store).await {
                    Ok(found) => assert_eq!(found, *expected, "{fault:?} at operation {at}"),
                    Err(_) => assert!(device.has_failed()),
                }
            }
            let reached = device.has_failed();
            let left = device.after_power_failure(at);
            for image in &left {
                let store = open(&Device::holding(image)).unwrap();
                assert_eq!(contents(&store).await.unwrap(), *expected, "{fault:?} at {at}");
            }
            if !reached {
                break;
            }
        }
    }
}

/// A script that openraft could ask for.
fn random_script(chance: &mut u64, length: usize) -> Vec<Step> {
    let mut script = Vec::new();
    let (mut contents, mut term) = (Contents::default(), 1);
    while script.len() < length {
        let next = contents.log.keys().next_back().map(|last| last + 1);
        let next = next.or(contents.purged.map(|id| id.index + 1)).unwrap_or(0);
        let kept: Vec<u64> = contents.log.keys().copied().collect();
        let pick = |chance: &mut u64| kept[random(chance) as usize % kept.len()];
        let step = match random(chance) % 8 {
            0 | 1 => {
                term += 1;
                Step::Vote(term)
            }
            2 if kept.len() > 1 => Step::TruncateAfter(pick(chance)),
            3 if kept.len() > 1 => Step::Purge(pick(chance)),
            4 if !kept.is_empty() => {
                let last = pick(chance);
                if contents.snapshot.is_some_and(|old| old >= last) {
                    continue;
                }
                Step::Snapshot(last)
            }
            _ => Step::Append(term, next..=next + random(chance) % 20),
        };
        contents = contents.after(&step);
        script.push(step);
    }
    script
}

/// Random scripts with a fault at a random operation; a failure names the seed.
#[tokio::test]
async fn random_scripts_on_a_failing_device() {
    for seed in 1..=20 {
        let mut chance = seed;
        let script = random_script(&mut chance, 25);
        let sound = Device::default();
        let whole = run(&sound, &script).await;
        assert_eq!(whole.acknowledged, script.len(), "seed {seed}: {script:?}");
        let faults = [Fault::Once, Fault::Torn, Fault::Forever];
        for fault in faults {
            let at = random(&mut chance) % sound.operations();
            let device = Device::default();
            device.fail_at(at, fault);
            let run = run(&device, &script).await;
            let what = format!("seed {seed}: {fault:?} at operation {at} of {script:?}");
            check(&device, &run, random(&mut chance), &what).await;
        }
    }
}

/// One bit in so many bytes is flipped.
const CELL: usize = 32;

/// One flipped bit anywhere in what is in use: the database is refused, or it was a bit that
/// nothing reads.
#[tokio::test]
async fn a_flipped_bit_anywhere_is_refused_or_without_effect() {
    let device = Device::default();
    let whole = run(&device, &short_script()).await;
    let expected = whole.history.last().unwrap();
    let image = device.after_power_failure(0).swap_remove(0);
    let mut chance = 7;
    let (mut refused, mut without_effect) = (0, 0);
    for start in (0..image.len()).step_by(CELL) {
        let cell = &image[start..start + CELL];
        if cell.iter().all(|byte| *byte == 0) {
            continue;
        }
        let at = start + random(&mut chance) as usize % CELL;
        let mut damaged = image.clone();
        damaged[at] ^= 1 << (random(&mut chance) % 8);
        let outcome = match open(&Device::holding(&damaged)) {
            Ok(store) => contents(&store).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match outcome {
            Ok(found) => {
                assert_eq!(found, *expected, "a flipped bit at byte {at} went unnoticed");
                without_effect += 1;
            }
            Err(error) => {
                assert!(error.starts_with("open raft database"), "byte {at}: {error}");
                refused += 1;
            }
        }
    }
    println!("{refused} flipped bits were refused, {without_effect} had no effect");
    assert!(refused > 50, "{refused} refused, {without_effect} without an effect");
}
