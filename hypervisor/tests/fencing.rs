//! Locks, epochs and leases: what keeps a second runner out, and an expired one still.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use bellwether_lease::LeasePage;
use bellwether_proto::v1::{LockRequest, PauseRequest, ResumeRequest};
use bellwether_vmm::clock::boottime_ns;
use common::{Config, Vmm, assert_refused, disk};
use tempfile::tempdir;
use tonic::Code;

const MIB: u64 = 1 << 20;
const MS: u64 = 1_000_000;

#[tokio::test]
async fn a_disk_has_one_runner_and_a_kill_frees_it() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let config = Config::new().with_disk(&disk);
    let mut first = Vmm::running(directory.path(), &config, 1).await;
    let mut second = Vmm::created(directory.path(), &config).await;
    assert_refused(second.start(2).await, Code::FailedPrecondition, &["disk.raw", "in use"]);
    assert_eq!(second.status().await.state, "created");
    first.console().await.wait_for("journal 3").await;
    let journal = first.console().await.number("journal").await;
    first.kill();
    second.start_within(2, 5000, false).await.unwrap();
    let found = second.console().await.wait_for("disk sectors=").await;
    assert!(found.contains("bad=0"), "{found}");
    let last: u64 =
        found.split("last=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(last >= journal, "record {journal} was acknowledged, the disk ends with {last}");
}

#[tokio::test]
async fn a_claim_names_its_holder_and_refuses_what_is_out_of_date() {
    let directory = tempdir().unwrap();
    let mut config = Config::new();
    config.request.claim_path = directory.path().join("vm.claim").display().to_string();
    config.request.node_id = 41;
    let mut first = Vmm::created(directory.path(), &config).await;
    first.client.lock(LockRequest { epoch: 3, wait_ms: 0 }).await.unwrap();
    assert!(first.status().await.locked);
    let mut second = Vmm::created(directory.path(), &config).await;
    assert_refused(
        second.start(4).await,
        Code::FailedPrecondition,
        &["held by", "epoch 3", "node 41"],
    );
    first.start(3).await.unwrap();
    first.console().await.wait_for("tick 1 ").await;
    first.kill();
    assert_refused(second.start(2).await, Code::Aborted, &["superseded", "epoch 3"]);
    assert_refused(second.start(3).await, Code::Aborted, &["superseded"]);
    second.start(4).await.unwrap();
    second.console().await.wait_for("tick 1 ").await;
}

#[tokio::test]
async fn a_claim_that_cannot_be_written_holds_the_guest_until_it_can() {
    let directory = tempdir().unwrap();
    let mut config = Config::new();
    config.request.claim_path = directory.path().join("vm.claim").display().to_string();
    let mut vmm = Vmm::spawn_limitable(directory.path()).await;
    vmm.create(&config).await.unwrap();
    vmm.start(3).await.unwrap();
    let mut console = vmm.console().await;
    console.wait_for("tick 1 ").await;
    limit_file_size(&vmm, Some(0));
    vmm.wait_state("paused", "claim-lost: writing the record").await;
    while !console.is_silent_for(Duration::from_millis(150)).await {}
    assert_refused(vmm.save(directory.path(), 1).await, Code::Aborted, &["claim"]);
    limit_file_size(&vmm, None);
    vmm.wait_state("running", "").await;
    console.number("tick").await;
}

/// Beyond the limit the kernel refuses every write of the process to a file (EFBIG).
fn limit_file_size(vmm: &Vmm, limit: Option<u64>) {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let pid = Pid::from_raw(vmm.child.id().cast_signed());
    prlimit(pid, Resource::Fsize, Rlimit { current: limit, maximum: None }).unwrap();
}

#[tokio::test]
async fn a_later_runners_record_holds_the_guest_for_good() {
    use bellwether_claim::{Claim, ClaimRecord};
    use bellwether_types::{BootId, Epoch, NodeId};
    let directory = tempdir().unwrap();
    let mut config = Config::new();
    let path = directory.path().join("vm.claim");
    config.request.claim_path = path.display().to_string();
    let mut vmm = Vmm::running(directory.path(), &config, 3).await;
    vmm.console().await.wait_for("tick 1 ").await;
    std::fs::remove_file(&path).unwrap();
    let record = ClaimRecord {
        vm_id: config.request.vm_id.parse().unwrap(),
        epoch: Epoch(4),
        node: NodeId(42),
        boot_id: BootId::from_uuid(uuid::Uuid::from_u128(1)),
        nonce: 1,
    };
    let later = Claim::acquire(&path, record).unwrap();
    let held = vmm.wait_state("paused", "claim-lost").await;
    assert!(held.reason.contains("epoch 4 on node 42"), "{}", held.reason);
    drop(later);
    // A claim that is lost for good is let go as any other.
    assert!(vmm.stop().await.success());
}

