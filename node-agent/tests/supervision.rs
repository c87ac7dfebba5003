//! VMMs outlive their agent; what dies is seen; what was promised is kept across a restart.

mod common;

use common::{Lab, kill, new_vm, stand_in};
use tonic::Code;

#[tokio::test]
async fn a_vmm_outlives_its_agent_and_is_adopted() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    let pid = lab.vmm_pid(&vm, 1);
    assert!(pid.is_some());
    lab.kill_agent();
    assert_eq!(lab.vmm_pid(&vm, 1), pid, "SIGKILL of the agent ends only the agent");
    lab.restart_agent().await;
    let heard = lab.until_state(&vm, "running").await;
    let registration = heard.registrations.last().unwrap();
    assert_eq!(registration.vms[0].state, "running", "already the registration tells of it");
    lab.activate(&vm, 1).await.unwrap();
    assert_eq!(lab.release(&vm, 1).await.unwrap().reason, "stopped");
    assert_eq!(lab.vmm_pid(&vm, 1), None);
}

#[tokio::test]
async fn an_adopted_vmm_that_dies_is_seen_too() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    lab.kill_agent();
    lab.restart_agent().await;
    kill(lab.vmm_pid(&vm, 1).unwrap());
    let heard = lab.until_state(&vm, "failed").await;
    assert_eq!(heard.vms[&vm].reason, "killed");
    assert_eq!(lab.release(&vm, 1).await.unwrap().reason, "killed");
}

#[tokio::test]
async fn a_vmm_that_died_without_an_agent_is_reported_until_it_is_released() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    let pid = lab.vmm_pid(&vm, 1).unwrap();
    lab.kill_agent();
    kill(pid);
    lab.restart_agent().await;
    assert_eq!(lab.until_state(&vm, "failed").await.vms[&vm].reason, "killed");
    let refused = lab.activate(&vm, 1).await.unwrap_err();
    assert!(refused.message().contains("has ended (killed)"), "{refused}");
    assert_eq!(lab.release(&vm, 1).await.unwrap().reason, "killed");
    assert!(!lab.home(&vm, 1).exists());
    lab.running(&vm, 2, "").await;
}

#[tokio::test]
async fn a_released_epoch_stays_released_across_a_restart() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 5, "").await;
    let released = lab.release(&vm, 5).await.unwrap();
    lab.kill_agent();
    lab.restart_agent().await;
    assert_eq!(lab.release(&vm, 5).await.unwrap(), released, "answered as before");
    for epoch in [4, 5] {
        let refused = lab.prepare(&vm, epoch, "").await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("released every epoch up to 5"), "{refused}");
    }
    lab.prepare(&vm, 6, "").await.unwrap();
}

#[tokio::test]
async fn a_sealed_vm_is_still_sealed_after_a_restart() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    let sealed = lab.seal(&vm, 1).await.unwrap();
    lab.kill_agent();
    lab.restart_agent().await;
    lab.until_state(&vm, "saved").await;
    assert_eq!(lab.seal(&vm, 1).await.unwrap(), sealed);
}

#[tokio::test]
async fn a_new_boot_id_is_true_before_it_is_told() {
    let mut lab = Lab::new().await;
    let vm = new_vm();
    lab.running(&vm, 1, "").await;
    lab.kill_agent();
    lab.set_boot_id(2);
    lab.restart_agent().await;
    assert_eq!(lab.vmm_pid(&vm, 1), None, "nothing of the old boot may run");
    let heard = lab.until("two boots", |heard| heard.registrations.len() == 2).await;
    assert_ne!(heard.registrations[0].boot_id, heard.registrations[1].boot_id);
    assert!(heard.registrations[1].vms.is_empty());
}

#[tokio::test]
async fn a_second_agent_does_not_start() {
    let mut lab = Lab::new().await;
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_bellwether-agent"))
        .args(["run", "--data-dir"])
        .arg(lab.dir.path().join("node"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("another agent runs on"), "{text}");
    lab.kill_agent();
}

#[tokio::test]
async fn the_controllers_are_learnt_and_remembered() {
    let mut lab = Lab::new().await;
    let before = lab.known_controllers();
    assert_eq!(before.len(), 2);
    let api = before[1].ports.api;
    lab.announce_controllers(&[api]);
    let renewals = lab.until("a renewal", |heard| heard.renewals > 0).await.renewals;
    lab.until("more renewals", |heard| heard.renewals > renewals + 2).await;
    let after = lab.known_controllers();
    assert_eq!(after.iter().map(|known| known.ports.api).collect::<Vec<_>>(), [api]);
    lab.kill_agent();
    lab.restart_agent().await;
}

/// The agent dies at each side of each step; the next one goes on, and nothing runs twice.
#[tokio::test]
async fn an_agent_that_dies_in_a_step_is_continued() {
    for point in [
        "agent.prepare.before",
        "agent.prepare.after",
        "agent.activate.before",
        "agent.activate.after",
        "agent.seal.before",
        "agent.seal.after",
        "agent.release.before",
        "agent.release.after",
    ] {
        let mut lab = Lab::without_agent(stand_in()).await;
        lab.environment = vec![("BELLWETHER_FAILPOINTS".into(), format!("{point}=kill"))];
        lab.start_agent();
        lab.until("registered", |heard| !heard.registrations.is_empty()).await;
        let vm = new_vm();
        let died = walk(&mut lab, &vm).await;
        assert!(died.is_err(), "{point}: the agent answered after it was killed");
        lab.agent_died();
        lab.environment.clear();
        lab.restart_agent().await;
        walk(&mut lab, &vm).await.unwrap_or_else(|status| panic!("{point}: {status}"));
        assert_eq!(lab.vmm_pid(&vm, 1), None, "{point}");
    }
}

/// A whole life, each step of which may have been done before.
async fn walk(lab: &mut Lab, vm: &str) -> Result<(), tonic::Status> {
    let over = |status: &tonic::Status| status.message().contains("released every epoch");
    let prepared = lab.prepare(vm, 1, "").await;
    if prepared.as_ref().is_err_and(over) {
        return lab.release(vm, 1).await.map(|_| ());
    }
    prepared?;
    match lab.seal(vm, 1).await {
        Ok(_) => {}
        Err(status) if status.code() == Code::FailedPrecondition => {
            lab.activate(vm, 1).await?;
            lab.seal(vm, 1).await?;
        }
        Err(status) => return Err(status),
    }
    assert!(lab.vmm_pid(vm, 1).is_some());
    lab.release(vm, 1).await.map(|_| ())
}
