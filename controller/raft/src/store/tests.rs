//! The database on its own: openraft's suite, restarts, crashes, failures, corruption.

pub(crate) mod device;
pub(crate) mod disk;
mod faults;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::FutureExt;
use openraft::storage::{
    IOFlushed, RaftLogReader, RaftLogStorage, RaftLogStorageExt, RaftSnapshotBuilder,
    RaftStateMachine,
};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use openraft::{Entry as RawEntry, StorageError};
use redb::ReadableTable;
use tempfile::TempDir;

use self::disk::Disk;
use super::tables::{KEY_FORMAT, LOG, META};
use super::*;
use crate::machine::StateMachine;
use crate::testing::{blank, command, has, log_id, normal, open_store, store_options};
use crate::types::{Entry, SnapshotMeta, TypeConfig};

struct Builder;

impl StoreBuilder<TypeConfig, Store, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, Store, StateMachine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let store = open_store(dir.path());
        let machine = StateMachine::load(store.clone()).await.unwrap();
        Ok((dir, store, machine))
    }
}

#[tokio::test]
async fn openrafts_own_suite_passes() {
    Suite::<TypeConfig, Store, StateMachine, Builder, TempDir>::test_all(Builder).await.unwrap();
}

async fn entries(store: &Store, range: std::ops::Range<u64>) -> Vec<Entry> {
    store.clone().try_get_log_entries(range).await.unwrap()
}

fn refused(dir: &Path) -> String {
    match Store::open(dir, store_options(1)) {
        Ok(_) => panic!("the database was opened"),
        Err(error) => error.to_string(),
    }
}

/// Such a controller once started empty under its old number, and could have voted twice.
#[tokio::test]
async fn a_controller_that_lost_its_database_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let database = dir.path().join(DATABASE_FILE);
    let remove: fn(&Path) -> std::io::Result<()> = |path| std::fs::remove_file(path);
    let empty: fn(&Path) -> std::io::Result<()> = |path| std::fs::write(path, "");
    for lose in [remove, empty] {
        let _ = std::fs::remove_file(dir.path().join(MARKER_FILE));
        let _ = std::fs::remove_file(&database);
        let mut store = open_store(dir.path());
        store.save_vote(&Vote::new(3, 1)).await.unwrap();
        store.close().await.unwrap();
        drop(store);
        lose(&database).unwrap();
        for _ in 0..2 {
            let said = refused(dir.path());
            assert!(said.contains("gone or empty") && said.contains("join-token"), "{said}");
        }
    }
}

#[tokio::test]
async fn a_start_that_was_cut_short_is_no_lost_database() {
    let dir = tempfile::tempdir().unwrap();
    // Before the database had its name, and before the marker was set.
    std::fs::write(dir.path().join("raft.redb.new"), "half").unwrap();
    open_store(dir.path()).close().await.unwrap();
    std::fs::remove_file(dir.path().join(MARKER_FILE)).unwrap();
    open_store(dir.path()).close().await.unwrap();
    assert!(dir.path().join(MARKER_FILE).exists());
}

#[tokio::test]
async fn a_restart_keeps_vote_log_committed_and_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let vote = Vote::new_committed(3, 1);
    {
        let mut store = open_store(dir.path());
        store.save_vote(&vote).await.unwrap();
        store.blocking_append((0..20).map(|i| normal(1, i))).await.unwrap();
        store.save_committed(Some(log_id(1, 17))).await.unwrap();
        let mut machine = StateMachine::load(store.clone()).await.unwrap();
        let applied = (0..10).map(|i| Ok((normal(1, i), None)));
        machine.apply(futures::stream::iter(applied)).await.unwrap();
        machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
        store.purge(log_id(1, 4)).await.unwrap();
        store.close().await.unwrap();
    }
    let mut store = open_store(dir.path());
    assert_eq!(store.read_vote().await.unwrap(), Some(vote));
    assert_eq!(store.read_committed().await.unwrap(), Some(log_id(1, 17)));
    let state = store.get_log_state().await.unwrap();
    assert_eq!(state.last_purged_log_id, Some(log_id(1, 4)));
    assert_eq!(state.last_log_id, Some(log_id(1, 19)));
    let kept: Vec<Entry> = (5..20).map(|i| normal(1, i)).collect();
    assert_eq!(entries(&store, 0..100).await, kept);
    let mut machine = StateMachine::load(store).await.unwrap();
    assert_eq!(machine.applied_state().await.unwrap().0, Some(log_id(1, 9)));
    let view = machine.watch().borrow().clone();
    assert!((0..10).all(|i| has(&view.state, i)) && !has(&view.state, 10));
}

