//! The cluster in the lab, made and asked with `bell` inside the hosts, as a user does it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::lab::{Lab, STORAGE};

const DATA: &str = "/var/lib/bellwether";
const STORAGE_PATH: &str = "/srv/bellwether";
const ADMIN: &str = "BELLWETHER_CONFIG=/var/lib/bellwether/admin/bell.toml";
/// One command of an administrator; TLS is slow under emulation.
const COMMAND: Duration = Duration::from_secs(60);
/// A node that boots before the storage host does tries again and again.
const MOUNT: Duration = Duration::from_secs(120);

/// Makes a cluster of all nodes of the lab: a controller and an agent on each.
pub fn form(lab: &mut Lab) -> Result<()> {
    let nodes = lab.nodes();
    let first = nodes.first().context("a lab without nodes")?.clone();
    prepare_storage(lab, &nodes)?;
    begin(lab, &first)?;
    for node in &nodes[1..] {
        join(lab, &first, node, "controller")?;
    }
    for node in &nodes {
        join(lab, &first, node, "agent")?;
    }
    bell(lab, &first, &["context", "refresh"])?;
    hand_out_identity(lab, &first, &nodes[1..])?;
    await_online(lab, nodes.len(), Duration::from_secs(120))
}

/// The kernel of the guests lies on the storage, where every node finds it.
fn prepare_storage(lab: &Lab, nodes: &[String]) -> Result<()> {
    for node in nodes {
        retry(lab, &format!("{node} to mount the storage"), MOUNT, || {
            lab.exec_ok(node, &["mountpoint", "-q", STORAGE_PATH], COMMAND).map(Some)
        })?;
    }
    let from = "/usr/share/lab/guest.elf";
    lab.exec_ok(&nodes[0], &["cp", from, STORAGE_PATH], COMMAND).map(drop)
}

fn begin(lab: &Lab, node: &str) -> Result<()> {
    let data = format!("{DATA}/controller");
    let address = address(node)?;
    lab.exec_ok(node, &["mkdir", "-p", &format!("{DATA}/admin")], COMMAND)?;
    bell(
        lab,
        node,
        &[
            "cluster",
            "init",
            "--data-dir",
            &data,
            "--name",
            node,
            "--address",
            &address,
            "--storage",
            STORAGE_PATH,
        ],
    )?;
    start_unit(lab, node, "controller")?;
    await_leader(lab, node, Duration::from_secs(60))
}

fn join(lab: &Lab, first: &str, node: &str, role: &str) -> Result<()> {
    let token = bell(lab, first, &["cluster", "join-token", "--role", role])?;
    let program = format!("bellwether-{role}");
    let data = format!("{DATA}/{role}");
    let address = address(node)?;
    lab.exec_ok(
        node,
        &[
            &program,
            "join",
            "--token",
            token.trim(),
            "--data-dir",
            &data,
            "--name",
            node,
            "--address",
            &address,
        ],
        COMMAND,
    )?;
    start_unit(lab, node, role)?;
    lab.note(&format!("{role} of {node} has joined"));
    Ok(())
}

fn start_unit(lab: &Lab, node: &str, role: &str) -> Result<()> {
    let unit = format!("bellwether-{role}");
    lab.exec_ok(node, &["systemctl", "start", &unit], COMMAND).map(drop)
}

/// So that any node that is left can be asked.
fn hand_out_identity(lab: &Lab, first: &str, others: &[String]) -> Result<()> {
    let pack = format!("busybox tar -C {DATA} -c admin | base64");
    let packed = lab.exec_ok(first, &["sh", "-c", &pack], COMMAND)?;
    let unpack = format!("base64 -d | busybox tar -C {DATA} -x");
    others.iter().try_for_each(|node| {
        lab.exec_input(node, &["sh", "-c", &unpack], &packed, COMMAND).map(drop)
    })
}

/// The number in a node's name is that of its address.
fn address(node: &str) -> Result<String> {
    let index = node.strip_prefix("node").with_context(|| format!("{node} is no node"))?;
    Ok(format!("10.70.0.{index}"))
}

fn await_leader(lab: &Lab, node: &str, limit: Duration) -> Result<()> {
    retry(lab, "a leader", limit, || bell(lab, node, &["cluster", "status"]).map(|_| Some(())))
}

pub fn await_online(lab: &mut Lab, count: usize, limit: Duration) -> Result<()> {
    let from = any_well(lab)?;
    let lab = &*lab;
    retry(lab, &format!("{count} nodes online"), limit, || {
        let nodes = bell_json(lab, &from, &["node", "list"])?;
        let online =
            nodes.as_array().into_iter().flatten().filter(|node| node["state"] == "online");
        Ok((online.count() >= count).then_some(()))
    })
}

/// Any node of which `bell` can be expected to answer.
pub fn any_well(lab: &mut Lab) -> Result<String> {
    let nodes = lab.nodes();
    let well = nodes.into_iter().find(|node| lab.is_well(node));
    well.context("no node of the lab is well: all are off, frozen or cut off")
}

/// Runs `bell` in a host.
pub fn bell(lab: &Lab, host: &str, words: &[&str]) -> Result<String> {
    bell_within(lab, host, words, COMMAND)
}

pub fn bell_within(lab: &Lab, host: &str, words: &[&str], limit: Duration) -> Result<String> {
    let mut argv = vec!["env", ADMIN, "bell"];
    argv.extend(words);
    lab.exec_ok(host, &argv, limit)
}

pub fn bell_json(lab: &Lab, host: &str, words: &[&str]) -> Result<Value> {
    let mut words = words.to_vec();
    words.extend(["-o", "json"]);
    let text = bell(lab, host, &words)?;
    serde_json::from_str(&text)
        .with_context(|| format!("read the JSON of `bell {}`", words.join(" ")))
}

/// Asks again and again until there is an answer. An error counts as "not yet": while things are
/// broken on purpose most questions fail for a while.
pub fn retry<T>(
    lab: &Lab,
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = lab.timeline.now();
    let mut last = String::from("it is not so");
    let (_never, pace) = std::sync::mpsc::channel::<()>();
    while lab.timeline.now() - started < limit {
        match probe() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => "it is not so".clone_into(&mut last),
            Err(error) => last = format!("{error:#}"),
        }
        // Nobody sends: this is the pace of the questions.
        let _ = pace.recv_timeout(Duration::from_millis(200));
    }
    bail!("waited {} s for {what}: {last}", limit.as_secs())
}

/// The host with the disks.
pub fn storage_exec(lab: &Lab, argv: &[&str]) -> Result<String> {
    lab.exec_ok(STORAGE, argv, COMMAND)
}
