//! Tables and sheets: pure functions from messages (and the time) to text.

use bellwether_proto::v1;
use comfy_table::{ContentArrangement, presets};

use super::time::{ago, coarse, duration_us, local};
use crate::contexts::Contexts;

/// Rows under a header, without lines, as wide as they need to be.
pub struct Table {
    inner: comfy_table::Table,
}

impl Table {
    pub(super) fn new(header: &[&str]) -> Self {
        let mut inner = comfy_table::Table::new();
        inner.load_style(presets::NOTHING);
        inner.set_header(header.iter().copied());
        for column in inner.column_iter_mut() {
            column.set_padding((0, 2));
        }
        Self { inner }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.inner.add_row(cells);
    }

    pub fn is_empty(&self) -> bool {
        self.inner.is_empty()
    }

    /// The text, folded to the width of a terminal; programs get whole lines.
    pub fn render(&self, width: Option<u16>) -> String {
        let mut table = self.inner.clone();
        if let Some(columns) = width {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(columns);
        }
        table.force_no_tty();
        table.trim_fmt()
    }
}

/// Named values, one in a line, empty ones left out.
pub(super) struct Sheet {
    lines: Vec<(&'static str, String)>,
}

impl Sheet {
    pub(super) const fn new() -> Self {
        Self { lines: Vec::new() }
    }

    pub(super) fn add(&mut self, name: &'static str, value: impl Into<String>) -> &mut Self {
        let value = value.into();
        if !value.is_empty() {
            self.lines.push((name, value));
        }
        self
    }

