//! Forecasts and explanations for people, and as JSON.

use std::collections::BTreeMap;

use bellwether_proto::v1;
use serde_json::{Value, json};

use super::ToJson;
use super::table::{Sheet, Table, event_line, memory, or_dash};
use super::time::{coarse, duration_us, local};

/// So many VMs that would not run are named for people.
const STUCK_MAX: usize = 50;

pub fn forecast(told: &v1::Forecast) -> String {
    if !told.refused.is_empty() {
        return format!("It would be refused: {}", told.refused);
    }
    let mut parts = vec![summary(told)];
    if !told.moves.is_empty() {
        parts.push(moves(&told.moves));
    }
    let stuck: Vec<&v1::ForecastStuck> = told.stuck.iter().filter(|one| !one.before).collect();
    if !stuck.is_empty() {
        parts.push(not_running(&stuck));
    }
    parts.push(capacity(&told.nodes));
    parts.join("\n\n")
}

fn summary(told: &v1::Forecast) -> String {
    let stuck = told.stuck.iter().filter(|one| !one.before).count();
    let before = told.stuck.len() - stuck;
    let mut text = format!(
        "Comes up elsewhere or anew: {}. Would not run: {}. All is done after {}.",
        vms(told.moves.len()),
        vms(stuck),
        seconds(told.ends_ms)
    );
    if before > 0 {
        text.push_str(&format!(" Does not run today either: {}.", vms(before)));
    }
    if !told.finished {
        text.push_str(" It would go on for more than an hour, and was looked at no further.");
    }
    text
}

fn vms(count: usize) -> String {
    if count == 1 { "1 VM".to_owned() } else { format!("{count} VMs") }
}

/// Tenths of seconds tell enough about what has not happened yet.
fn seconds(ms: u64) -> String {
    match ms {
        0..60_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        _ => coarse(ms),
    }
}

fn moves(moves: &[v1::ForecastMove]) -> String {
    let mut table = Table::new(&["VM", "HOW", "FROM", "TO", "RUNS AFTER", "OUTAGE"]);
    for one in moves {
        table.row(vec![
            one.vm.clone(),
            one.kind.clone(),
            or_dash(&one.from),
            one.to.clone(),
            seconds(one.at_ms),
            duration_us(one.outage_ms * 1_000),
        ]);
    }
    table.render(None)
}

/// VMs that would not run, each with its reason.
fn not_running(stuck: &[&v1::ForecastStuck]) -> String {
    let mut text = String::from("Not running then:");
    for one in stuck.iter().take(STUCK_MAX) {
        text.push_str(&format!("\n  {}: {}", one.vm, one.reason));
    }
    if stuck.len() > STUCK_MAX {
        text.push_str(&format!("\n  and {} more; -o json names them", stuck.len() - STUCK_MAX));
    }
    text
}

fn capacity(nodes: &[v1::ForecastNode]) -> String {
    let mut table = Table::new(&["NODE", "PHASE", "MEMORY FREE", "VCPUS FREE", "VMS"]);
    for node in nodes {
        let change = |before: String, after: String| match before == after {
            true => after,
            false => format!("{before} -> {after}"),
        };
        table.row(vec![
            node.name.clone(),
            node.phase.clone(),
            change(memory(node.memory_free_before_mib), memory(node.memory_free_after_mib)),
            change(node.vcpus_free_before.to_string(), node.vcpus_free_after.to_string()),
            change(node.vms_before.to_string(), node.vms_after.to_string()),
        ]);
    }
    table.render(None)
}

pub fn vm_explanation(told: &v1::VmExplanation) -> String {
    let mut sheet = Sheet::new();
    sheet.add("VM", told.vm.clone()).add("Node", or_dash(&told.node));
    if let Some(placed) = &told.placed {
        let by =
            format!("{} (task {}), asked for by {}", placed.kind, placed.task, placed.requested_by);
        sheet
            .add("Placed", format!("{}: {by}", local(placed.at_ms)))
            .add("Because", placed.why.clone());
    }
    sheet.add("Pending", told.pending.clone()).add("Next", told.next.clone());
    let mut table = Table::new(&["NODE", "NOW", "WHY"]);
    for node in &told.nodes {
        let free =
            || format!("{} and {} vCPUs free", memory(node.memory_free_mib), node.vcpus_free);
        table.row(vec![
            node.node.clone(),
            if node.could_take_it { "could take it" } else { "could not" }.to_owned(),
            if node.could_take_it { free() } else { node.reason.clone() },
        ]);
    }
    format!("{}\n{}", sheet.render(), table.render(None))
}

pub fn task_explanation(told: &v1::TaskExplanation) -> String {
    let task = told.task.clone().unwrap_or_default();
    let mut lines: BTreeMap<(u64, u64), String> = BTreeMap::new();
    for (number, event) in told.events.iter().enumerate() {
        lines.insert(
            (event.at_ms, number as u64),
            format!("event {}", event_line(event).trim_start()),
        );
    }
    for (number, line) in task.log.iter().enumerate() {
        let order = (line.at_ms, (told.events.len() + number) as u64);
        lines.insert(order, format!("step  {}  {}", local(line.at_ms), line.text));
    }
    let lines: String = lines.into_values().map(|line| format!("  {line}\n")).collect();
    let error = if task.error.is_empty() { String::new() } else { format!(": {}", task.error) };
    format!(
        "Task {}: {} of VM {}, asked for by {}, {}{error}\n{lines}",
        task.id, task.kind, task.vm_name, task.requested_by, task.outcome
    )
}

