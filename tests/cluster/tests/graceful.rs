//! What administrators and service managers do every day: no guest may notice.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bellwether_cluster_tests::migration::runs_once;
use bellwether_cluster_tests::{Cases, Cluster, Options, Watch, wait_for};

const SOON: Duration = Duration::from_secs(40);
const CONFLICT: i32 = 4;

#[tokio::test]
async fn everyday_work_disturbs_no_guest() -> Result<()> {
    let mut cluster = Cluster::start(Options::default()).await?;
    let guests = Guests::start(&cluster).await?;
    let mut cases = Cases::new();
    cases.run("starts", starts(&cluster)).await;
    cases.run("console", console(&cluster, &guests)).await;
    cases.run("pause and resume", pause(&cluster, &guests)).await;
    cases.run("save and restore", save_and_restore(&cluster, &guests)).await;
    cases.run("drain and resume", drain(&cluster, &guests)).await;
    cases.run("kill -9 of an agent", kill_agent(&mut cluster, &guests)).await;
    cases.run("restart of an agent", restart_agent(&mut cluster, &guests)).await;
    cases.run("kill of the leader", kill_leader(&mut cluster, &guests)).await;
    cases.run("restart of all controllers", restart_controllers(&mut cluster, &guests)).await;
    cases.run("no guest was restarted", async { guests.undisturbed() }).await;
    cases.run("confirm-down", confirm_down(&mut cluster, &guests)).await;
    cases.finish()?;
    drop(guests);
    cluster.finish()
}

/// Two VMs that must live through everything.
struct Guests {
    web: Watch,
    db: Watch,
}

impl Guests {
    async fn start(cluster: &Cluster) -> Result<Self> {
        let web = cluster.run(&cluster.guest("web")?).await?;
        let db = cluster.run(&cluster.guest("db")?).await?;
        Ok(Self { web, db })
    }

    async fn tick(&self) -> Result<()> {
        self.web.ticks_on(SOON).await.context("web")?;
        self.db.ticks_on(SOON).await.context("db")?;
        Ok(())
    }

    fn undisturbed(&self) -> Result<()> {
        for watch in [&self.web, &self.db] {
            watch.check()?;
            ensure!(watch.record().boots() == 1, "a guest booted anew");
        }
        Ok(())
    }
}

/// A start is one boot: a report of the time before the guest ran must not be taken for its end.
async fn starts(cluster: &Cluster) -> Result<()> {
    for number in 0..4 {
        let name = format!("start-{number}");
        let watch = cluster.run(&cluster.guest(&name)?).await?;
        let mark = watch.mark();
        wait_for("the guest to run for a second", SOON, async || {
            Ok((watch.record().ticks(mark).count() > 100).then_some(()))
        })
        .await?;
        ensure!(watch.record().boots() == 1, "{name} booted {} times", watch.record().boots());
        cluster.remove(&name).await?;
    }
    Ok(())
}

async fn console(cluster: &Cluster, guests: &Guests) -> Result<()> {
    let seen = cluster
        .bell()
        .text(&["vm", "console", "web", "--until", "journal", "--for", "20s"])
        .await?;
    ensure!(seen.contains("tick ") && seen.contains("journal"), "the console shows: {seen}");
    guests.tick().await
}

async fn pause(cluster: &Cluster, guests: &Guests) -> Result<()> {
    let bell = cluster.bell();
    let said = bell.text(&["vm", "pause", "web"]).await?;
    ensure!(said.contains("paused"), "the answer tells the state before the pause: {said}");
    cluster.admin().settled("web", &["paused"], SOON).await?;
    wait_for("the guest to stand still", SOON, async || {
        Ok(cluster.running_instances(guests.web.vm_id()).await.is_empty().then_some(()))
    })
    .await?;
    bell.text(&["vm", "resume", "web"]).await?;
    cluster.admin().settled("web", &["running"], SOON).await?;
    guests.tick().await?;
    guests.undisturbed()
}

async fn save_and_restore(cluster: &Cluster, guests: &Guests) -> Result<()> {
    let bell = cluster.bell();
    bell.text(&["vm", "save", "web"]).await?;
    cluster.admin().settled("web", &["saved"], SOON).await?;
    bell.refused(&["vm", "start", "web"], CONFLICT, &["saved", "restore"]).await?;
    bell.text(&["vm", "restore", "web"]).await?;
    guests.web.verifies_again(SOON).await?;
    guests.undisturbed()
}

