//! Waiting for the end of a drain: looking at the node until it is in maintenance.
//!
//! A drain is no task. The cluster starts one for each VM, a few at a time, and starts another when
//! one fails; so the node is watched, and not its tasks.

use std::collections::BTreeSet;
use std::time::Duration;

use bellwether_proto::v1;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{Session, look};
use crate::client::Cluster;
use crate::exit::{Exit, Failure};
use crate::output::{Progress, ToJson};
use crate::watch::{SILENCE_MAX, before};

/// Between two looks at the node.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// Shows how far the drain is until the node is empty.
pub async fn wait(
    session: &Session<'_>,
    cluster: &Cluster,
    reply: v1::NodeReply,
) -> Result<(), Failure> {
    let name = reply.node.as_ref().map(|node| node.name.clone()).unwrap_or_default();
    let mut progress = Progress::new(session.output);
    let mut tasks = BTreeSet::new();
    let emptied = before(cluster.deadline(), watch(cluster, reply, &mut progress, &mut tasks));
    let node = tokio::select! {
        node = emptied => node.unwrap_or_else(|| Err(goes_on("time ran out", &name))),
        _ = tokio::signal::ctrl_c() => Err(goes_on("no longer waiting", &name)),
    };
    progress.finish();
    let node = node?;
    let json = json!({ "node": node.to_json(), "task_ids": tasks, "tasks": null });
    session.output.result(&json, || format!("node {} is in maintenance", node.name))
}

/// The node when it is in maintenance; `tasks` are those that were seen on the way.
async fn watch(
    cluster: &Cluster,
    mut reply: v1::NodeReply,
    progress: &mut Progress,
    tasks: &mut BTreeSet<u64>,
) -> Result<v1::Node, Failure> {
    loop {
        tasks.extend(&reply.tasks);
        let node = reply.node.unwrap_or_default();
        match node.phase.as_str() {
            "maintenance" => return Ok(node),
            "online" => return Err(called_off(&node.name)),
            _ => progress.show_text(&line(&node)),
        }
        sleep(LOOK_PAUSE).await;
        reply = look_again(cluster, &node.name).await?;
    }
}

/// The node, from whichever controller is heard first; without one for a while, a failure.
async fn look_again(cluster: &Cluster, name: &str) -> Result<v1::NodeReply, Failure> {
    let since = Instant::now();
    loop {
        match look(cluster, name).await {
            Err(failure) if !matches!(failure.exit, Exit::Unreachable | Exit::Unknown) => {
                return Err(failure);
            }
            Err(failure) if since.elapsed() > SILENCE_MAX => {
                return Err(goes_on(&failure.message, name));
            }
            Err(_) => sleep(LOOK_PAUSE).await,
            Ok(reply) => return Ok(reply),
        }
    }
}

/// What is still there, and what the cluster says about it.
fn line(node: &v1::Node) -> String {
    let mut text = format!("node {} is {}", node.name, node.phase);
    if !node.vms.is_empty() {
        text.push_str(&format!(", still there: {}", node.vms.join(", ")));
    }
    if !node.reason.is_empty() {
        text.push_str(&format!("; {}", node.reason));
    }
    text
}

fn goes_on(why: &str, name: &str) -> Failure {
    Failure::new(Exit::Unknown, format!("{why}; the drain of node {name} goes on by itself"))
        .remedy(format!(
            "see how far it is with `bell node show {name}`; `bell node resume {name}` calls it off"
        ))
}

fn called_off(name: &str) -> Failure {
    Failure::new(Exit::Conflict, format!("node {name} was resumed before it was empty")).remedy(
        format!("`bell event list` tells more; drain it again with `bell node drain {name}`"),
    )
}
