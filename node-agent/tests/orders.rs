//! Every order against a real agent process and a stand-in VMM.

mod common;

use bellwether_claim::{Claim, ClaimRecord, claim_path};
use bellwether_lease::LeasePage;
use bellwether_pki::Role;
use bellwether_proto::v1;
use bellwether_types::{BootId, Epoch, NodeId};
use common::{Lab, boot_id, new_vm, order, order_of, spec};
use tonic::Code;

#[tokio::test]
async fn a_vm_lives_its_whole_life() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    let first = lab.prepare(&vm, 1, "").await.unwrap();
    assert_eq!(lab.prepare(&vm, 1, "").await.unwrap(), first, "asked again it answers as before");
    lab.until_state(&vm, "starting").await;
    let timings = lab.activate(&vm, 1).await.unwrap();
    assert_eq!(lab.activate(&vm, 1).await.unwrap(), timings);
    lab.until_state(&vm, "running").await;

    let pause = v1::PauseVmRequest { order: order(&vm, 1) };
    lab.client.pause_vm(pause.clone()).await.unwrap();
    lab.client.pause_vm(pause).await.unwrap();
    assert_eq!(lab.until_state(&vm, "paused").await.vms[&vm].reason, "administrator");
    lab.client.resume_vm(v1::ResumeVmRequest { order: order(&vm, 1) }).await.unwrap();

    let sealed = lab.seal(&vm, 1).await.unwrap();
    assert_eq!(lab.seal(&vm, 1).await.unwrap(), sealed);
    lab.until_state(&vm, "saved").await;
    let file = sealed.file.unwrap();
    let claim =
        v1::ClaimBackRequest { order: order(&vm, 2), sealed_epoch: 1, file: Some(file.clone()) };
    let back = lab.client.claim_back(claim.clone()).await.unwrap().into_inner();
    assert_eq!(lab.client.claim_back(claim).await.unwrap().into_inner(), back);
    assert!(!std::path::Path::new(&file.path).exists(), "the claimed file is removed");
    assert_eq!(lab.until_state(&vm, "running").await.vms[&vm].epoch, 2);

    let released = lab.release(&vm, 2).await.unwrap();
    assert_eq!(released.reason, "stopped");
    assert_eq!(released.boot_id, uuid::Uuid::from_u128(1).to_string());
    assert_eq!(lab.release(&vm, 2).await.unwrap(), released);
    assert_eq!(lab.vmm_pid(&vm, 1), None);
    assert!(!lab.home(&vm, 1).exists());
    lab.until("forgotten", |heard| heard.vms.is_empty()).await;
    let refused = lab.prepare(&vm, 2, "").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("released every epoch up to 2"), "{refused}");
}

#[tokio::test]
async fn a_guest_that_shuts_down_is_stopped_and_not_failed() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    lab.client.shutdown_vm(v1::ShutdownVmRequest { order: order(&vm, 1) }).await.unwrap();
    assert_eq!(lab.until_state(&vm, "stopped").await.vms[&vm].reason, "guest-shutdown");
    assert_eq!(lab.release(&vm, 1).await.unwrap().reason, "guest-shutdown");
}

#[tokio::test]
async fn a_refused_vmm_is_gone_and_says_why() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    let refused = lab.prepare(&vm, 1, "create=refused").await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("node n7: kernel `/k`: no PVH entry"), "{refused}");
    assert_eq!(lab.vmm_pid(&vm, 1), None);
    assert!(!lab.home(&vm, 1).exists());
    lab.prepare(&vm, 1, "").await.unwrap();
}

#[tokio::test]
async fn a_full_storage_leaves_the_guest_running() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "save=full").await;
    let full = lab.seal(&vm, 1).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    assert!(full.message().contains("the guest goes on"), "{full}");
    lab.until_state(&vm, "running").await;
}

#[tokio::test]
async fn a_refused_start_promises_that_the_guest_never_runs() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.prepare(&vm, 4, "").await.unwrap();
    let vm_id = vm.parse().unwrap();
    let boot_id = BootId::from_uuid(uuid::Uuid::from_u128(8));
    let holder = ClaimRecord { vm_id, epoch: Epoch(5), node: NodeId(2), boot_id, nonce: 1 };
    let claim = Claim::acquire(&claim_path(&lab.storage(), vm_id), holder).unwrap();
    for _ in 0..2 {
        let aborted = lab.activate(&vm, 4).await.unwrap_err();
        assert_eq!(aborted.code(), Code::Aborted, "{aborted}");
    }
    assert_eq!(lab.vmm_pid(&vm, 4), None);
    lab.kill_agent();
    lab.restart_agent().await;
    assert_eq!(lab.activate(&vm, 4).await.unwrap_err().code(), Code::Aborted);
    drop(claim);
    lab.running(&vm, 6, "").await;
}

