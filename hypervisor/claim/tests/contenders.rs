//! Claims and disk locks between real processes.
//!
//! A contender is this test binary, started again with `BW_CONTENDER` set: it runs only the test
//! `contender`, claims what it is told to, says so, and holds on until it is killed.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bellwether_claim::*;
use bellwether_types::{BootId, Epoch, Handover, NodeId, VmId};
use uuid::Uuid;

const LONG: Duration = Duration::from_secs(30);

fn record(epoch: u64, node: u64) -> ClaimRecord {
    ClaimRecord {
        vm_id: VmId::from_uuid(Uuid::from_u128(11)),
        epoch: Epoch(epoch),
        node: NodeId(node),
        boot_id: BootId::from_uuid(Uuid::from_u128(u128::from(node))),
        nonce: 1000 + node,
    }
}

/// Not a test by itself: the program of a contender.
#[test]
fn contender() {
    let Ok(order) = std::env::var("BW_CONTENDER") else { return };
    let mut words = order.splitn(4, ' ');
    let mut word = || words.next().unwrap().to_owned();
    let (kind, epoch, node, path) = (word(), word(), word(), word());
    let path = Path::new(&path);
    let hold = |outcome: Result<(), String>| {
        eprintln!("outcome: {}", outcome.as_ref().map_or_else(|e| e.as_str(), |()| "got it"));
        if outcome.is_ok() {
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }
    };
    if kind == "claim" {
        let record = record(epoch.parse().unwrap(), node.parse().unwrap());
        let claim = Claim::acquire(path, record);
        hold(claim.as_ref().map(drop).map_err(ToString::to_string));
    } else {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let lock = DiskLock::acquire(&file, path, kind == "read");
        hold(lock.as_ref().map(drop).map_err(ToString::to_string));
    }
}

struct Contender {
    process: Child,
    outcome: String,
}

