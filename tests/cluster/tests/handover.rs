//! A node that alone is cut off from the controllers hands its VMs over: they go on elsewhere with
//! their memory, whatever dies or comes back in the middle.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bellwether_cluster_tests::failpoints::{Failpoints, Hold};
use bellwether_cluster_tests::{Cases, Cluster, Options, Watch, wait_for};

const SOON: Duration = Duration::from_secs(60);
const VM: &str = "web";

#[tokio::test]
async fn a_node_that_is_cut_off_hands_its_vms_over() -> Result<()> {
    let options = Options {
        failpoints: true,
        agent: vec![("handover_after_ms", 3_000)],
        ..Options::default()
    };
    let mut cluster = Cluster::start(options).await?;
    let watch = cluster.run(&cluster.guest(VM)?).await?;
    let mut cases = Cases::new();
    cases.run("it lasts", it_lasts(&mut cluster, &watch)).await;
    cases.run("contact comes back in the middle", contact_back(&mut cluster, &watch)).await;
    cases.run("the agent dies when it is recorded", agent_dies(&mut cluster, &watch)).await;
    cases.run("nobody has a quorum", no_quorum(&mut cluster, &watch)).await;
    cases.run("the VMM dies before it is recorded", vmm_dies(&mut cluster, &watch)).await;
    cases.finish()?;
    cluster.finish()
}

/// Cuts the VM's node off from the controllers: it asks nobody any more.
async fn cut_off(cluster: &Cluster) -> Result<(usize, Hold)> {
    let home = cluster.home_of(VM).await?;
    Ok((home, cluster.failpoints()?.hold(&format!("agent.renew.node{home}"))?))
}

/// The VM runs on another node, with the memory that it had; then the cluster is whole again.
async fn goes_on_elsewhere(
    cluster: &Cluster,
    watch: &Watch,
    not: usize,
    boots: usize,
) -> Result<()> {
    let vm = cluster.admin().settled(VM, &["running"], SOON).await?;
    ensure!(vm.node != format!("node{not}"), "it runs on {}", vm.node);
    watch.ticks_on(SOON).await?;
    watch.verifies_again(SOON).await?;
    ensure!(watch.record().boots() == boots, "the guest booted anew");
    watch.check()
}

async fn comes_back(cluster: &Cluster, watch: &Watch, node: usize) -> Result<()> {
    cluster.admin().node_is(&format!("node{node}"), "online", SOON).await?;
    cluster.wait_whole().await?;
    watch.ticks_on(SOON).await?;
    let running = cluster.running_instances(watch.vm_id()).await;
    ensure!(running.len() == 1, "it runs {} times: {running:?}", running.len());
    watch.check()
}

async fn it_lasts(cluster: &mut Cluster, watch: &Watch) -> Result<()> {
    watch.ticks_on(SOON).await.context("before")?;
    let boots = watch.record().boots();
    let (home, cut) = cut_off(cluster).await?;
    cluster.admin().node_is(&format!("node{home}"), "unknown", SOON).await?;
    leaves(cluster, home).await?;
    goes_on_elsewhere(cluster, watch, home, boots).await?;
    let vm = cluster.admin().vm(VM).await?;
    ensure!(vm.fence_proof == "handed-over", "the proof is `{}`", vm.fence_proof);
    cut.let_go();
    comes_back(cluster, watch, home).await
}

/// Waits until the state names no runner on the node any more.
async fn leaves(cluster: &Cluster, home: usize) -> Result<()> {
    let name = format!("node{home}");
    wait_for("a VM that runs elsewhere", SOON, async || {
        let vm = cluster.admin().vm(VM).await?;
        Ok((vm.state == "running" && vm.node != name).then_some(()))
    })
    .await
}

/// It is sealed, and the controllers hear of it before it is recorded and let go.
async fn contact_back(cluster: &mut Cluster, watch: &Watch) -> Result<()> {
    let boots = watch.record().boots();
    let sealed = cluster.failpoints()?.hold("agent.seal.after")?;
    let (home, cut) = cut_off(cluster).await?;
    sealed.wait_reached(SOON).await?;
    cut.let_go();
    cluster.admin().node_is(&format!("node{home}"), "online", SOON).await?;
    sealed.let_go();
    watch.ticks_on(SOON).await?;
    cluster.admin().settled(VM, &["running"], SOON).await?;
    watch.verifies_again(SOON).await?;
    ensure!(watch.record().boots() == boots, "the guest booted anew");
    comes_back(cluster, watch, home).await
}

/// What is in the claim needs nobody of the old node any more.
async fn agent_dies(cluster: &mut Cluster, watch: &Watch) -> Result<()> {
    let boots = watch.record().boots();
    cluster.failpoints()?.kill("agent.hand-over.after")?;
    let (home, cut) = cut_off(cluster).await?;
    leaves(cluster, home).await?;
    goes_on_elsewhere(cluster, watch, home, boots).await?;
    cut.let_go();
    cluster.node(home).start_agent()?;
    comes_back(cluster, watch, home).await
}

/// Nobody else is answered either, so there is nobody to hand over to: the VM goes on.
async fn no_quorum(cluster: &mut Cluster, watch: &Watch) -> Result<()> {
    let boots = watch.record().boots();
    let all = |points: &Failpoints| -> Result<Vec<Hold>> {
        (1..=3).map(|node| points.hold(&format!("agent.renew.node{node}"))).collect()
    };
    let home = cluster.home_of(VM).await?;
    let cut = all(cluster.failpoints()?)?;
    for node in 1..=3 {
        cluster.admin().node_is(&format!("node{node}"), "unknown", SOON).await?;
    }
    // Twice as long as a node that is alone would wait.
    let until = tokio::time::Instant::now() + Duration::from_secs(6);
    while tokio::time::Instant::now() < until {
        watch.ticks_on(SOON).await?;
    }
    cut.into_iter().for_each(Hold::let_go);
    for node in 1..=3 {
        cluster.admin().node_is(&format!("node{node}"), "online", SOON).await?;
    }
    cluster.admin().settled(VM, &["running"], SOON).await?;
    ensure!(cluster.home_of(VM).await? == home, "it was moved");
    ensure!(watch.record().boots() == boots, "the guest booted anew");
    comes_back(cluster, watch, home).await
}

/// Without the record the file is worth nothing: the guest boots, as after any crash.
async fn vmm_dies(cluster: &mut Cluster, watch: &Watch) -> Result<()> {
    let boots = watch.record().boots();
    let sealed = cluster.failpoints()?.hold("agent.hand-over.before")?;
    let (home, cut) = cut_off(cluster).await?;
    sealed.wait_reached(SOON).await?;
    ensure!(cluster.kill_vmm(home, watch.vm_id()) > 0, "there is no VMM");
    leaves(cluster, home).await?;
    watch.ticks_on(SOON).await?;
    ensure!(watch.record().boots() == boots + 1, "it went on from a file that nobody recorded");
    watch.check()?;
    sealed.let_go();
    cut.let_go();
    comes_back(cluster, watch, home).await
}
