//! What a set of runs has met, and how often. What the standard set never meets is a hole in it.

use std::collections::BTreeMap;

/// Counts by group and name.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Coverage(BTreeMap<(&'static str, String), u64>);

/// What the standard set of seeds has to meet: anything here at zero is a failure.
pub const EXPECTED: &[(&str, &[&str])] = &[
    (
        "step",
        &[
            "choose",
            "prepare",
            "take-over",
            "pre-copy",
            "seal",
            "load",
            "activate",
            "reap",
            "claim-back",
            "abandon",
            "ask-guest",
            "await-guest",
            "release",
            "purge",
        ],
    ),
    (
        "event",
        &[
            "chosen",
            "placed",
            "no-node",
            "proven",
            "reinstated",
            "prepared",
            "held",
            "held-with-state",
            "busy",
            "pre-copied",
            "sealed",
            "loaded",
            "activated",
            "claimed-back",
            "released",
            "asked",
            "guest-ended",
            "purged",
            "failed",
            "runner-lost",
            "timed-out",
        ],
    ),
    (
        "task",
        &[
            "start", "stop", "shutdown", "migrate", "save", "restore", "failover", "settle",
            "delete",
        ],
    ),
    (
        "place",
        &[
            "stopped -> runner",
            "runner -> sealed",
            "runner -> revoked",
            "runner -> stopped",
            "sealed -> runner",
            "revoked -> runner",
            "revoked -> sealed",
            "revoked -> stopped",
        ],
    ),
    ("proof", &["released", "rebooted", "storage", "handed-over", "operator", "watchdog", "power"]),
    ("isolation", &["in-touch", "blind", "no-quorum", "cut-off"]),
    (
        "fault",
        &[
            "power",
            "freeze",
            "suspend",
            "kill-agent",
            "kill-controller",
            "kill-vmm",
            "stop-agent",
            "stop-controller",
            "stop-vmm",
            "cut",
            "cut-one-way",
            "split",
            "cut-storage",
            "weather",
            "storage-full",
            "storage-error",
            "runtime-full",
            "kill-fencer",
            "disarm",
            "clock",
            "guest-crash",
            "guest-shutdown",
        ],
    ),
    ("storage", &["lock-busy", "lock-revoked", "late-write-refused", "torn-or-lost"]),
    ("answer", &["silent", "never-ran", "refused", "overtaken"]),
    ("claim", &["behind the seal", "after the seal"]),
    (
        "agent",
        &[
            "adopted",
            "refused: old term",
            "refused: released",
            "given up",
            "lease page held",
            "lease came back",
            "locks let go",
            "locks taken back",
            "handed over",
            "hand-over failed",
        ],
    ),
    (
        "fencer",
        &[
            "pets: granted",
            "pets: nobody depends",
            "holds",
            "kills a VMM",
            "watchdog resets the host",
            "disarmed",
            "not disarmed",
        ],
    ),
    ("switch", &["proven", "host off", "switch fails", "switch hangs", "switch lies"]),
    ("raft", &["elected", "deposed", "snapshot", "installed", "unknown proposal"]),
    ("admin", &["done", "refused", "unknown", "read"]),
];

impl Coverage {
    pub fn hit(&mut self, group: &'static str, name: impl Into<String>) {
        *self.0.entry((group, name.into())).or_default() += 1;
    }

    pub fn merge(&mut self, other: &Self) {
        for (key, count) in &other.0 {
            *self.0.entry(key.clone()).or_default() += count;
        }
    }

    pub fn count(&self, group: &'static str, name: &str) -> u64 {
        self.0.get(&(group, name.to_owned())).copied().unwrap_or(0)
    }

    /// All rows, the expected ones that were never met included.
    pub fn rows(&self) -> Vec<(&'static str, String, u64)> {
        let mut all = self.0.clone();
        for (group, names) in EXPECTED {
            for name in *names {
                all.entry((group, (*name).to_owned())).or_default();
            }
        }
        all.into_iter().map(|((group, name), count)| (group, name, count)).collect()
    }

    /// What was expected and never met.
    pub fn holes(&self) -> Vec<String> {
        let rows = self.rows().into_iter();
        rows.filter(|(.., count)| *count == 0)
            .map(|(group, name, _)| format!("{group}: {name}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_met_is_shown_with_a_zero() {
        let mut coverage = Coverage::default();
        assert!(coverage.holes().contains(&"step: seal".to_owned()));
        coverage.hit("step", "seal");
        coverage.merge(&coverage.clone());
        assert_eq!(coverage.count("step", "seal"), 2);
        assert!(!coverage.holes().contains(&"step: seal".to_owned()));
    }
}