impl Contender {
    fn start(kind: &str, epoch: u64, node: u64, path: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "contender", "--nocapture"])
            .env("BW_CONTENDER", format!("{kind} {epoch} {node} {}", path.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let outcome = lines
            .map_while(Result::ok)
            .find_map(|line| line.split_once("outcome: ").map(|(_, text)| text.to_owned()))
            .unwrap();
        Self { process, outcome }
    }

    fn got_it(&self) -> bool {
        self.outcome == "got it"
    }

    /// SIGKILL: it has no chance to tidy up.
    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn claims() -> (tempfile::TempDir, std::path::PathBuf) {
    let storage = tempfile::tempdir().unwrap();
    let path = claim_path(storage.path(), record(0, 0).vm_id);
    fs::create_dir(path.parent().unwrap()).unwrap();
    (storage, path)
}

#[test]
fn of_two_processes_one_gets_the_claim_and_the_other_is_told_who() {
    let (_storage, path) = claims();
    let winner = Contender::start("claim", 5, 1, &path);
    assert!(winner.got_it(), "{}", winner.outcome);
    let loser = Contender::start("claim", 6, 2, &path);
    assert!(loser.outcome.contains("held by VM") && loser.outcome.contains("epoch 5 on node 1"));
    let error = Claim::acquire(&path, record(6, 3)).unwrap_err();
    assert!(matches!(error, ClaimError::Held { by: Some(by), .. } if by == record(5, 1)));
    let view = Claim::peek(&path).unwrap();
    assert_eq!(view, ClaimView { record: Some(record(5, 1)), held: true });
    loser.kill();
    winner.kill();
}

#[test]
fn many_processes_at_once_make_one_holder() {
    let (_storage, path) = claims();
    let contenders: Vec<_> = std::thread::scope(|scope| {
        let start = |node| {
            let path = &path;
            scope.spawn(move || Contender::start("claim", 5, node, path))
        };
        let threads: Vec<_> = (1..9).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(contenders.iter().filter(|c| c.got_it()).count(), 1);
    contenders.into_iter().for_each(Contender::kill);
    let left: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "scratch files stay behind");
}

#[test]
fn a_killed_holder_lets_go() {
    let (_storage, path) = claims();
    let holder = Contender::start("claim", 5, 1, &path);
    assert!(holder.got_it());
    let waiter = std::thread::spawn({
        let path = path.clone();
        move || Claim::acquire_within(&path, record(6, 2), Instant::now() + LONG).unwrap()
    });
    holder.kill();
    let claim = waiter.join().unwrap();
    assert_eq!(claim.record(), record(6, 2));
    drop(claim);
    assert!(!Claim::peek(&path).unwrap().held);
}

#[test]
fn waiting_ends_at_the_deadline() {
    let (_storage, path) = claims();
    let _held = Claim::acquire(&path, record(5, 1)).unwrap();
    let started = Instant::now();
    let deadline = started + Duration::from_millis(50);
    let error = Claim::acquire_within(&path, record(6, 2), deadline).unwrap_err();
    assert!(matches!(error, ClaimError::Held { .. }));
    assert!(started.elapsed() >= Duration::from_millis(50) && started.elapsed() < LONG);
}

#[test]
fn a_late_command_is_refused_by_the_storage() {
    let (_storage, path) = claims();
    drop(Claim::acquire(&path, record(8, 2)).unwrap());
    let error = Claim::acquire(&path, record(7, 1)).unwrap_err();
    assert!(matches!(&error, ClaimError::Superseded { stored, .. } if **stored == record(8, 2)));
    assert!(error.to_string().contains("out of date"));
    // Refusing lets go of the lock, and the record stays.
    assert_eq!(Claim::peek(&path).unwrap(), ClaimView { record: Some(record(8, 2)), held: false });
    let other_node = Claim::acquire(&path, record(8, 3)).unwrap_err();
    assert!(matches!(other_node, ClaimError::Superseded { .. }));
    let other_nonce = Claim::acquire(&path, ClaimRecord { nonce: 1, ..record(8, 2) }).unwrap_err();
    assert!(matches!(other_nonce, ClaimError::Superseded { .. }));
    // The same command, repeated, is let in.
    drop(Claim::acquire(&path, record(8, 2)).unwrap());
    drop(Claim::acquire(&path, record(9, 1)).unwrap());
}

#[test]
fn raising_keeps_the_lock_and_never_lowers() {
    let (_storage, path) = claims();
    let mut claim = Claim::acquire(&path, record(5, 1)).unwrap();
    claim.raise(Epoch(7), 42).unwrap();
    assert_eq!((claim.record().epoch, claim.record().nonce), (Epoch(7), 42));
    assert!(matches!(claim.raise(Epoch(6), 43), Err(ClaimError::Superseded { .. })));
    assert!(Claim::peek(&path).unwrap().held);
    drop(claim);
    assert!(matches!(Claim::acquire(&path, record(5, 1)), Err(ClaimError::Superseded { .. })));
}

#[test]
fn a_torn_slot_never_loses_the_older_epoch() {
    let (_storage, path) = claims();
    let mut claim = Claim::acquire(&path, record(5, 1)).unwrap();
    claim.raise(Epoch(6), 2).unwrap();
    drop(claim);
    let intact = fs::read(&path).unwrap();
    for slot in [0, 4096] {
        fs::write(&path, &intact).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0xee; 256], slot + 256).unwrap();
        let stored = Claim::peek(&path).unwrap().record.unwrap().epoch;
        assert!(stored >= Epoch(5), "slot at {slot}: {stored}");
        assert!(Claim::acquire(&path, record(4, 1)).is_err());
    }
    fs::write(&path, vec![0; intact.len()]).unwrap();
    assert!(matches!(Claim::acquire(&path, record(9, 1)), Err(ClaimError::Damaged { .. })));
    fs::write(&path, b"").unwrap();
    assert!(matches!(Claim::acquire(&path, record(9, 1)), Err(ClaimError::Damaged { .. })));
}

#[test]
fn a_claim_file_of_another_vm_is_refused() {
    let (_storage, path) = claims();
    drop(Claim::acquire(&path, record(5, 1)).unwrap());
    let other = ClaimRecord { vm_id: VmId::from_uuid(Uuid::nil()), ..record(9, 1) };
    assert!(matches!(Claim::acquire(&path, other), Err(ClaimError::OtherVm { .. })));
}

#[test]
fn a_removed_claim_is_gone_and_errors_name_the_file() {
    let (_storage, path) = claims();
    Claim::acquire(&path, record(5, 1)).unwrap().remove().unwrap();
    let error = Claim::peek(&path).unwrap_err().to_string();
    assert!(error.starts_with("opening of claim ") && error.contains(".claim"), "{error}");
    let nowhere = path.join("none/x.claim");
    assert!(matches!(Claim::acquire(&nowhere, record(5, 1)), Err(ClaimError::Io { .. })));
}

