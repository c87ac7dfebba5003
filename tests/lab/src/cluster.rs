//! The cluster in the lab, made and asked with `bell` inside the hosts, as a user does it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use serde_json::Value;

use crate::lab::{Lab, STORAGE};
use crate::scenario::WatchdogWay;
use crate::supply::Manner;
use crate::timeline::Timeline;

const DATA: &str = "/var/lib/bellwether";
/// The same directory on the storage host.
const EXPORT: &str = "/export";
const STORAGE_PATH: &str = "/srv/bellwether";
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
        retry(&lab.timeline, &format!("{node} to mount the storage"), MOUNT, || {
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
    retry(&lab.timeline, "a leader", limit, || {
        bell(lab, node, &["cluster", "status"]).map(|_| Some(()))
    })
}

pub fn await_online(lab: &mut Lab, count: usize, limit: Duration) -> Result<()> {
    let from = any_well(lab)?;
    let lab = &*lab;
    retry(&lab.timeline, &format!("{count} nodes online"), limit, || {
        let nodes = bell_json(lab, &from, &["node", "list"])?;
        let online =
            nodes.as_array().into_iter().flatten().filter(|node| node["phase"] == "online");
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
    // By itself it waits 15 s for an answer, which is little here.
    let patience = format!("{}s", limit.as_secs().saturating_sub(5));
    let mut argv = vec!["bell", "--timeout", &patience];
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

/// The node whose controller leads.
pub fn leader(lab: &mut Lab) -> Result<String> {
    let from = any_well(lab)?;
    let status = bell_json(lab, &from, &["cluster", "status"])?;
    let controllers = status["controllers"].as_array().into_iter().flatten();
    let leader = controllers.into_iter().find(|controller| controller["leader"] == true);
    let name = leader.and_then(|controller| controller["member"]["name"].as_str());
    Ok(name.context("the controllers have no leader")?.to_owned())
}

/// What a node can yield of one fence proof, as the cluster says.
pub fn proof_outlook(lab: &mut Lab, node: &str, proof: &str) -> Result<Value> {
    let from = any_well(lab)?;
    let node = bell_json(lab, &from, &["node", "show", node])?;
    let outlooks = node["proofs"].as_array().into_iter().flatten();
    let found = outlooks.into_iter().find(|outlook| outlook["proof"] == proof);
    Ok(found.cloned().unwrap_or_default())
}

/// Tells a node's fencer which watchdog to take. It starts anew, if that is a change.
pub fn set_watchdog(lab: &Lab, node: &str, way: WatchdogWay) -> Result<()> {
    let way = match way {
        WatchdogWay::Off => "off",
        WatchdogWay::Hardware => "hardware",
        WatchdogWay::Software => "software",
    };
    lab.exec_ok(node, &["/usr/lib/lab/watchdog", way], COMMAND).map(drop)
}

/// Gives every controller a power switch of a host, or takes it away from them.
pub fn set_switch(lab: &Lab, host: &str, manner: Option<Manner>) -> Result<()> {
    lab.set_switch(host, manner.unwrap_or_default());
    let directory = format!("{DATA}/controller/power");
    let file = format!("{directory}/{host}.toml");
    let settings =
        format!("agent = \"fence_lab\"\noff_ms = 10000\n[parameters]\nplug = \"{host}\"\n");
    let owned = "-o bellwether -g bellwether";
    let (script, input) = match manner {
        None => (format!("rm -f {file}"), ""),
        Some(_) => (
            format!(
                "install -d {owned} -m 700 {directory} && install {owned} -m 600 /dev/stdin {file}"
            ),
            settings.as_str(),
        ),
    };
    for node in lab.nodes() {
        lab.exec_input(&node, &["sh", "-c", &script], input, COMMAND)?;
    }
    Ok(())
}

/// What the cluster says of a VM.
pub fn vm(lab: &mut Lab, vm: &str) -> Result<Value> {
    let from = any_well(lab)?;
    bell_json(lab, &from, &["vm", "show", vm])
}

pub fn node_phase(lab: &mut Lab, node: &str) -> Result<String> {
    let from = any_well(lab)?;
    let node = bell_json(lab, &from, &["node", "show", node])?;
    Ok(node["phase"].as_str().unwrap_or_default().to_owned())
}

/// Events after a number.
pub fn events(lab: &mut Lab, after: u64) -> Result<Vec<Value>> {
    let from = any_well(lab)?;
    let words = ["event", "list", "--after", &after.to_string()];
    let events = bell_json(lab, &from, &words)?;
    let events = events.as_array().cloned().unwrap_or_default();
    Ok(events.into_iter().filter(|event| event["seq"].as_u64() > Some(after)).collect())
}

/// Tasks about VMs, those that have ended too.
pub fn tasks(lab: &mut Lab) -> Result<Vec<Value>> {
    let from = any_well(lab)?;
    let tasks = bell_json(lab, &from, &["task", "list", "--all"])?;
    Ok(tasks.as_array().cloned().unwrap_or_default())
}

/// Sectors of the journal of a VM in the lab: it wraps around after a few minutes.
const JOURNAL_SECTORS: u64 = 4096;

/// Makes a VM with the test guest and a disk of its own, and starts it. Returns its id.
pub fn create_vm(lab: &mut Lab, name: &str, leased: bool) -> Result<String> {
    let from = any_well(lab)?;
    let disk = format!("{STORAGE_PATH}/{name}.raw");
    let size = (JOURNAL_SECTORS * 512).to_string();
    lab.exec_ok(&from, &["truncate", "-s", &size, &disk], COMMAND)?;
    let cmdline = format!(
        "tick_ms=200 mem_mib=8 dirty_mib_s=1 verify_mib_s=1 journal_ms=250 journal_sectors={JOURNAL_SECTORS}"
    );
    let kernel = format!("{STORAGE_PATH}/guest.elf");
    let disk = format!("path={disk},format=raw");
    let words = [
        "vm",
        "create",
        name,
        "--memory",
        "32M",
        "--kernel",
        &kernel,
        "--disk",
        &disk,
        "--cmdline",
        &cmdline,
        "--arbiter",
        if leased { "lease" } else { "storage" },
        "--start",
    ];
    let made = bell_json(lab, &from, &words)?;
    let id = made["vm"]["id"].as_str().context("the JSON of `bell vm create` names no id")?;
    Ok(id.to_owned())
}

/// Stops a VM and returns its journal, as the storage host has it.
pub fn take_journal(lab: &mut Lab, name: &str) -> Result<Vec<u8>> {
    let from = any_well(lab)?;
    bell_within(lab, &from, &["vm", "stop", name, "--yes"], Duration::from_secs(90))?;
    read_journal(lab, name)
}

pub fn read_journal(lab: &Lab, name: &str) -> Result<Vec<u8>> {
    let file = format!("{EXPORT}/{name}.raw");
    let text = lab.exec_ok(STORAGE, &["base64", "-w0", &file], COMMAND)?;
    base64::engine::general_purpose::STANDARD.decode(text.trim()).context("read the disk")
}

/// Stops and removes every VM that an earlier scenario left, whatever became of it.
pub fn delete_leftovers(lab: &mut Lab) -> Result<()> {
    let from = any_well(lab)?;
    let vms = bell_json(lab, &from, &["vm", "list"])?;
    for vm in vms.as_array().into_iter().flatten() {
        let name = vm["spec"]["name"].as_str().context("a VM without a name")?;
        lab.note(&format!("VM {name} was left over"));
        bell_within(lab, &from, &["vm", "stop", name, "--yes"], Duration::from_secs(120))?;
        delete_vm(lab, name)?;
    }
    Ok(())
}

/// Removes a VM that is stopped, and its disk.
pub fn delete_vm(lab: &mut Lab, name: &str) -> Result<()> {
    let from = any_well(lab)?;
    bell(lab, &from, &["vm", "delete", name])?;
    lab.exec_ok(&from, &["rm", "-f", &format!("{STORAGE_PATH}/{name}.raw")], COMMAND).map(drop)
}

/// Asks again and again until there is an answer. An error counts as "not yet": while things are
/// broken on purpose most questions fail for a while.
pub fn retry<T>(
    timeline: &Timeline,
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = timeline.now();
    let mut last = String::from("it is not so");
    let (_never, pace) = std::sync::mpsc::channel::<()>();
    while timeline.now() - started < limit {
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
