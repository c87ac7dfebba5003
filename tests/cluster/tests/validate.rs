//! `bell cluster validate`: a whole cluster passes and nothing is left on its storage; what is wrong is
//! named, with the node.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bellwether_cluster_tests::{Cluster, Options, wait_for};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn what_a_failover_relies_on_is_tried_and_faults_are_named() -> Result<()> {
    let options = Options { wall_clocks: true, ..Options::default() };
    let mut cluster = Cluster::start(options).await?;
    let (code, found) = validate(&cluster).await?;
    ensure!(code == 0 && found["ok"] == true, "{found}");
    for node in ["node1", "node2", "node3"] {
        for (check, verdict) in
            [("storage", "ok"), ("clock", "ok"), ("watchdog", "off"), ("power", "off")]
        {
            ensure!(verdict_of(&found, node, check)? == verdict, "{node} {check}: {found}");
        }
    }
    let storage = cluster.storage().join("claims");
    let left: Vec<_> = std::fs::read_dir(&storage)?.collect::<std::io::Result<_>>()?;
    ensure!(left.is_empty(), "left on the storage: {left:?}");

    cluster.node(2).set_clock(-3600)?;
    let (code, found) = validate(&cluster).await?;
    ensure!(code == 1 && found["ok"] == false, "{code} {found}");
    ensure!(verdict_of(&found, "node2", "clock")? == "failed", "{found}");
    ensure!(verdict_of(&found, "node1", "clock")? == "ok", "{found}");
    cluster.node(2).set_clock(0)?;

    cluster.node(3).kill_agent();
    wait_for("node3 to be missed", SOON, async || {
        let (code, found) = validate(&cluster).await?;
        Ok((code == 1 && verdict_of(&found, "node3", "agent").is_ok()).then_some(()))
    })
    .await?;
    cluster.node(3).start_agent()?;
    cluster.wait_whole().await?;
    cluster.finish()
}

async fn validate(cluster: &Cluster) -> Result<(i32, Value)> {
    let answer = cluster.bell().run(&["-o", "json", "cluster", "validate"]).await?;
    let found = serde_json::from_str(&answer.out)
        .with_context(|| format!("no JSON: {} {}", answer.out, answer.err))?;
    Ok((answer.code, found))
}

fn verdict_of(found: &Value, node: &str, check: &str) -> Result<String> {
    let findings = found["findings"].as_array().context("no findings")?;
    let finding = findings.iter().find(|it| it["node"] == node && it["check"] == check);
    let finding = finding.with_context(|| format!("{check} of {node} was not tried"))?;
    Ok(finding["verdict"].as_str().unwrap_or_default().to_owned())
}