#[test]
fn a_writable_disk_has_one_user_and_a_read_only_disk_many_readers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let writer = Contender::start("write", 0, 0, &path);
    assert!(writer.got_it());
    let loser = Contender::start("read", 0, 0, &path);
    assert!(loser.outcome.contains("disk.raw") && loser.outcome.contains("in use"));
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert!(matches!(DiskLock::acquire(&file, &path, false), Err(DiskLockError::Held { .. })));
    writer.kill();
    loser.kill();
    let deadline = Instant::now() + LONG;
    let ours = DiskLock::acquire_within(&file, &path, true, deadline).unwrap();
    let reader = Contender::start("read", 0, 0, &path);
    assert!(reader.got_it(), "{}", reader.outcome);
    let writer = Contender::start("write", 0, 0, &path);
    assert!(!writer.got_it());
    reader.kill();
    writer.kill();
    // The lock is the open file's: closing another descriptor of the disk changes nothing.
    drop(File::open(&path).unwrap());
    let still = Contender::start("write", 0, 0, &path);
    assert!(!still.got_it());
    still.kill();
    drop(ours);
    let free = Contender::start("write", 0, 0, &path);
    assert!(free.got_it(), "dropping the lock frees the disk though the file stays open");
    free.kill();
}

/// A runner learns that it is none any more although its lock never failed.
#[test]
fn a_renewal_finds_a_later_runners_record() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.claim");
    let mut ours = Claim::acquire(&path, record(3, 1)).unwrap();
    for _ in 0..3 {
        ours.renew().unwrap();
        assert_eq!(Claim::peek(&path).unwrap().record, Some(record(3, 1)));
    }
    // Somebody removes the file: that alone says nothing.
    fs::remove_file(&path).unwrap();
    ours.renew().unwrap();
    let other = Claim::acquire(&path, record(4, 2)).unwrap();
    let lost = ours.renew().unwrap_err();
    assert!(matches!(lost, ClaimError::Lost { .. }), "{lost}");
    assert!(lost.to_string().contains("epoch 4 on node 2"), "{lost}");
    drop(other);
}

#[test]
fn a_renewal_finds_another_record_in_its_own_file() {
    let directory = tempfile::tempdir().unwrap();
    let (path, scratch) = (directory.path().join("vm.claim"), directory.path().join("scratch"));
    let mut ours = Claim::acquire(&path, record(3, 1)).unwrap();
    drop(Claim::acquire(&scratch, record(4, 2)).unwrap());
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&fs::read(&scratch).unwrap(), 0).unwrap();
    assert!(matches!(ours.renew(), Err(ClaimError::Lost { .. })));
    assert_eq!(Claim::peek(&path).unwrap().record, Some(record(4, 2)), "it is left alone");
}

#[test]
fn the_next_start_finds_the_epoch_of_a_renewed_claim() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.claim");
    let mut claim = Claim::acquire(&path, record(3, 1)).unwrap();
    claim.renew().unwrap();
    claim.raise(Epoch(5), 77).unwrap();
    claim.renew().unwrap();
    drop(claim);
    let refused = Claim::acquire(&path, record(4, 2)).unwrap_err();
    assert!(matches!(refused, ClaimError::Superseded { .. }), "{refused}");
    drop(Claim::acquire(&path, record(6, 2)).unwrap());
}

/// The record of a handover is carried on by every claim, until one lets a guest run.
#[test]
fn a_handover_is_carried_on_until_it_is_consumed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.claim");
    let handover = Handover { epoch: Epoch(3), generation: 7, bytes: 99, hash: [8; 32] };
    let mut claim = Claim::acquire(&path, record(3, 1)).unwrap();
    claim.hand_over(handover).unwrap();
    claim.renew().unwrap();
    drop(claim);
    // Attempts that come to nothing, and a claim that is raised.
    drop(Claim::acquire(&path, record(4, 2)).unwrap());
    let mut claim = Claim::acquire(&path, record(5, 3)).unwrap();
    claim.raise(Epoch(6), 1).unwrap();
    assert_eq!(claim.handover(), Some(handover));
    for _ in 0..2 {
        claim.consume_handover().unwrap();
        assert_eq!(claim.handover(), None);
    }
    drop(claim);
    let claim = Claim::acquire(&path, record(7, 1)).unwrap();
    assert_eq!((claim.handover(), claim.record()), (None, record(7, 1)));
}
