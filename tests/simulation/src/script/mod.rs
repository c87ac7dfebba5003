//! Scenarios as text files that an administrator writes: a cluster, its VMs, what happens when, and
//! what is expected of it. docs/scenarios.md describes the format.
//!
//! ```
//! use bellwether_simulation::script::Script;
//!
//! let script = Script::parse(
//!     "vm web memory 2G on n1\n\
//!      at 10s power off n1\n\
//!      expect web runs on n2,n3 by 40s\n",
//! )?;
//! assert!(script.play().held());
//! # Ok::<(), bellwether_simulation::script::ParseError>(())
//! ```

mod deeds;
mod display;
mod expect;
mod lines;
mod words;

use std::collections::BTreeMap;
use std::fmt::Write;

pub use expect::Expectation;
pub use lines::ParseError;

use crate::run::{Line, Verdict};
use crate::scenario::Scenario;
use crate::search::run_caught;
use expect::Evidence;

/// A file that was read.
#[derive(Clone, PartialEq, Debug)]
pub struct Script {
    pub title: String,
    pub scenario: Scenario,
    pub expectations: Vec<Expectation>,
    /// The log that the file says it has, if it does.
    pub recorded: Option<Recorded>,
}

/// The part of a file behind `log`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recorded {
    /// The number of the line `log`.
    pub line: usize,
    pub lines: Vec<String>,
}

/// What came of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Played {
    /// The decision log as it stands in files.
    pub log: Vec<String>,
    /// The same in parts.
    pub entries: Vec<Line>,
    /// An invariant that did not hold: never the file's fault.
    pub broken: Option<String>,
    pub unmet: Vec<Unmet>,
    /// The first line in which the recorded log differs.
    pub differs: Option<Difference>,
    pub trace_hash: u64,
    pub virtual_ms: u64,
}

/// An expectation that was not met.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unmet {
    pub line: usize,
    pub expected: String,
    pub seen: String,
}

/// Where a recorded log and the log of the run part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Of the file.
    pub line: usize,
    pub recorded: Option<String>,
    pub now: Option<String>,
}

impl Played {
    /// Whether everything is as the file says.
    pub fn held(&self) -> bool {
        self.broken.is_none() && self.unmet.is_empty() && self.differs.is_none()
    }
}

impl Script {
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        lines::parse(text)
    }

    /// Runs it and holds the file against what came of it.
    pub fn play(&self) -> Played {
        let run = run_caught(&self.scenario);
        let entries = without_repetitions(run.log.iter().filter_map(told));
        let log: Vec<String> = entries.iter().map(written).collect();
        let until_ms = self.scenario.heal_at_ms;
        let evidence = Evidence { timeline: &run.timeline, log: &log, until_ms };
        let unmet = self.expectations.iter().filter_map(|expectation| {
            let seen = expectation.unmet(&evidence)?;
            Some(Unmet { line: expectation.line, expected: expectation.text.clone(), seen })
        });
        let broken = match &run.verdict {
            Verdict::Held => None,
            Verdict::Broken { what, .. } => Some(what.clone()),
        };
        Played {
            unmet: unmet.collect(),
            differs: self.recorded.as_ref().and_then(|recorded| recorded.differs(&log)),
            broken,
            trace_hash: run.trace_hash,
            virtual_ms: run.virtual_ms,
            log,
            entries,
        }
    }
}

impl Recorded {
    fn differs(&self, log: &[String]) -> Option<Difference> {
        let longest = self.lines.len().max(log.len());
        (0..longest).find(|index| self.lines.get(*index) != log.get(*index)).map(|index| {
            Difference {
                line: self.line + 1 + index,
                recorded: self.lines.get(index).cloned(),
                now: log.get(index).cloned(),
            }
        })
    }
}

/// The text of a file with this log in the place of what it has recorded.
pub fn with_log(text: &str, log: &[String]) -> String {
    let head = text.lines().take_while(|line| line.trim() != "log");
    let mut written = head.collect::<Vec<_>>().join("\n").trim_end().to_owned();
    written.push_str("\n\nlog\n");
    for line in log {
        let _ = writeln!(written, "{line}");
    }
    written
}

/// A line of the decision log; what only explains the simulator is left out.
fn told(line: &Line) -> Option<Line> {
    let Line { at_ms, source, text } = line;
    let controller = source.strip_prefix('c').and_then(|id| id.parse::<u64>().ok());
    let (source, text) = match (source.as_str(), controller) {
        ("task" | "heal", _) => return None,
        (_, Some(id)) => ("leader", format!("n{id} {text}")),
        (other, None) => (other, text.clone()),
    };
    Some(Line { at_ms: *at_ms, source: source.to_owned(), text })
}

/// An attempt that is made again and again for the same reason is told once.
fn without_repetitions(lines: impl Iterator<Item = Line>) -> Vec<Line> {
    let mut told: BTreeMap<String, String> = BTreeMap::new();
    let mut is_news = |line: &Line| {
        let (vm, rest) = line.text.split_once(" goes to ").unwrap_or_default();
        if line.source == "place" {
            let last = told.insert(vm.to_owned(), rest.to_owned());
            return last.is_none_or(|last| last != rest);
        }
        // What begins anew is decided anew.
        if let Some((_, vm)) = line.text.split_once(" of VM ").filter(|_| line.source == "cluster")
        {
            told.remove(&format!("VM {}", vm.split(' ').next().unwrap_or_default()));
        }
        true
    };
    lines.filter(|line| is_news(line)).collect()
}

/// Tenths of a second are enough for people, and spare files that say the same a change.
fn written(line: &Line) -> String {
    let Line { at_ms, source, text } = line;
    let tenths = at_ms / 100;
    let line = format!("{:>6}.{}s  {source:<8} {text}", tenths / 10, tenths % 10);
    line.trim_end().to_owned()
}