async fn drain(cluster: &Cluster, guests: &Guests) -> Result<()> {
    let node = cluster.home_of("web").await?;
    let name = format!("node{node}");
    if cluster.home_of("db").await? != node {
        cluster.migrate("db", node).await.context("bring both VMs together")?;
    }
    cluster.bell().text(&["node", "drain", &name]).await?;
    cluster.admin().node_is(&name, "maintenance", SOON).await?;
    for vm in ["web", "db"] {
        let vm = cluster.admin().settled(vm, &["running"], SOON).await?;
        ensure!(vm.node != name, "a VM is still on {name}");
    }
    let refused = cluster.bell().run(&["vm", "migrate", "web", "--to", &name]).await?;
    ensure!(
        refused.code != 0 && refused.err.contains(&name),
        "a drained node took a VM: {refused:?}"
    );
    cluster.bell().text(&["node", "resume", &name]).await?;
    cluster.admin().node_is(&name, "online", SOON).await?;
    guests.tick().await?;
    guests.undisturbed()
}

/// The VMM goes on without its agent, and the next agent adopts it.
async fn kill_agent(cluster: &mut Cluster, guests: &Guests) -> Result<()> {
    let home = cluster.home_of("web").await?;
    let name = format!("node{home}");
    cluster.node(home).kill_agent();
    cluster.admin().node_is(&name, "unknown", SOON).await?;
    guests.tick().await.context("without an agent")?;
    let vm = cluster.admin().vm("web").await?;
    ensure!(vm.state != "running", "the state is `{}` although nobody can know", vm.state);
    cluster.node(home).start_agent()?;
    cluster.admin().node_is(&name, "online", SOON).await?;
    cluster.admin().settled("web", &["running"], SOON).await?;
    ensure!(cluster.home_of("web").await? == home, "the VM was moved for nothing");
    cluster.migrate("web", cluster.other_than(&[home])?).await.context("move the adopted VM")?;
    guests.tick().await?;
    guests.undisturbed()
}

async fn restart_agent(cluster: &mut Cluster, guests: &Guests) -> Result<()> {
    let home = cluster.home_of("web").await?;
    ensure!(cluster.node(home).restart_agent_gracefully()?, "the agent does not end on SIGTERM");
    cluster.wait_whole().await?;
    guests.tick().await?;
    ensure!(cluster.home_of("web").await? == home, "the VM was moved for nothing");
    guests.undisturbed()
}

async fn kill_leader(cluster: &mut Cluster, guests: &Guests) -> Result<()> {
    let leader = cluster.leader().await?;
    cluster.node(leader).kill_controller();
    let next = wait_for("another leader", SOON, async || {
        let now = usize::try_from(cluster.admin().status().await?.leader)?;
        Ok(Some(now).filter(|now| *now != leader && *now != 0))
    })
    .await?;
    cluster.join_token("agent").await.context("a write with two of three controllers")?;
    guests.tick().await?;
    cluster.node(leader).start_controller()?;
    cluster.wait_whole().await?;
    ensure!(next != leader);
    guests.undisturbed()
}

async fn restart_controllers(cluster: &mut Cluster, guests: &Guests) -> Result<()> {
    let before = cluster.admin().vm("web").await?;
    for node in 1..=3 {
        cluster.node(node).kill_controller();
    }
    guests.tick().await.context("without any controller")?;
    for node in 1..=3 {
        cluster.node(node).start_controller()?;
    }
    cluster.wait_whole().await?;
    let after = cluster.admin().settled("web", &["running"], SOON).await?;
    let told = (after.node, after.epoch) == (before.node, before.epoch);
    ensure!(told, "the controllers forgot who runs the VM");
    guests.tick().await?;
    guests.undisturbed()
}

/// A person asserts that a node is down: recorded, and good until it comes back.
async fn confirm_down(cluster: &mut Cluster, guests: &Guests) -> Result<()> {
    let node = cluster.home_of("web").await?;
    let name = format!("node{node}");
    cluster.node(node).power_off();
    cluster.admin().node_is(&name, "unknown", SOON).await?;
    let bell = cluster.bell();
    let typo = bell.run(&["node", "confirm-down", &name, "--confirm", "node0"]).await?;
    ensure!(typo.code != 0, "another name was taken for a confirmation");
    bell.text(&["node", "confirm-down", &name, "--confirm", &name]).await?;
    cluster.admin().node_is(&name, "fenced", SOON).await?;
    let events = bell.text(&["event", "list"]).await?;
    ensure!(events.contains("admin"), "no event says who confirmed it: {events}");
    for vm in ["web", "db"] {
        let vm = cluster.admin().settled(vm, &["running"], SOON).await?;
        ensure!(vm.node != name, "it is still said to be on {name}");
    }
    guests.tick().await?;
    cluster.node(node).power_on()?;
    cluster.wait_whole().await?;
    for watch in [&guests.web, &guests.db] {
        runs_once(cluster, watch, SOON).await?;
    }
    Ok(())
}
