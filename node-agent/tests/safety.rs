//! What must not happen: a guest that runs without a record of it, an order of somebody who has
//! been replaced, a state that is told although nobody knows it.

mod common;

use std::time::Duration;

use bellwether_proto::v1;
use common::{Lab, new_vm, order, order_of, signal};
use rustix::process::Signal;
use tonic::{Code, Status};

/// Runs for as long as the records of an incarnation cannot be written.
struct Unwritable(std::path::PathBuf);

impl Unwritable {
    fn new(lab: &Lab, vm: &str, epoch: u64) -> Self {
        let path = lab.home(vm, epoch).join(".incarnation.json.tmp");
        std::fs::create_dir(&path).expect("a directory in the way");
        Self(path)
    }
}

impl Drop for Unwritable {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn claims(lab: &Lab) -> usize {
    std::fs::read_dir(lab.storage().join("claims")).expect("claims").count()
}

fn not_sent(status: &Status) {
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("was not asked for anything"), "{status}");
}

#[tokio::test]
async fn nothing_is_started_that_is_not_on_record() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.prepare(&vm, 1, "").await.unwrap();
    let unwritable = Unwritable::new(&lab, &vm, 1);
    not_sent(&lab.activate(&vm, 1).await.unwrap_err());
    assert_eq!(claims(&lab), 0, "a start takes the claim");
    let file = v1::StateFile { path: "/s".into(), hash: vec![1; 32], epoch: 1, bytes: 1 };
    let load = v1::LoadStateRequest { order: order(&vm, 1), file: Some(file) };
    not_sent(&lab.client.load_state(load).await.unwrap_err());
    drop(unwritable);
    lab.activate(&vm, 1).await.unwrap();
    lab.until_state(&vm, "running").await;
}

#[tokio::test]
async fn nothing_is_claimed_back_that_is_not_on_record() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    let file = lab.seal(&vm, 1).await.unwrap().file;
    let unwritable = Unwritable::new(&lab, &vm, 1);
    let back = v1::ClaimBackRequest { order: order(&vm, 2), sealed_epoch: 1, file };
    not_sent(&lab.client.claim_back(back.clone()).await.unwrap_err());
    lab.until_state(&vm, "saved").await;
    drop(unwritable);
    lab.client.claim_back(back).await.unwrap();
    assert_eq!(lab.until_state(&vm, "running").await.vms[&vm].epoch, 2);
}

#[tokio::test]
async fn an_adopted_vmm_that_is_mute_is_unknown() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    lab.kill_agent();
    let pid = lab.vmm_pid(&vm, 1).unwrap();
    signal(pid, Signal::STOP);
    lab.restart_agent().await;
    let heard = lab.until("the VM", |heard| !heard.state(&vm).is_empty()).await;
    assert_eq!(heard.registrations.last().unwrap().vms[0].state, "unknown");
    signal(pid, Signal::CONT);
    lab.until_state(&vm, "running").await;
}

#[tokio::test]
async fn a_load_without_an_answer_is_answered_by_the_next_agent() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.prepare(&vm, 1, "load=mute").await.unwrap();
    let file = v1::StateFile { path: "/s".into(), hash: vec![1; 32], epoch: 1, bytes: 1 };
    let load = v1::LoadStateRequest { order: order(&vm, 1), file: Some(file.clone()) };
    let (mut client, first) = (lab.client.clone(), load.clone());
    let unanswered = tokio::spawn(async move { client.load_state(first).await });
    let loaded = lab.home(&vm, 1).join("loaded");
    let waited = async {
        while !loaded.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waited).await.unwrap();
    lab.kill_agent();
    unanswered.await.unwrap().unwrap_err();
    lab.restart_agent().await;
    for _ in 0..2 {
        lab.client.load_state(load.clone()).await.unwrap();
    }
    let other = v1::StateFile { hash: vec![2; 32], ..file };
    let other = v1::LoadStateRequest { order: order(&vm, 1), file: Some(other) };
    let refused = lab.client.load_state(other).await.unwrap_err();
    assert!(refused.message().contains("another state file"), "{refused}");
}

async fn released_in(lab: &mut Lab, term: u64) -> Result<(), Status> {
    let request = v1::ReleaseRequest { order: order_of(&new_vm(), 1, term) };
    lab.client.release(request).await.map(drop)
}

#[tokio::test]
async fn a_deposed_leader_is_refused_for_every_vm_and_by_the_next_agent() {
    let mut lab = Lab::new().await;
    released_in(&mut lab, 5).await.unwrap();
    for _ in 0..2 {
        let refused = released_in(&mut lab, 4).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("has heard of term 5"), "{refused}");
        lab.kill_agent();
        lab.restart_agent().await;
    }
    // A renewal tells of the new leader before any of its orders does.
    lab.lead_in(9);
    let renewals = lab.until("a renewal", |heard| heard.renewals > 0).await.renewals;
    lab.until("two more", |heard| heard.renewals > renewals + 2).await;
    let refused = released_in(&mut lab, 8).await.unwrap_err();
    assert!(refused.message().contains("has heard of term 9"), "{refused}");
    lab.kill_agent();
    lab.lead_in(1);
    lab.restart_agent().await;
    released_in(&mut lab, 8).await.unwrap_err();
    released_in(&mut lab, 9).await.unwrap();
}

