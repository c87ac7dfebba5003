//! How long each part of a failover took, by the cluster's own account. The clocks of all hosts are
//! set by the lab's at their boot, so that both fit together.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::timeline::Timeline;
use crate::watch::Vm;

/// Seconds since the first fault.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Failover {
    pub vm: String,
    /// Its old node was called unknown.
    pub detected: Option<f64>,
    /// The kind of the proof.
    pub proof: String,
    /// A node was chosen for the try that succeeded.
    pub placed: Option<f64>,
    /// The proof existed.
    pub proven: Option<f64>,
    /// The agent said that the guest runs.
    pub running: Option<f64>,
    /// The new guest was heard.
    pub ticked: Option<f64>,
}

/// A failover that has succeeded, out of the task, the cluster's events and what the guest printed.
pub fn measure(
    task: &Value,
    events: &[Value],
    heard: &Vm,
    fault: Duration,
    timeline: &Timeline,
) -> Option<Failover> {
    if task["kind"] != "failover" || task["outcome"] != "done" {
        return None;
    }
    let since_fault = |at_ms: &Value| {
        let at = at_ms.as_u64()?.checked_sub(timeline.began_ms())?;
        Some((at as f64 - fault.as_millis() as f64) / 1000.0)
    };
    let empty = Vec::new();
    let log = task["log"].as_array().unwrap_or(&empty);
    let said = |text: &str| {
        let line = log.iter().rev().find(|line| contains(line, text));
        line.and_then(|line| since_fault(&line["at_ms"]))
    };
    let lost = events.iter().find(|event| contains(event, "is not heard from"));
    let placed = said("is chosen");
    // The first guest after the choice: later ones may have been moved or restored.
    let ticks = heard.incarnations.values().filter_map(|it| it.first_tick);
    let ticks = ticks.map(|tick| tick.as_secs_f64() - fault.as_secs_f64());
    let ticked =
        ticks.filter(|tick| placed.is_some_and(|placed| *tick > placed)).min_by(f64::total_cmp);
    Some(Failover {
        vm: task["vm_name"].as_str().unwrap_or_default().to_owned(),
        detected: lost.and_then(|event| since_fault(&event["at_ms"])),
        proof: task["fence_proof"].as_str().unwrap_or_default().to_owned(),
        placed,
        proven: said("proof: "),
        running: since_fault(&task["ended_at_ms"]),
        ticked,
    })
}

fn contains(line: &Value, text: &str) -> bool {
    line["text"].as_str().is_some_and(|line| line.contains(text))
}

impl std::fmt::Display for Failover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = |time: Option<f64>| time.map_or_else(|| "-".into(), |s| format!("{s:.1}"));
        write!(
            f,
            "{}: detected {}, placed {}, proof {} {}, running {}, first tick {}",
            self.vm,
            at(self.detected),
            at(self.placed),
            self.proof,
            at(self.proven),
            at(self.running),
            at(self.ticked)
        )
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::watch::Incarnation;

    #[test]
    fn the_parts_of_a_failover_are_told_apart() {
        let directory = std::env::temp_dir().join(format!("bw-failover-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&directory).unwrap();
        let timeline = Timeline::create(&directory.join("timeline")).unwrap();
        let at = |ms: u64| timeline.began_ms() + 10_000 + ms;
        let task = json!({
            "kind": "failover", "outcome": "done", "vm_name": "web", "fence_proof": "storage",
            "ended_at_ms": at(9_000),
            "log": [
                { "at_ms": at(2_000), "text": "node2 is chosen, epoch 3" },
                { "at_ms": at(6_000), "text": "node3 is chosen, epoch 4" },
                { "at_ms": at(8_000), "text": "proof: storage: node 3 holds the lock" },
            ],
        });
        let events = [json!({ "at_ms": at(1_500), "text": "node1 is not heard from; it may" })];
        let fault = Duration::from_secs(10);
        let mut heard = Vm::default();
        let ticks = [("node1", 1, 3_000), ("node3", 4, 19_500), ("node1", 5, 40_000)];
        for (host, epoch, ms) in ticks {
            let first_tick = Some(Duration::from_millis(ms));
            let incarnation = Incarnation { first_tick, ..Incarnation::default() };
            heard.incarnations.insert((host.to_owned(), epoch), incarnation);
        }
        let found = measure(&task, &events, &heard, fault, &timeline).unwrap();
        assert_eq!(
            found.to_string(),
            "web: detected 1.5, placed 6.0, proof storage 8.0, running 9.0, first tick 9.5"
        );
        let other = json!({ "kind": "start", "outcome": "done" });
        assert_eq!(measure(&other, &events, &Vm::default(), fault, &timeline), None);
        std::fs::remove_dir_all(directory).unwrap();
    }
}