    pub(super) fn render(&self) -> String {
        let width = self.lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        self.lines.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
    }
}

pub(super) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// Memory as people say it: whole GiB where it is whole.
pub(super) fn memory(mib: u64) -> String {
    match mib {
        mib if mib >= 1024 && mib.is_multiple_of(1024) => format!("{}G", mib / 1024),
        mib => format!("{mib}M"),
    }
}

pub fn nodes(nodes: &[v1::Node]) -> Table {
    let mut table =
        Table::new(&["NAME", "ID", "PHASE", "ADDRESS", "MEMORY", "VCPUS", "VMS", "HEARD"]);
    for node in nodes {
        table.row(vec![
            node.name.clone(),
            node.id.to_string(),
            phase(node),
            node.address.clone(),
            format!("{}/{}", memory(node.memory_used_mib), memory(node.memory_mib)),
            format!("{}/{}", node.vcpus_used, node.vcpus),
            node.vms.len().to_string(),
            heard(node),
        ]);
    }
    table
}

/// The phase, and what an administrator must not overlook beside it.
fn phase(node: &v1::Node) -> String {
    match node.quarantine_left_s {
        0 => node.phase.clone(),
        _ => format!("{}, quarantine", node.phase),
    }
}

fn heard(node: &v1::Node) -> String {
    match node.heard_ms_ago {
        None => "never".to_owned(),
        Some(passed) => ago(0, passed),
    }
}

pub fn node(node: &v1::Node) -> String {
    let mut sheet = Sheet::new();
    sheet
        .add("Node", format!("{} (number {})", node.name, node.id))
        .add("Phase", phase(node))
        .add("Reason", node.reason.clone())
        .add("Quarantine", quarantine(node))
        .add("Address", node.address.clone())
        .add("Heard", heard(node))
        .add(
            "Memory",
            format!("{} of {} used", memory(node.memory_used_mib), memory(node.memory_mib)),
        )
        .add("vCPUs", format!("{} of {} used", node.vcpus_used, node.vcpus))
        .add("VMs", or_dash(&node.vms.join(", ")))
        .add("Boot id", node.boot_id.clone())
        .add("Version", node.version.clone());
    for proof in &node.proofs {
        sheet.add("Fence proof", outlook(proof));
    }
    sheet.render()
}

/// One fence proof of a node: after how long, or why never.
fn outlook(proof: &v1::ProofOutlook) -> String {
    let v1::ProofOutlook { proof, arbiter, after_ms, text } = proof;
    match after_ms {
        Some(ms) => {
            let (s, tenths) = (ms / 1_000, ms % 1_000 / 100);
            format!("{proof}: {s}.{tenths} s after it fell silent (arbiter {arbiter}): {text}")
        }
        None => format!("{proof}: never (arbiter {arbiter}): {text}"),
    }
}

fn quarantine(node: &v1::Node) -> String {
    match (node.quarantine_left_s, node.losses) {
        (0, 0) => String::new(),
        (0, losses) => format!("none; lost {losses} times of late"),
        (left, _) => format!("gets no new VMs for {} more", coarse(left * 1_000)),
    }
}

pub fn vms(vms: &[v1::Vm]) -> Table {
    let mut table = Table::new(&["NAME", "STATE", "WANTED", "NODE", "MEMORY", "VCPUS", "NOTE"]);
    for vm in vms {
        let spec = vm.spec.clone().unwrap_or_default();
        table.row(vec![
            spec.name,
            vm.state.clone(),
            vm.desired.clone(),
            or_dash(&vm.node),
            memory(spec.memory_mib),
            spec.vcpus.to_string(),
            note(vm),
        ]);
    }
    table
}

/// The one thing to know about a VM: what keeps it, what works on it, why it is as it is.
fn note(vm: &v1::Vm) -> String {
    match (vm.pending.as_str(), vm.task, vm.reason.as_str()) {
        ("", 0, reason) => reason.to_owned(),
        ("", task, _) => format!("task {task}"),
        (pending, _, _) => pending.to_owned(),
    }
}

pub fn vm(vm: &v1::Vm) -> String {
    let spec = vm.spec.clone().unwrap_or_default();
    let owners: Vec<_> = spec.possible_owners.iter().map(u64::to_string).collect();
    let mut sheet = Sheet::new();
    sheet
        .add("VM", spec.name.clone())
        .add("Id", vm.id.clone())
        .add("State", vm.state.clone())
        .add("Reason", vm.reason.clone())
        .add("Wanted", vm.desired.clone())
        .add("Pending", vm.pending.clone())
        .add("Node", or_dash(&vm.node))
        .add("Task", if vm.task == 0 { String::new() } else { vm.task.to_string() })
        .add("Memory", memory(spec.memory_mib))
        .add("vCPUs", spec.vcpus.to_string())
        .add("Kernel", spec.kernel.clone())
        .add("Initrd", spec.initrd.clone())
        .add("Command line", spec.cmdline.clone());
    for disk in &spec.disks {
        let access = if disk.read_only { ", read-only" } else { "" };
        sheet.add("Disk", format!("{} ({}{access})", disk.path, disk.format));
    }
    for nic in &spec.nics {
        let mac = if nic.mac.is_empty() { String::new() } else { format!(" ({})", nic.mac) };
        sheet.add("Network card", format!("{}{mac}", nic.bridge));
    }
    sheet
        .add("Owners", if owners.is_empty() { "every node".into() } else { owners.join(", ") })
        .add("Priority", spec.priority.to_string())
        .add("Restart", spec.restart.clone());
    rules(&mut sheet, &vm.rules.clone().unwrap_or_default());
    sheet
        .add("Arbiter", vm.arbiter.clone())
        .add("Epoch", vm.epoch.to_string())
        .add("Fence proof", vm.fence_proof.clone());
    if let Some(file) = &vm.state_file {
        sheet.add("State file", format!("{} ({})", file.path, mebibytes(file.bytes)));
    }
    sheet.render()
}

/// The rules that say something.
fn rules(sheet: &mut Sheet, rules: &v1::VmRules) {
    let nodes: Vec<_> = rules.preferred_owners.iter().map(u64::to_string).collect();
    let groups: Vec<_> =
        rules.anti_affinity.iter().map(|(group, how)| format!("{group} ({how})")).collect();
    sheet.add("Prefers", nodes.join(", "));
    if !nodes.is_empty() {
        let hours = rules.failback.contains('-');
        let unit = if hours { " o'clock UTC" } else { "" };
        sheet.add("Failback", format!("{}{unit}", rules.failback));
    }
    sheet.add("Apart", groups.join(", ")).add("Starts after", rules.start_after.join(", "));
    if rules.restarts_max > 0 {
        let period = coarse(rules.restarts_period_s * 1_000);
        sheet.add("Restarts", format!("at most {} within {period}", rules.restarts_max));
    }
    if !matches!(rules.pre_copy.as_str(), "" | "finish") {
        sheet.add("Pre-copy", rules.pre_copy.clone());
    }
    if rules.downtime_ms > 0 {
        sheet.add("Downtime", format!("{} ms", rules.downtime_ms));
    }
}

pub fn tasks(tasks: &[v1::Task], now_ms: u64) -> Table {
    let mut table =
        Table::new(&["ID", "KIND", "VM", "STEP", "OUTCOME", "STARTED", "TOOK", "ERROR"]);
    for task in tasks {
        table.row(vec![
            task.id.to_string(),
            task.kind.clone(),
            or_dash(&task.vm_name),
            task.step.clone(),
            task.outcome.clone(),
            ago(task.created_at_ms, now_ms),
            took(task, now_ms),
            task.error.clone(),
        ]);
    }
    table
}

fn took(task: &v1::Task, now_ms: u64) -> String {
    let end = if task.ended_at_ms == 0 { now_ms } else { task.ended_at_ms };
    coarse(end.saturating_sub(task.created_at_ms))
}

pub fn task(task: &v1::Task, now_ms: u64) -> String {
    let mut sheet = Sheet::new();
    sheet
        .add("Task", task.id.to_string())
        .add("Kind", task.kind.clone())
        .add("VM", task.vm_name.clone())
        .add("From", task.source.clone())
        .add("To", task.destination.clone())
        .add("Step", task.step.clone())
        .add("Outcome", task.outcome.clone())
        .add("Error", task.error.clone())
        .add("Asked by", task.requested_by.clone())
        .add(
            "Started",
            format!("{} ({})", local(task.created_at_ms), ago(task.created_at_ms, now_ms)),
        )
        .add("Took", took(task, now_ms))
        .add("Fence proof", task.fence_proof.clone())
        .add("Measures", measures(task).join(", "));
    let log = task.log.iter().map(|line| format!("  {}  {}\n", local(line.at_ms), line.text));
    let log: String = log.collect();
    match log.is_empty() {
        true => sheet.render(),
        false => format!("{}Log\n{log}", sheet.render()),
    }
}

/// The parts of an outage in the order in which they happen.
const PARTS: [&str; 7] = ["stop", "save", "seal", "commit", "load", "lock", "resume"];

/// The measured parts in order, then whatever else was measured; the outage itself left out.
fn measures(task: &v1::Task) -> Vec<String> {
    let rank = |name: &str| PARTS.iter().position(|part| *part == name).unwrap_or(PARTS.len());
    let mut parts: Vec<(&str, String)> = task
        .measures
        .iter()
        .filter(|(key, _)| *key != "outage_us")
        .map(|(key, value)| measure(key, *value))
        .collect();
    // The sort is stable, so that what has no rank stays in the order of its keys.
    parts.sort_by_key(|(name, _)| rank(name));
    parts.into_iter().map(|(name, value)| format!("{} {value}", name.replace('_', " "))).collect()
}

/// Name and value of a measure; its key ends with its unit.
fn measure(key: &str, value: u64) -> (&str, String) {
    match key.rsplit_once('_') {
        Some((name, "ns")) => (name, duration_us(value / 1_000)),
        Some((name, "us")) => (name, duration_us(value)),
        Some((name, "ms")) => (name, duration_us(value.saturating_mul(1_000))),
        Some((name, "bytes")) => (name, mebibytes(value)),
        Some((name, "s")) if name.ends_with("_bytes_per") => {
            (name.trim_end_matches("_bytes_per"), format!("{}/s", mebibytes(value)))
        }
        _ => (key, value.to_string()),
    }
}

/// How far a pre-copy is, to be put behind the name of its step; empty when nothing is known.
pub fn pre_copied(task: &v1::Task) -> String {
    let part = |name: &str| task.measures.get(name).copied();
    let told = (part("precopy_rounds"), part("precopy_bytes"), part("predicted_outage_us"));
    let (Some(rounds), Some(bytes), Some(outage)) = told else { return String::new() };
    if task.step != "pre-copy" {
        return String::new();
    }
    let dirty = part("dirty_bytes_per_s").unwrap_or(0);
    format!(
        ", round {rounds}: {} written, the guest dirties {}/s, outage if stopped now {}",
        mebibytes(bytes),
        mebibytes(dirty),
        duration_us(outage)
    )
}

/// A size in MiB, with a decimal where it tells something.
fn mebibytes(bytes: u64) -> String {
    match bytes >> 20 {
        mib @ 100.. => format!("{mib} MiB"),
        mib => format!("{mib}.{} MiB", ((bytes % (1 << 20)) * 10) >> 20),
    }
}

/// What a migration cost the guest.
pub fn migration(task: &v1::Task) -> String {
    let path = format!("{} -> {}", or_dash(&task.source), or_dash(&task.destination));
    let outage = match task.measures.get("outage_us") {
        Some(us) => format!("outage {}", duration_us(*us)),
        None => "outage not measured".to_owned(),
    };
    let parts = measures(task);
    let detail = if parts.is_empty() { String::new() } else { format!("\n  {}", parts.join(", ")) };
    format!("VM {} migrated {path}: {outage}{detail}", task.vm_name)
}

pub fn cluster_status(status: &v1::ClusterStatus) -> String {
    let mut sheet = Sheet::new();
    let leader = status.controllers.iter().find(|controller| controller.leader);
    let leader = leader.and_then(|controller| controller.member.as_ref());
    sheet
        .add("Cluster", format!("{} ({})", status.name, status.cluster_id))
        .add("Leader", leader.map_or("none".to_owned(), |member| member.name.clone()))
        .add("Term", status.term.to_string())
        .add("Nodes", format!("{} of {} online", status.nodes_online, status.nodes_total))
        .add("VMs", format!("{} of {} running", status.vms_running, status.vms_total))
        .add("Storage", status.storage.clone());
    if let Some(known) = status.settings {
        settings(&mut sheet, known);
    }
    let mut table = Table::new(&["CONTROLLER", "ID", "ADDRESS", "ROLE", "LOG"]);
    for controller in &status.controllers {
        let member = controller.member.clone().unwrap_or_default();
        table.row(vec![
            member.name,
            member.id.to_string(),
            member.address,
            raft_role(controller).to_owned(),
            log_position(controller, status.last_applied),
        ]);
    }
    format!("{}\n{}", sheet.render(), table.render(None))
}

fn settings(sheet: &mut Sheet, settings: v1::ClusterSettings) {
    let reserve = match settings.reserve_nodes {
        0 => "none kept".to_owned(),
        nodes => format!("room for the loss of {nodes} kept"),
    };
    let quarantine = match settings.quarantine_exits {
        0 => "never".to_owned(),
        exits => format!(
            "{} after {exits} losses within {}",
            coarse(settings.quarantine_s * 1_000),
            coarse(settings.quarantine_window_s * 1_000)
        ),
    };
    sheet.add("Reserve", reserve).add("Quarantine", quarantine);
    if settings.pre_copy_mib_s > 0 {
        sheet.add("Pre-copy", format!("at most {} MiB/s from a node", settings.pre_copy_mib_s));
    }
}

const fn raft_role(controller: &v1::ControllerStatus) -> &'static str {
    match (controller.leader, controller.voter) {
        (true, _) => "leader",
        (false, true) => "follower",
        (false, false) => "learner",
    }
}