#[tokio::test]
async fn a_wait_for_locks_ends_when_the_vmm_is_to_stop() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let config = Config::new().with_disk(&disk);
    let _holder = Vmm::running(directory.path(), &config, 1).await;
    let mut waiter = Vmm::created(directory.path(), &config).await;
    let mut client = waiter.client.clone();
    let waiting =
        tokio::spawn(
            async move { client.lock(LockRequest { epoch: 2, wait_ms: 3_600_000 }).await },
        );
    // Status answers although the driver waits.
    assert_eq!(waiter.status().await.state, "created");
    assert!(waiter.stop().await.success());
    assert!(waiting.await.unwrap().is_err());
}

#[tokio::test]
async fn read_only_disks_are_shared_by_readers() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let mut readers = Vec::new();
    for _ in 0..2 {
        let mut config = Config::new();
        config.add_disk(&disk, true);
        let mut vmm = Vmm::running(directory.path(), &config, 1).await;
        let found = vmm.console().await.wait_for("disk sectors=").await;
        assert!(found.contains("ro=1"), "{found}");
        readers.push(vmm);
    }
    let mut writer = Vmm::created(directory.path(), &Config::new().with_disk(&disk)).await;
    assert_refused(writer.start(1).await, Code::FailedPrecondition, &["in use"]);
}

/// A guest under the lease arbiter, with the page that grants it.
async fn leased(directory: &std::path::Path, epoch: u64, lease_ms: u64) -> (Vmm, LeasePage) {
    let page = LeasePage::create(&directory.join("lease")).unwrap();
    page.grant(epoch, boottime_ns() + lease_ms * MS).unwrap();
    let vmm = Vmm::running(directory, &leased_config(directory, &page), epoch).await;
    (vmm, page)
}

/// With a claim and a disk.
fn leased_config(directory: &std::path::Path, page: &LeasePage) -> Config {
    let disk = directory.join("disk.raw");
    if !disk.exists() {
        common::disk(directory, "disk.raw", 8 * MIB);
    }
    let mut config = Config::new().with_disk(&disk);
    config.request.vm_id = uuid::Uuid::from_u128(7).to_string();
    config.request.claim_path = directory.join("vm.claim").display().to_string();
    config.request.arbiter = "lease".into();
    config.request.lease_path = page.path().display().to_string();
    config
}