#[tokio::test]
async fn a_vmm_that_died_before_its_start_never_runs() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.prepare(&vm, 1, "").await.unwrap();
    common::kill(lab.vmm_pid(&vm, 1).unwrap());
    lab.until_state(&vm, "failed").await;
    assert_eq!(lab.activate(&vm, 1).await.unwrap_err().code(), Code::Aborted);
}

#[tokio::test]
async fn a_deleted_vm_leaves_nothing_on_the_storage() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    lab.seal(&vm, 1).await.unwrap();
    lab.release(&vm, 1).await.unwrap();
    let request = v1::RemoveStateRequest {
        order: order(&vm, 1),
        storage: lab.storage().display().to_string(),
        purge: true,
    };
    let removed = lab.client.remove_state(request).await.unwrap().into_inner().files_removed;
    assert_eq!(removed, 2);
    for dir in ["state", "claims"] {
        assert_eq!(std::fs::read_dir(lab.storage().join(dir)).unwrap().count(), 0, "{dir}");
    }
}

/// A claim that somebody holds once stayed behind, and the deletion was called done.
#[tokio::test]
async fn a_claim_that_is_held_is_not_purged() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    let request = v1::RemoveStateRequest {
        order: order(&vm, 1),
        storage: lab.storage().display().to_string(),
        purge: true,
    };
    let refused = lab.client.remove_state(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("held by"), "{refused}");
    lab.release(&vm, 1).await.unwrap();
    assert_eq!(lab.client.remove_state(request).await.unwrap().into_inner().files_removed, 1);
}

#[tokio::test]
async fn a_release_gets_through_to_a_vmm_that_hangs() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.prepare(&vm, 1, "start=hang stop=hang").await.unwrap();
    let order = order(&vm, 1);
    let request = v1::ActivateRequest { order, lock_wait_ms: 0, state_hash: Vec::new() };
    let mut client = lab.client.clone();
    let activate = tokio::spawn(async move { client.activate(request).await });
    lab.until("activating", |heard| heard.renewals > 3).await;
    let released = lab.release(&vm, 1).await.unwrap();
    assert_eq!(released.reason, "killed");
    let unknown = activate.await.unwrap().unwrap_err();
    assert!(
        unknown.code() == Code::DeadlineExceeded || unknown.code() == Code::FailedPrecondition,
        "{unknown}"
    );
    assert_eq!(lab.vmm_pid(&vm, 1), None);
}

#[tokio::test]
async fn a_takeover_needs_the_claim() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.prepare(&vm, 4, "").await.unwrap();
    let vm_id = vm.parse().unwrap();
    let holder = ClaimRecord {
        vm_id,
        epoch: Epoch(3),
        node: NodeId(2),
        boot_id: BootId::from_uuid(uuid::Uuid::from_u128(8)),
        nonce: 1,
    };
    let claim = Claim::acquire(&claim_path(&lab.storage(), vm_id), holder).unwrap();
    let request = v1::TakeOverRequest { order: order(&vm, 4), wait_ms: 0 };
    let reply = lab.client.take_over(request.clone()).await.unwrap().into_inner();
    assert!(!reply.held && reply.holder.contains("held by"), "{reply:?}");
    drop(claim);
    for _ in 0..2 {
        assert!(lab.client.take_over(request.clone()).await.unwrap().into_inner().held);
    }
    lab.activate(&vm, 4).await.unwrap();
}

#[tokio::test]
async fn a_restore_loads_before_it_runs() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.prepare(&vm, 1, "").await.unwrap();
    let file = v1::StateFile { path: "/s".into(), hash: vec![1; 32], epoch: 1, bytes: 1 };
    let load = v1::LoadStateRequest { order: order(&vm, 1), file: Some(file.clone()) };
    for _ in 0..2 {
        let reply = lab.client.load_state(load.clone()).await.unwrap().into_inner();
        assert_eq!(reply.load_us, 7);
    }
    lab.until_state(&vm, "restoring").await;
    let other = v1::StateFile { hash: vec![2; 32], ..file };
    let other = v1::LoadStateRequest { order: order(&vm, 1), file: Some(other) };
    let refused = lab.client.load_state(other).await.unwrap_err();
    assert!(refused.message().contains("another state file"), "{refused}");
    for _ in 0..2 {
        lab.activate_from(&vm, 1, &[1; 32]).await.unwrap();
    }
}

#[tokio::test]
async fn a_guest_never_goes_on_from_another_state_than_the_order_names() {
    let mut lab = Lab::new().await;
    for (loaded, named) in
        [(None, Some([1; 32])), (Some([1; 32]), None), (Some([1; 32]), Some([2; 32]))]
    {
        let vm = new_vm();
        lab.prepare(&vm, 1, "").await.unwrap();
        if let Some(hash) = loaded {
            let file = v1::StateFile { path: "/s".into(), hash: hash.to_vec(), epoch: 1, bytes: 1 };
            let load = v1::LoadStateRequest { order: order(&vm, 1), file: Some(file) };
            lab.client.load_state(load).await.unwrap();
        }
        let named = named.map(|hash| hash.to_vec()).unwrap_or_default();
        for _ in 0..2 {
            let refused = lab.activate_from(&vm, 1, &named).await.unwrap_err();
            assert_eq!(refused.code(), Code::Aborted, "the guest never ran: {refused}");
        }
        assert_eq!(lab.vmm_pid(&vm, 1), None, "what cannot run is released");
    }
}

