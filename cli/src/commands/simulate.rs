//! `bell simulate FILE`: a scenario, without a cluster.

use std::path::Path;

use bellwether_simulation::script::{Played, Script};
use serde_json::{Value, json};

use super::Session;
use crate::exit::{Exit, Failure};

/// A file larger than this is no scenario but something given by mistake.
const FILE_LEN_MAX: u64 = 1 << 20;

pub fn run(session: &Session<'_>, path: &Path) -> Result<(), Failure> {
    let script = Script::parse(&read(path)?).map_err(|error| {
        Failure::usage(format!("{}: {error}", path.display()))
            .remedy("docs/scenarios.md describes the file; `bell simulate --help` has a small one")
    })?;
    let played = script.play();
    session.output.result(&result(&script, &played), || text(&script, &played))?;
    match verdict(&script, &played) {
        None => Ok(()),
        Some(message) => Err(Failure::new(Exit::Refused, message)),
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    let fail = |error: &dyn std::fmt::Display| {
        Failure::new(Exit::NotFound, format!("cannot read {}: {error}", path.display()))
    };
    let length = std::fs::metadata(path).map_err(|error| fail(&error))?.len();
    if length > FILE_LEN_MAX {
        return Err(fail(&format!("it has {length} bytes; a scenario has at most {FILE_LEN_MAX}")));
    }
    std::fs::read_to_string(path).map_err(|error| fail(&error))
}

fn text(script: &Script, played: &Played) -> String {
    let mut lines = Vec::new();
    if !script.title.is_empty() {
        lines.push(script.title.clone());
        lines.push(String::new());
    }
    lines.extend(played.log.iter().cloned());
    let met = script.expectations.len() - played.unmet.len();
    if met > 0 {
        lines.push(String::new());
        lines.push(format!("{met} of {} expectations are met", script.expectations.len()));
    }
    lines.join("\n")
}

/// What is not as the file says, if anything is.
fn verdict(script: &Script, played: &Played) -> Option<String> {
    if let Some(broken) = &played.broken {
        return Some(format!("an invariant is broken, which is a defect of Bellwether: {broken}"));
    }
    let mut lines: Vec<String> = played
        .unmet
        .iter()
        .map(|unmet| format!("line {}: `{}`: {}", unmet.line, unmet.expected, unmet.seen))
        .collect();
    if let (Some(differs), Some(_)) = (&played.differs, &script.recorded) {
        let line = |line: &Option<String>| match line {
            Some(line) => format!("`{}`", line.trim()),
            None => "nothing".to_owned(),
        };
        let (recorded, now) = (line(&differs.recorded), line(&differs.now));
        lines.push(format!("line {}: the file says {recorded}; it was {now}", differs.line));
    }
    (!lines.is_empty()).then(|| format!("not as the file says: {}", lines.join("\n  ")))
}

fn result(script: &Script, played: &Played) -> Value {
    let expectation = |it: &bellwether_simulation::script::Expectation| {
        let unmet = played.unmet.iter().find(|unmet| unmet.line == it.line);
        json!({
            "line": it.line,
            "text": it.text,
            "met": unmet.is_none(),
            "seen": unmet.map(|unmet| unmet.seen.as_str()),
        })
    };
    let differs = played.differs.as_ref();
    json!({
        "title": script.title,
        "held": played.held(),
        "broken": played.broken,
        "expectations": script.expectations.iter().map(expectation).collect::<Vec<_>>(),
        "log": played.entries.iter().map(|entry| json!({
            "at_ms": entry.at_ms, "source": entry.source, "text": entry.text,
        })).collect::<Vec<_>>(),
        "log_differs_at_line": differs.map(|it| it.line),
        "virtual_ms": played.virtual_ms,
    })
}
