//! Rules that an administrator gives a living cluster, and what it says of its decisions.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bellwether_cluster_tests::{Cases, Cluster, Options, wait_for};

const SOON: Duration = Duration::from_secs(60);
const REFUSED: i32 = 1;
const CONFLICT: i32 = 4;

#[tokio::test]
async fn rules_hold_and_decisions_are_told_before_and_after() -> Result<()> {
    let mut cluster = Cluster::start(Options::default()).await?;
    let watches =
        [cluster.run(&cluster.guest("web")?).await?, cluster.run(&cluster.guest("db")?).await?];
    let mut cases = Cases::new();
    cases.run("kept apart", kept_apart(&cluster)).await;
    cases.run("the reserve", reserve(&cluster)).await;
    cases.run("too many restarts", too_many_restarts(&cluster)).await;
    cases.run("a forecast that comes true", forecast(&mut cluster)).await;
    cases.finish()?;
    for watch in &watches {
        watch.check()?;
    }
    drop(watches);
    cluster.finish()
}

/// The rule is set while both VMs run, and binds the next move.
async fn kept_apart(cluster: &Cluster) -> Result<()> {
    let bell = cluster.bell();
    for vm in ["web", "db"] {
        let set = bell.json(&["vm", "set", vm, "--apart", "tier:hard"]).await?;
        ensure!(set["rules"]["anti_affinity"]["tier"] == "hard", "{set}");
    }
    let home = cluster.admin().vm("db").await?.node;
    bell.refused(&["vm", "migrate", "web", "--to", &home], REFUSED, &["group tier"]).await?;
    let circle = ["vm", "set", "web", "--after", "db"];
    bell.text(&circle).await?;
    let refused = ["vm", "set", "db", "--after", "web"];
    bell.refused(&refused, REFUSED, &["db after web after db"]).await?;
    bell.text(&["vm", "set", "web", "--after", "none"]).await?;
    Ok(())
}

async fn reserve(cluster: &Cluster) -> Result<()> {
    let bell = cluster.bell();
    let largest = cluster.admin().nodes().await?.iter().map(|node| node.memory_mib).max();
    let most = (largest.context("no nodes")? / 2 * 2).to_string();
    let kernel = cluster.guest("big")?.spec().kernel;
    let memory = format!("{most}M");
    let create = ["vm", "create", "big", "--memory", &memory, "--kernel", &kernel, "--start"];
    bell.text(&["cluster", "set", "--reserve-nodes", "1"]).await?;
    bell.refused(&create, CONFLICT, &["the loss of 1 node", "MiB"]).await?;
    let told: Vec<&str> =
        ["what-if", "add-vm"].into_iter().chain(create[2..7].iter().copied()).collect();
    let told = bell.json(&told).await?;
    ensure!(told["refused"].as_str().is_some_and(|text| !text.is_empty()), "{told}");
    let gone = cluster.admin().vm("big").await;
    ensure!(gone.is_err(), "a VM that is refused is not left behind");
    bell.text(&["cluster", "set", "--reserve-nodes", "0"]).await?;
    Ok(())
}

async fn too_many_restarts(cluster: &Cluster) -> Result<()> {
    let bell = cluster.bell();
    let watch = cluster.run(&cluster.guest("frail")?).await?;
    bell.text(&["vm", "set", "frail", "--restarts", "1/10m"]).await?;
    for _ in 0..2 {
        let vm = cluster.admin().settled("frail", &["running"], SOON).await?;
        let home = cluster.home_of("frail").await?;
        ensure!(cluster.kill_vmm(home, &vm.id) == 1, "its VMM is killed");
        wait_for("the end of its VMM to be noticed", SOON, async || {
            let now = cluster.admin().vm("frail").await?;
            Ok((now.epoch > vm.epoch || now.state == "failed").then_some(()))
        })
        .await?;
    }
    let failed = cluster.admin().settled("frail", &["failed"], SOON).await?;
    ensure!(failed.reason.contains("restarted 1 times"), "{}", failed.reason);
    watch.check()?;
    bell.text(&["vm", "delete", "frail"]).await?;
    Ok(())
}

/// What is told of the loss of a node is what then happens, and both are explained afterwards.
async fn forecast(cluster: &mut Cluster) -> Result<()> {
    let home = cluster.home_of("web").await?;
    let name = cluster.admin().vm("web").await?.node;
    let told = cluster.bell().json(&["what-if", "node-down", &name]).await?;
    let moves = told["moves"].as_array().context("no moves")?;
    let mine = moves.iter().find(|one| one["vm"] == "web").context("web does not move")?;
    let expected = mine["to"].as_str().context("no node")?.to_owned();
    cluster.node(home).power_off();
    wait_for("web to run elsewhere", SOON, async || {
        let vm = cluster.admin().vm("web").await?;
        Ok((vm.state == "running" && vm.node != name && vm.task == 0).then_some(()))
    })
    .await?;
    let vm = cluster.bell().json(&["explain", "vm", "web"]).await?;
    ensure!(vm["node"] == expected.as_str(), "told {expected}, came {vm}");
    ensure!(
        vm["placed"]["kind"] == "failover" && vm["placed"]["requested_by"] == "cluster",
        "{vm}"
    );
    let task = vm["placed"]["task"].to_string();
    let why = cluster.bell().text(&["explain", "task", &task]).await?;
    ensure!(why.contains(&format!("{name} is not heard from")), "{why}");
    cluster.node(home).power_on()
}