fn log_position(controller: &v1::ControllerStatus, last_applied: u64) -> String {
    match (controller.leader, controller.matched) {
        (true, _) => last_applied.to_string(),
        (false, 0) => "not heard from".to_owned(),
        (false, matched) if matched >= last_applied => matched.to_string(),
        (false, matched) => format!("{matched} ({} behind)", last_applied - matched),
    }
}

/// One event on one line, for lists and for following alike.
pub fn event_line(event: &v1::Event) -> String {
    let mut about = String::new();
    for (name, value) in [("vm", &event.vm), ("node", &event.node)] {
        if !value.is_empty() {
            about.push_str(&format!("{name}={value} "));
        }
    }
    if event.task != 0 {
        about.push_str(&format!("task={} ", event.task));
    }
    format!("{:>5}  {}  {:5}  {about}{}", event.seq, local(event.at_ms), event.level, event.text)
}

/// One thing that `bell cluster validate` has tried.
pub fn finding_line(finding: &v1::Finding) -> String {
    let v1::Finding { node, check, verdict, text } = finding;
    let verdict = if verdict == "failed" { "FAILED" } else { verdict };
    format!("{verdict:6}  {node:10}  {check:8}  {text}")
}

pub fn contexts(all: &Contexts) -> Table {
    let mut table = Table::new(&["CURRENT", "NAME", "ENDPOINTS", "IDENTITY"]);
    for (name, context) in &all.contexts {
        let current = all.current.as_ref() == Some(name);
        let endpoints: Vec<_> = context.endpoints.iter().map(ToString::to_string).collect();
        table.row(vec![
            if current { "*".into() } else { String::new() },
            name.clone(),
            endpoints.join(" "),
            context.identity.display().to_string(),
        ]);
    }
    table
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