#[tokio::test]
async fn a_term_that_cannot_be_kept_is_not_obeyed() {
    let mut lab = Lab::new().await;
    let renewals = lab.until("a renewal", |heard| heard.renewals > 0).await.renewals;
    lab.until("another", |heard| heard.renewals > renewals).await;
    let entries = std::fs::read_dir(lab.runtime()).unwrap().map(|entry| entry.unwrap().path());
    let is_term = |path: &std::path::PathBuf| path.to_string_lossy().contains("/term.");
    let file = entries.into_iter().find(is_term).unwrap();
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    assert_eq!(released_in(&mut lab, 5).await.unwrap_err().code(), Code::Unavailable);
    std::fs::remove_dir(&file).unwrap();
    released_in(&mut lab, 5).await.unwrap();
}

#[tokio::test]
async fn a_refused_release_calls_nothing_off() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.prepare(&vm, 1, "start=hang stop=hang").await.unwrap();
    let order = order(&vm, 1);
    let request = v1::ActivateRequest { order, lock_wait_ms: 0, state_hash: Vec::new() };
    let mut client = lab.client.clone();
    let activate = tokio::spawn(async move { client.activate(request).await });
    let record = lab.home(&vm, 1).join("incarnation.json");
    let sent = async {
        while !std::fs::read_to_string(&record).unwrap().contains("\"may_have_run\":true") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), sent).await.unwrap();
    let stale = v1::ReleaseRequest { order: order_of(&vm, 1, 4) };
    let refused = lab.client.release(stale).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let renewals = lab.until("a renewal", |heard| heard.renewals > 0).await.renewals;
    lab.until("some more", |heard| heard.renewals > renewals + 3).await;
    assert!(!activate.is_finished(), "{:?}", activate.await);
    assert_eq!(lab.release(&vm, 1).await.unwrap().reason, "killed");
    activate.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_task_that_is_over_does_not_seal() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "save=full").await;
    let seal = |lab: &Lab, task| v1::SealRequest {
        order: order(&vm, 1).map(|order| v1::Order { task, ..order }),
        storage: lab.storage().display().to_string(),
    };
    let newer = lab.client.seal(seal(&lab, 9)).await.unwrap_err();
    assert_eq!(newer.code(), Code::ResourceExhausted, "{newer}");
    for _ in 0..2 {
        let older = lab.client.seal(seal(&lab, 8)).await.unwrap_err();
        assert_eq!(older.code(), Code::FailedPrecondition, "{older}");
        assert!(older.message().contains("has written the VM's state for task 9"), "{older}");
        lab.kill_agent();
        lab.restart_agent().await;
    }
    lab.until_state(&vm, "running").await;
}

#[tokio::test]
async fn what_was_sealed_is_told_by_a_later_agent_after_the_end_of_the_vmm() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    let file = lab.seal(&vm, 1).await.unwrap().file;
    signal(lab.vmm_pid(&vm, 1).unwrap(), Signal::KILL);
    lab.until("its end", |heard| heard.vms[&vm].reason == "killed").await;
    lab.until_state(&vm, "saved").await;
    lab.kill_agent();
    lab.restart_agent().await;
    lab.until_state(&vm, "saved").await;
    assert_eq!(lab.seal(&vm, 1).await.unwrap().file, file);
}

/// A VMM reads its memory from the file on demand; the agent that told it to may be gone.
#[tokio::test]
async fn a_file_that_is_still_read_is_not_swept_by_a_later_agent() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.prepare(&vm, 2, "").await.unwrap();
    let path = lab.storage().join(format!("state/{vm}.1.3.state"));
    std::fs::write(&path, "sealed").unwrap();
    let file =
        v1::StateFile { path: path.display().to_string(), hash: vec![1; 32], epoch: 1, bytes: 6 };
    let load = v1::LoadStateRequest { order: order(&vm, 2), file: Some(file) };
    lab.client.load_state(load).await.unwrap();
    lab.kill_agent();
    lab.restart_agent().await;
    let storage = lab.storage().display().to_string();
    let sweep = v1::RemoveStateRequest { order: order(&vm, 1), storage, purge: false };
    lab.client.remove_state(sweep.clone()).await.unwrap();
    assert!(path.exists(), "the VMM still reads it");
    lab.release(&vm, 2).await.unwrap();
    lab.client.remove_state(sweep).await.unwrap();
    assert!(!path.exists());
}