#[tokio::test]
async fn an_order_for_another_boot_is_refused_and_may_be_given_again() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    let late = order(&vm, 1).map(|order| v1::Order { boot_id: boot_id(7), ..order });
    let refused = lab.client.release(v1::ReleaseRequest { order: late }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.message().contains(&format!("meant for the boot {}", boot_id(7))), "{refused}");
    let nameless = order(&vm, 1).map(|order| v1::Order { boot_id: String::new(), ..order });
    let refused = lab.client.release(v1::ReleaseRequest { order: nameless }).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    // Neither has raised the floor.
    lab.running(&vm, 1, "").await;
}

#[tokio::test]
async fn a_lease_vm_starts_only_under_a_grant_of_its_epoch() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    let request = v1::PrepareRequest {
        order: order(&vm, 2),
        spec: Some(spec("")),
        arbiter: "lease".into(),
        storage: lab.storage().display().to_string(),
    };
    lab.client.prepare(request).await.unwrap();
    lab.grant(&vm, 1);
    let refused = lab.activate(&vm, 2).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "it is to be given again");
    assert!(refused.message().contains("no controller has granted it"), "{refused}");
    lab.grant(&vm, 2);
    lab.activate(&vm, 2).await.unwrap();
    let page = LeasePage::open(&lab.home(&vm, 2).join("lease")).unwrap();
    let first = page.read().unwrap();
    assert_eq!(first.epoch, 2);
    let renewals = lab.until_state(&vm, "running").await.renewals;
    lab.until("two renewals", |heard| heard.renewals > renewals + 1).await;
    assert!(page.read().unwrap().deadline_ns > first.deadline_ns, "renewals move the deadline");
}

#[tokio::test]
async fn a_deposed_leader_is_refused() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    let old = v1::ReleaseRequest { order: order_of(&vm, 1, 4) };
    let refused = lab.client.release(old).await.unwrap_err();
    assert!(refused.message().contains("a leader of term 4"), "{refused}");
    lab.until_state(&vm, "running").await;
}

#[tokio::test]
async fn only_controllers_give_orders() {
    let lab = Lab::new().await;
    let request = v1::ReleaseRequest { order: order(&new_vm(), 1) };
    for mut client in [lab.client_of(Role::Admin), lab.client_of_agent()] {
        assert!(client.release(request.clone()).await.is_err());
    }
}

#[tokio::test]
async fn a_missing_storage_is_named_and_not_created() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    std::fs::remove_dir_all(lab.storage()).unwrap();
    let refused = lab.prepare(&vm, 1, "").await.unwrap_err();
    assert!(refused.message().contains("mount it on this node"), "{refused}");
    let inspect =
        v1::InspectRequest { spec: Some(spec("")), storage: lab.storage().display().to_string() };
    let problems = lab.client.inspect(inspect).await.unwrap().into_inner().problems;
    assert!(problems[0].contains("mount it on this node"), "{problems:?}");
    assert!(problems[1].contains("kernel `/k`: is not there"), "{problems:?}");
    assert!(!lab.storage().exists());
}

#[tokio::test]
async fn old_state_files_are_removed_and_those_in_use_are_not() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 3, "").await;
    let sealed = lab.seal(&vm, 3).await.unwrap().file.unwrap();
    let old = lab.storage().join(format!("state/{vm}.1.1.state"));
    std::fs::write(&old, "old").unwrap();
    let request = v1::RemoveStateRequest {
        order: order(&vm, 3),
        storage: lab.storage().display().to_string(),
        purge: false,
    };
    let removed = lab.client.remove_state(request).await.unwrap().into_inner().files_removed;
    assert_eq!(removed, 1);
    assert!(!old.exists() && std::path::Path::new(&sealed.path).exists());
}

#[tokio::test]
async fn the_console_goes_through() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    let hello = v1::ConsoleUp { order: order(&vm, 1), data: b"he".to_vec() };
    let more = v1::ConsoleUp { order: None, data: b"llo".to_vec() };
    let up = tokio_stream::iter([hello, more]);
    let mut down = lab.client.console(up).await.unwrap().into_inner();
    let mut echo = Vec::new();
    while let Some(message) = down.message().await.unwrap() {
        echo.extend(message.data);
        assert_eq!(message.dropped, 5);
    }
    assert_eq!(echo, b"hello");
}