#[tokio::test]
async fn an_older_snapshot_never_replaces_a_newer_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(dir.path());
    let meta = |index| SnapshotMeta { last_log_id: Some(log_id(1, index)), ..Default::default() };
    let image = |n: u64| crate::codec::encode_snapshot(&vec![n; 900_000]).unwrap();
    store.write_snapshot(&meta(5), &image(5)).await.unwrap();
    store.write_snapshot(&meta(9), &image(9)).await.unwrap();
    store.write_snapshot(&meta(7), &image(7)).await.unwrap();
    let current = store.read_snapshot().await.unwrap().unwrap();
    assert_eq!((current.meta, current.snapshot), (meta(9), image(9)));
    let generations = store
        .read(|tx| {
            let table = tx.open_table(tables::SNAPSHOT).unwrap();
            Ok(table.iter().unwrap().map(|row| row.unwrap().0.value().0).collect::<Vec<_>>())
        })
        .await
        .unwrap();
    assert!(!generations.is_empty() && generations.iter().all(|g| *g == 2), "{generations:?}");
}

/// Changes the database behind the store's back.
fn tamper(dir: &Path, change: impl FnOnce(&redb::WriteTransaction)) {
    let db = Database::open(dir.join(DATABASE_FILE)).unwrap();
    let tx = db.begin_write().unwrap();
    change(&tx);
    tx.commit().unwrap();
}

async fn filled() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open_store(dir.path());
    store.blocking_append((0..10).map(|i| normal(1, i))).await.unwrap();
    store.close().await.unwrap();
    dir
}

fn tamper_record(dir: &Path, index: u64, change: impl FnOnce(&mut Vec<u8>)) {
    tamper(dir, |tx| {
        let mut log = tx.open_table(LOG).unwrap();
        let mut bytes = log.get(index).unwrap().unwrap().value().to_vec();
        change(&mut bytes);
        log.insert(index, bytes.as_slice()).unwrap();
    });
}

#[tokio::test]
async fn a_newer_database_is_refused() {
    let dir = filled().await;
    tamper(dir.path(), |tx| {
        let newer = 2_u32.to_le_bytes();
        tx.open_table(META).unwrap().insert(KEY_FORMAT, newer.as_slice()).unwrap();
    });
    assert!(refused(dir.path()).contains("version 2, and this program reads version 1"));
}

#[tokio::test]
async fn the_database_of_another_controller_is_refused() {
    let dir = filled().await;
    let error = Store::open(dir.path(), store_options(2)).map(drop).unwrap_err();
    assert_eq!(
        error.to_string(),
        "open raft database: it belongs to controller 1, not to controller 2"
    );
}

#[tokio::test]
async fn a_database_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _store = open_store(dir.path());
    assert!(refused(dir.path()).contains("another process has it open"));
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    let dir = filled().await;
    let path = dir.path().join(DATABASE_FILE);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, vec![7; bytes.len()]).unwrap();
    assert!(refused(dir.path()).starts_with("open raft database "));
    std::fs::write(&path, &bytes[..100]).unwrap();
    assert!(refused(dir.path()).starts_with("open raft database "));
}

#[tokio::test]
async fn a_database_that_was_never_finished_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let unfinished = dir.path().join("raft.redb.new");
    std::fs::write(&unfinished, [0; 4096]).unwrap();
    let store = open_store(dir.path());
    assert!(!unfinished.exists());
    store.close().await.unwrap();
    open_store(dir.path());
}

#[tokio::test]
async fn a_flipped_bit_in_a_record_is_refused() {
    let dir = filled().await;
    tamper_record(dir.path(), 3, |bytes| *bytes.last_mut().unwrap() ^= 0x10);
    let error = refused(dir.path());
    assert!(error.contains("log entry 3") && error.contains("checksum"), "{error}");
}

#[tokio::test]
async fn a_truncated_record_is_refused() {
    let dir = filled().await;
    tamper_record(dir.path(), 3, |bytes| bytes.truncate(bytes.len() - 1));
    assert!(refused(dir.path()).contains("log entry 3"));
    tamper_record(dir.path(), 3, |bytes| bytes.truncate(4));
    assert!(refused(dir.path()).contains("too short"));
}

#[tokio::test]
async fn a_missing_record_is_refused() {
    let dir = filled().await;
    tamper(dir.path(), |tx| drop(tx.open_table(LOG).unwrap().remove(3).unwrap()));
    assert!(refused(dir.path()).contains("entry 3 is missing, entry 4 follows"));
}

#[tokio::test]
async fn a_corrupt_snapshot_is_an_error_when_it_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(dir.path());
    let meta = SnapshotMeta { last_log_id: Some(log_id(1, 5)), ..Default::default() };
    let mut image = crate::codec::encode_snapshot(&bellwether_core::State::default()).unwrap();
    *image.last_mut().unwrap() ^= 1;
    store.write_snapshot(&meta, &image).await.unwrap();
    let error = StateMachine::load(store).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("the snapshot"), "{error}");
}

