//! A leader whose followers stand still for several leases: it says nothing of the nodes that it cannot
//! count any more, and nothing follows when its followers are back.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Result, ensure};
use bellwether_cluster_tests::process::{freeze, processes_of, thaw};
use bellwether_cluster_tests::{Cluster, Options, wait_for};

const SOON: Duration = Duration::from_secs(40);
/// Several leases, in ticks of the guest.
const TICKS: usize = 5_000 / 10;

#[tokio::test]
async fn a_leader_without_a_quorum_says_nothing_of_its_nodes() -> Result<()> {
    let mut cluster = Cluster::start(Options::default()).await?;
    let watch = cluster.run(&cluster.guest("web")?).await?;
    let (leader, boots) = (cluster.leader().await?, watch.record().boots());
    let mut followers = Vec::new();
    for number in (1..=3).filter(|number| *number != leader) {
        let found = processes_of(cluster.node(number).dir());
        followers.extend(found.into_iter().filter(|it| it.program == "bellwether-controller"));
    }
    ensure!(followers.len() == 2, "{followers:?}");
    followers.iter().for_each(freeze);
    let mark = watch.mark();
    wait_for("some leases to pass", SOON, async || {
        Ok((watch.record().ticks(mark).count() > TICKS).then_some(()))
    })
    .await?;
    followers.iter().for_each(thaw);
    cluster.wait_whole().await?;
    let events = cluster.bell().text(&["event", "list"]).await?;
    ensure!(!events.contains("is not heard from"), "{events}");
    ensure!(!events.contains("failover"), "{events}");
    ensure!(watch.record().boots() == boots, "the guest was restarted");
    watch.check()?;
    drop(watch);
    cluster.finish()
}
