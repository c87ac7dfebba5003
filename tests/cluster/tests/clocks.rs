//! Wall clocks that jump by an hour, forwards and backwards, on the node that runs a VM, on the
//! leader, and on both: nothing happens twice, and the cluster can be used afterwards.
//!
//! The jump is real for the processes: a preloaded library moves what they take for the time of day
//! while they run. Monotonic clocks cannot jump on a real host, and do not here.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bellwether_cluster_tests::{Cases, Cluster, Options, Watch, wait_for};

const SOON: Duration = Duration::from_secs(40);
const HOUR: i64 = 3_600;
const VM: &str = "web";
/// Several leases: whatever a wrong clock makes anybody do has been begun by then.
const LEASES: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_clock_that_jumps_makes_nothing_happen_twice() -> Result<()> {
    let options = Options { wall_clocks: true, ..Options::default() };
    let mut cluster = Cluster::start(options).await?;
    let watch = cluster.run(&cluster.guest(VM)?).await?;
    let mut cases = Cases::new();
    for hour in [HOUR, -HOUR] {
        let home = cluster.home_of(VM).await?;
        let name = format!("the VM's node by {hour} s");
        cases.run(&name, jump(&mut cluster, &watch, home, hour)).await;
        let leader = cluster.leader().await?;
        let name = format!("the leader by {hour} s");
        cases.run(&name, jump(&mut cluster, &watch, leader, hour)).await;
    }
    cases.finish()?;
    drop(watch);
    cluster.finish()
}

async fn jump(cluster: &mut Cluster, watch: &Watch, node: usize, seconds: i64) -> Result<()> {
    let boots = watch.record().boots();
    let mark = watch.mark();
    cluster.node(node).set_clock(seconds)?;
    let ticks = LEASES.as_millis() as usize / 20;
    wait_for("the guest to go on for some leases", SOON, async || {
        Ok((watch.record().ticks(mark).count() > ticks).then_some(()))
    })
    .await?;
    watch.check()?;
    ensure!(watch.record().boots() == boots, "the guest was restarted");
    moves(cluster, watch).await.context("with the wrong clock")?;
    cluster.node(node).set_clock(0)?;
    moves(cluster, watch).await.context("with the right clock again")?;
    ensure!(watch.record().boots() == boots, "the guest was restarted");
    ensure!(cluster.running_instances(watch.vm_id()).await.len() == 1);
    watch.check()
}

async fn moves(cluster: &Cluster, watch: &Watch) -> Result<()> {
    cluster.wait_whole().await?;
    let home = cluster.home_of(VM).await?;
    cluster.migrate(VM, cluster.other_than(&[home])?).await?;
    watch.ticks_on(SOON).await?;
    Ok(())
}
