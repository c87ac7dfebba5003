//! A node that falls silent while it seals costs no memory: the guest goes on where it was sealed,
//! or on another node from its file.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bellwether_cluster_tests::{Cases, Cluster, Options, Watch, wait_for};

const SOON: Duration = Duration::from_secs(40);
const VM: &str = "web";

#[tokio::test]
async fn a_node_that_is_silent_while_it_seals_costs_no_memory() -> Result<()> {
    let options = Options { failpoints: true, ..Options::default() };
    let mut cluster = Cluster::start(options).await?;
    let watch = cluster.run(&cluster.guest(VM)?).await?;
    let mut cases = Cases::new();
    cases.run("the sealed VMM lives", silent(&mut cluster, &watch, false)).await;
    cases.run("the sealed VMM dies", silent(&mut cluster, &watch, true)).await;
    cases.finish()?;
    cluster.finish()
}

/// The agent dies with the answer to a seal, and comes back when its node is given up.
async fn silent(cluster: &mut Cluster, watch: &Watch, kill_vmm: bool) -> Result<()> {
    watch.ticks_on(SOON).await.context("before")?;
    let boots = watch.record().boots();
    let home = cluster.home_of(VM).await?;
    let (name, to) = (format!("node{home}"), cluster.other_than(&[home])?);
    let hold = cluster.failpoints()?.hold("agent.seal.after")?;
    let task = cluster.admin().migrate(VM, &format!("node{to}")).await?;
    hold.wait_reached(SOON).await?;
    cluster.node(home).kill_agent();
    if kill_vmm {
        // Without locks in their way the others would boot it from its disks: that is a takeover.
        for other in (1..=3).filter(|other| *other != home) {
            cluster.bell().text(&["node", "drain", &format!("node{other}")]).await?;
        }
        ensure!(cluster.kill_vmm(home, watch.vm_id()) > 0, "there is no VMM");
    }
    hold.let_go();
    let ended = cluster.admin().task_ended(task, SOON).await?;
    ensure!(ended.error.contains("was lost during `seal`"), "{}: {}", ended.outcome, ended.error);
    cluster.admin().node_is(&name, "unknown", SOON).await?;
    cluster.node(home).start_agent()?;
    cluster.admin().settled(VM, &["running"], SOON).await?;
    watch.ticks_on(SOON).await?;
    watch.verifies_again(SOON).await?;
    ensure!(watch.record().boots() == boots, "the guest booted anew");
    watch.check()?;
    for node in 1..=3 {
        cluster.bell().text(&["node", "resume", &format!("node{node}")]).await?;
    }
    wait_for("nodes that take VMs", SOON, async || {
        Ok(cluster.wait_whole().await.is_ok().then_some(()))
    })
    .await
}