impl ToJson for v1::Forecast {
    fn to_json(&self) -> Value {
        let Self { moves, stuck, nodes, events, ends_ms, finished, refused } = self;
        json!({
            "moves": moves.to_json(), "stuck": stuck.to_json(), "nodes": nodes.to_json(),
            "events": events.to_json(), "ends_ms": ends_ms, "finished": finished,
            "refused": refused,
        })
    }
}

impl ToJson for v1::ForecastMove {
    fn to_json(&self) -> Value {
        let Self { vm, kind, from, to, at_ms, outage_ms, why } = self;
        json!({
            "vm": vm, "kind": kind, "from": from, "to": to, "at_ms": at_ms,
            "outage_ms": outage_ms, "why": why,
        })
    }
}

impl ToJson for v1::ForecastStuck {
    fn to_json(&self) -> Value {
        let Self { vm, reason, before } = self;
        json!({ "vm": vm, "reason": reason, "before": before })
    }
}

impl ToJson for v1::ForecastNode {
    fn to_json(&self) -> Value {
        let Self {
            name,
            phase,
            memory_free_before_mib,
            memory_free_after_mib,
            vcpus_free_before,
            vcpus_free_after,
            vms_before,
            vms_after,
        } = self;
        json!({
            "name": name, "phase": phase, "memory_free_before_mib": memory_free_before_mib,
            "memory_free_after_mib": memory_free_after_mib,
            "vcpus_free_before": vcpus_free_before, "vcpus_free_after": vcpus_free_after,
            "vms_before": vms_before, "vms_after": vms_after,
        })
    }
}

impl ToJson for v1::VmExplanation {
    fn to_json(&self) -> Value {
        let Self { vm, node, placed, pending, next, nodes } = self;
        json!({
            "vm": vm, "node": node, "placed": placed.to_json(), "pending": pending,
            "next": next, "nodes": nodes.to_json(),
        })
    }
}

impl ToJson for v1::Placement {
    fn to_json(&self) -> Value {
        let Self { node, at_ms, task, kind, requested_by, why } = self;
        json!({
            "node": node, "at_ms": at_ms, "task": task, "kind": kind,
            "requested_by": requested_by, "why": why,
        })
    }
}

impl ToJson for v1::NodeVerdict {
    fn to_json(&self) -> Value {
        let Self { node, could_take_it, reason, memory_free_mib, vcpus_free } = self;
        json!({
            "node": node, "could_take_it": could_take_it, "reason": reason,
            "memory_free_mib": memory_free_mib, "vcpus_free": vcpus_free,
        })
    }
}

impl ToJson for v1::TaskExplanation {
    fn to_json(&self) -> Value {
        let Self { task, events } = self;
        json!({ "task": task.to_json(), "events": events.to_json() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_says_what_comes_up_what_does_not_and_what_is_left() {
        let told = v1::Forecast {
            moves: vec![v1::ForecastMove {
                vm: "web-1".into(),
                kind: "failover".into(),
                from: "n3".into(),
                to: "n1".into(),
                at_ms: 1_730,
                outage_ms: 1_730,
                why: String::new(),
            }],
            stuck: vec![
                v1::ForecastStuck { vm: "db".into(), reason: "no room".into(), before: false },
                v1::ForecastStuck { vm: "old".into(), reason: "waits".into(), before: true },
            ],
            nodes: vec![v1::ForecastNode {
                name: "n1".into(),
                phase: "online".into(),
                memory_free_before_mib: 4096,
                memory_free_after_mib: 3840,
                vms_before: 1,
                vms_after: 1,
                ..Default::default()
            }],
            ends_ms: 1_730,
            finished: true,
            ..Default::default()
        };
        let text = forecast(&told);
        for said in [
            "Comes up elsewhere or anew: 1 VM. Would not run: 1 VM. All is done after 1.7 s.",
            "Does not run today either: 1 VM.",
            "web-1  failover  n3    n1  1.7 s",
            "Not running then:\n  db: no room",
            "4G -> 3840M",
        ] {
            assert!(text.contains(said), "{said}\n{text}");
        }
        let refused = v1::Forecast { refused: "no".into(), ..Default::default() };
        assert_eq!(forecast(&refused), "It would be refused: no");
    }

    #[test]
    fn events_and_steps_of_a_task_come_in_one_order() {
        let line = |at_ms, text: &str| v1::TaskLine { at_ms, text: text.into() };
        let task = v1::Task {
            id: 7,
            kind: "failover".into(),
            vm_name: "web".into(),
            log: vec![line(20, "begins"), line(40, "n1 is chosen")],
            ..Default::default()
        };
        let event = |seq, at_ms, text: &str| v1::Event {
            seq,
            at_ms,
            text: text.into(),
            ..Default::default()
        };
        let events = vec![event(1, 10, "n3 is lost"), event(2, 30, "late")];
        let text = task_explanation(&v1::TaskExplanation { task: Some(task), events });
        let at = |word: &str| text.find(word).unwrap();
        assert!(at("n3 is lost") < at("begins") && at("begins") < at("late"), "{text}");
        assert!(at("late") < at("n1 is chosen"), "{text}");
    }
}