#[tokio::test]
async fn what_memory_has_forgotten_is_read_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open_store(dir.path());
    for start in (0..6000).step_by(1000) {
        store.blocking_append((start..start + 1000).map(|i| normal(1, i))).await.unwrap();
    }
    let first = lock(&store.shared.memory).recent.first().unwrap();
    assert!(first > 1000, "{first}");
    let all: Vec<Entry> = (10..5990).map(|i| normal(1, i)).collect();
    assert_eq!(entries(&store, 10..5990).await, all);
    let some = store.limited_get_log_entries(0, 6000).await.unwrap();
    assert!(!some.is_empty() && some[0] == normal(1, 0));
}

#[tokio::test]
async fn an_append_is_readable_before_it_is_on_disk() {
    let disk = Disk::default();
    let mut store = Store::from_database(disk.open(), store_options(1)).unwrap();
    disk.stall();
    let (sender, mut receiver) = TypeConfig::oneshot();
    store.append((0..5).map(|i| blank(1, i)), IOFlushed::signal(sender)).await.unwrap();
    assert_eq!(entries(&store, 0..10).await.len(), 5);
    assert!((&mut receiver).now_or_never().is_none(), "acknowledged before the flush");
    disk.resume();
    receiver.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_failed_flush_is_fatal_reported_once_and_never_retried() {
    let disk = Disk::default();
    let fatal = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&fatal);
    let on_fatal: FatalHook = Arc::new(move |_| {
        seen.fetch_add(1, Ordering::SeqCst);
    });
    let options = StoreOptions { on_fatal, ..store_options(1) };
    let mut store = Store::from_database(disk.open(), options).unwrap();
    store.blocking_append([blank(1, 0)]).await.unwrap();
    disk.fail(true);
    let error = store.blocking_append([blank(1, 1)]).await.unwrap_err();
    assert!(error.to_string().contains("commit to the raft database"), "{error}");
    // The disk works again, but what it holds is unknown.
    disk.fail(false);
    let syncs = disk.syncs();
    assert!(store.save_vote(&Vote::new(9, 1)).await.is_err());
    assert!(store.blocking_append([blank(1, 2)]).await.is_err());
    assert_eq!(fatal.load(Ordering::SeqCst), 1);
    assert_eq!(disk.syncs(), syncs);
    assert_eq!(store.read_vote().await.unwrap(), None);
}

/// Power failures at many moments of a workload, with any part of the unflushed writes on disk.
#[tokio::test]
async fn a_power_failure_loses_nothing_that_was_acknowledged() {
    let disk = Disk::default();
    let mut store = Store::from_database(disk.open(), store_options(1)).unwrap();
    for index in 0..60 {
        disk.acknowledge_entry(index);
        store.blocking_append([normal(1, index)]).await.unwrap();
        disk.acknowledge_entry(index + 1);
        if index % 5 == 0 {
            let vote = Vote::new(index + 1, 1);
            store.save_vote(&vote).await.unwrap();
            disk.acknowledge_term(index + 1);
        }
    }
    let crashes = disk.crashes();
    assert!(crashes.len() > 50, "{}", crashes.len());
    for (number, crash) in crashes.into_iter().enumerate() {
        let db = crash.disk.open();
        let store = Store::from_database(db, store_options(1))
            .unwrap_or_else(|error| panic!("crash {number}: {error}"));
        let found = entries(&store, 0..100).await;
        let expected: Vec<Entry> = (0..found.len() as u64).map(|i| normal(1, i)).collect();
        assert_eq!(found, expected, "crash {number}");
        assert!(found.len() as u64 >= crash.entries, "crash {number}: an entry is lost");
        let term = store.clone().read_vote().await.unwrap().map_or(0, |vote| vote.leader_id.term);
        assert!(term >= crash.term, "crash {number}: a vote is lost");
    }
}

#[tokio::test]
async fn appends_that_gather_share_a_flush() {
    let disk = Disk::default();
    let mut store = Store::from_database(disk.open(), store_options(1)).unwrap();
    let before = disk.syncs();
    disk.stall();
    let mut waiting = Vec::new();
    for index in 0..50 {
        let (sender, receiver) = TypeConfig::oneshot();
        store.append([normal(1, index)], IOFlushed::signal(sender)).await.unwrap();
        waiting.push(receiver);
    }
    disk.resume();
    for receiver in waiting {
        receiver.await.unwrap().unwrap();
    }
    let flushes = disk.syncs() - before;
    assert!(flushes <= 6, "{flushes} flushes for 50 appends");
}

#[test]
fn an_entry_of_the_log_survives_its_encoding() {
    let entry: Entry = RawEntry {
        log_id: log_id(7, 1 << 40),
        payload: openraft::EntryPayload::Normal(crate::Proposal(command(3))),
    };
    let bytes = tables::encode_entry(&entry).unwrap();
    assert_eq!(crate::codec::decode_record::<Entry>(1 << 40, &bytes).unwrap(), entry);
}