/// A status in which the VMM says whether it holds its locks.
async fn wait_locked(vmm: &mut Vmm, locked: bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while vmm.status().await.locked != locked {
        assert!(Instant::now() < until, "the locks are not {locked} for ten seconds");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_lease_that_ends_pauses_and_one_that_returns_resumes() {
    let directory = tempdir().unwrap();
    let (mut vmm, page) = leased(directory.path(), 4, 60_000).await;
    let mut console = vmm.console().await;
    console.wait_for("journal 3").await;
    assert_eq!(vmm.status().await.lease_deadline_ns, page.read().unwrap().deadline_ns);
    // A deadline never moves backwards, so the end is tested with a page of a new, short lease.
    drop((vmm, console));
    let directory = tempdir().unwrap();
    let (mut vmm, page) = leased(directory.path(), 4, 1500).await;
    let mut console = vmm.console().await;
    console.wait_for("journal 1").await;
    vmm.wait_state("paused", "lease").await;
    let late_ns = boottime_ns().saturating_sub(page.read().unwrap().deadline_ns);
    assert!(boottime_ns() >= page.read().unwrap().deadline_ns);
    assert!(late_ns < 2000 * MS, "paused {late_ns} ns after the deadline");
    while !console.is_silent_for(Duration::from_millis(150)).await {}
    page.grant(4, boottime_ns() + 60_000 * MS).unwrap();
    vmm.wait_state("running", "").await;
    console.number("tick").await;
    console.number("journal").await;
}

#[tokio::test]
async fn who_stands_still_lets_go_and_takes_back_what_nobody_wanted() {
    let directory = tempdir().unwrap();
    let (mut vmm, page) = leased(directory.path(), 4, 1000).await;
    let mut console = vmm.console().await;
    console.wait_for("journal 1").await;
    vmm.wait_state("paused", "lease").await;
    wait_locked(&mut vmm, false).await;
    let claim = directory.path().join("vm.claim");
    assert!(!bellwether_claim::Claim::peek(&claim).unwrap().held);
    // Twice: what was taken back is watched over and let go as before.
    for length_ms in [1000, 60_000] {
        page.grant(4, boottime_ns() + length_ms * MS).unwrap();
        wait_locked(&mut vmm, true).await;
        console.number("journal").await;
        if length_ms == 1000 {
            wait_locked(&mut vmm, false).await;
        }
    }
    vmm.wait_state("running", "").await;
    assert!(bellwether_claim::Claim::peek(&claim).unwrap().held);
}

#[tokio::test]
async fn a_successor_finds_the_locks_free_and_keeps_them() {
    let directory = tempdir().unwrap();
    let (mut old, page) = leased(directory.path(), 4, 1000).await;
    let mut console = old.console().await;
    console.wait_for("journal 1").await;
    wait_locked(&mut old, false).await;
    let theirs = tempdir().unwrap();
    let their_page = LeasePage::create(&theirs.path().join("lease")).unwrap();
    their_page.grant(5, boottime_ns() + 60_000 * MS).unwrap();
    let config = leased_config(directory.path(), &their_page);
    let mut new = Vmm::running(theirs.path(), &config, 5).await;
    let found = new.console().await.wait_for("disk sectors=").await;
    assert!(found.contains("bad=0"), "{found}");
    // A grant that is out of date lets nobody in who has been succeeded, not even when the
    // successor is gone.
    page.grant(4, boottime_ns() + 60_000 * MS).unwrap();
    let refused = old.wait_state("paused", "claim-lost").await;
    assert!(refused.reason.contains("held by"), "{}", refused.reason);
    new.kill();
    let until = Instant::now() + Duration::from_secs(10);
    while !old.status().await.reason.contains("was succeeded by") {
        assert!(Instant::now() < until, "{}", old.status().await.reason);
        tokio::task::yield_now().await;
    }
    assert_refused(old.save(directory.path(), 1).await, Code::Aborted, &["claim"]);
    while !console.is_silent_for(Duration::from_millis(500)).await {}
    assert!(!old.status().await.locked);
    assert!(old.stop().await.success());
}

#[tokio::test]
async fn a_guest_without_a_lease_is_saved_under_its_locks() {
    let directory = tempdir().unwrap();
    let (mut vmm, _page) = leased(directory.path(), 4, 1000).await;
    vmm.console().await.wait_for("journal 1").await;
    wait_locked(&mut vmm, false).await;
    vmm.save(directory.path(), 1).await.unwrap();
    assert_eq!(vmm.status().await.state, "sealed");
    assert!(vmm.status().await.locked, "who has the file has the claim");
}

#[tokio::test]
async fn a_lease_that_returns_does_not_resume_what_an_administrator_paused() {
    let directory = tempdir().unwrap();
    let (mut vmm, page) = leased(directory.path(), 4, 800).await;
    vmm.client.pause(PauseRequest {}).await.unwrap();
    vmm.wait_state("paused", "lease").await;
    page.grant(4, boottime_ns() + 60_000 * MS).unwrap();
    vmm.wait_state("paused", "administrator").await;
    vmm.client.resume(ResumeRequest {}).await.unwrap();
    vmm.wait_state("running", "").await;
}

#[tokio::test]
async fn a_start_without_leave_waits_for_it() {
    let directory = tempdir().unwrap();
    let page = LeasePage::create(&directory.path().join("lease")).unwrap();
    let mut config = Config::new();
    config.request.arbiter = "lease".into();
    config.request.lease_path = page.path().display().to_string();
    page.grant(8, boottime_ns() + 60_000 * MS).unwrap();
    let mut vmm = Vmm::running(directory.path(), &config, 9).await;
    let mut console = vmm.console().await;
    vmm.wait_state("paused", "lease").await;
    assert!(console.is_silent_for(Duration::from_millis(100)).await);
    page.grant(9, boottime_ns() + 60_000 * MS).unwrap();
    console.wait_for("tick 1 ").await;
}

#[tokio::test]
async fn a_higher_epoch_in_the_page_stops_a_vm_whatever_its_arbiter() {
    let directory = tempdir().unwrap();
    let page = LeasePage::create(&directory.path().join("lease")).unwrap();
    let mut config = Config::new();
    config.request.lease_path = page.path().display().to_string();
    page.grant(2, 1).unwrap();
    let mut vmm = Vmm::running(directory.path(), &config, 2).await;
    let mut console = vmm.console().await;
    // The storage arbiter goes on without a lease ...
    console.wait_for("tick 20 ").await;
    // ... but not against a higher epoch.
    page.grant(3, 1).unwrap();
    vmm.wait_state("paused", "superseded").await;
    assert_refused(vmm.save(directory.path(), 1).await, Code::Aborted, &["higher epoch"]);
}

#[tokio::test]
async fn a_corrupt_page_is_an_expired_lease() {
    use std::os::unix::fs::FileExt;
    let directory = tempdir().unwrap();
    let (mut vmm, page) = leased(directory.path(), 4, 2000).await;
    let mut console = vmm.console().await;
    console.wait_for("tick 2 ").await;
    let file = std::fs::File::options().write(true).open(page.path()).unwrap();
    file.write_all_at(b"X", 0).unwrap();
    // A disk submission notices at once, the timer at the deadline.
    vmm.wait_state("paused", "lease").await;
    file.write_all_at(b"B", 0).unwrap();
    page.grant(4, boottime_ns() + 60_000 * MS).unwrap();
    vmm.wait_state("running", "").await;
    console.number("journal").await;
}
