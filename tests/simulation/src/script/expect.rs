//! What a file expects to be true, and whether it was.

use super::lines::Known;
use super::words::{Result, Words, duration, duration_ms, number};
use crate::timeline::{Moment, NodeSeen, Timeline, VmSeen};

/// One line `expect …`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Expectation {
    pub line: usize,
    /// As it was written.
    pub text: String,
    what: What,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum What {
    Vm { vm: String, how: How, when: When },
    Node { node: u64, phase: String, when: When },
    NeverOn { vm: String, nodes: Vec<u64> },
    DownAtMost { vm: String, ms: u64 },
    KeepsMemory { vm: String },
    Boots { vm: String, times: usize },
    Apart { vm: String, other: String },
    Before { vm: String, other: String },
    Log { text: String, there: bool },
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum How {
    /// On one of these; on any if there are none.
    Runs(Vec<u64>),
    Down,
    Stopped,
    Saved,
    Paused,
    Pending,
    Halted,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum When {
    AtTheEnd,
    By(u64),
    Throughout(u64, u64),
}

const FORMS: &str = "write one of: expect NAME runs [on n1,n2] [by 40s | from 40s to 60s]; \
    expect NAME is down, stopped, saved, paused, pending or halted [by …]; expect NAME never on n3; \
    expect NAME down at most 5s; expect NAME keeps its memory; expect NAME boots 2 times; \
    expect NAME never with OTHER; expect NAME starts before OTHER; expect n1 is unknown [by …]; \
    expect log TEXT; expect no log TEXT";

pub fn expectation(
    line: usize,
    text: &str,
    words: &mut Words<'_>,
    known: &Known,
) -> Result<Expectation> {
    let what = what(words, known)?;
    words.end().map_err(|error| format!("{error}. Or {FORMS}"))?;
    Ok(Expectation { line, text: text.to_owned(), what })
}

fn what(words: &mut Words<'_>, known: &Known) -> Result<What> {
    if words.eat("no") {
        words.must("log")?;
        return Ok(What::Log { text: words.rest(), there: false });
    }
    if words.eat("log") {
        return Ok(What::Log { text: words.rest(), there: true });
    }
    let (vm, node) = (words.eat("vm"), words.eat("node"));
    let name = words.take("a VM or a node")?;
    match node || (!vm && known.is_node(name)) {
        true => of_node(known.node(name)?, words),
        false => of_vm(known.vm(name)?, words, known),
    }
}

fn of_node(node: u64, words: &mut Words<'_>) -> Result<What> {
    words.must("is")?;
    let phase = words.take("a state")?.to_owned();
    let phases =
        ["joining", "online", "draining", "maintenance", "unknown", "fenced", "quarantined"];
    match phases.contains(&phase.as_str()) {
        true => Ok(What::Node { node, phase, when: when(words)? }),
        false => Err(format!("`{phase}` is no state of a node; these are: {}", phases.join(", "))),
    }
}

fn of_vm(vm: String, words: &mut Words<'_>, known: &Known) -> Result<What> {
    match words.take("what is expected of it")? {
        "runs" => {
            let nodes = if words.eat("on") { nodes(words, known)? } else { Vec::new() };
            Ok(What::Vm { vm, how: How::Runs(nodes), when: when(words)? })
        }
        "is" => {
            let how = match words.take("a state")? {
                "down" => How::Down,
                "stopped" => How::Stopped,
                "saved" => How::Saved,
                "paused" => How::Paused,
                "pending" => How::Pending,
                "halted" => How::Halted,
                other => return Err(format!("`{other}` is no state of a VM; {FORMS}")),
            };
            Ok(What::Vm { vm, how, when: when(words)? })
        }
        "never" => match words.eat("with") {
            true => Ok(What::Apart { vm, other: known.vm(words.take("a VM")?)? }),
            false => {
                words.eat("runs");
                words.must("on")?;
                Ok(What::NeverOn { vm, nodes: nodes(words, known)? })
            }
        },
        "down" => {
            words.must("at")?;
            words.must("most")?;
            Ok(What::DownAtMost { vm, ms: duration_ms(words.take("a duration")?)? })
        }
        "keeps" => {
            words.must("its")?;
            words.must("memory")?;
            Ok(What::KeepsMemory { vm })
        }
        "boots" => {
            let times = number(words.take("a number")?)?;
            let _plural = words.eat("times") || words.eat("time");
            Ok(What::Boots { vm, times })
        }
        "starts" => {
            words.must("before")?;
            Ok(What::Before { vm, other: known.vm(words.take("a VM")?)? })
        }
        other => Err(format!("`{other}`: {FORMS}")),
    }
}

fn nodes(words: &mut Words<'_>, known: &Known) -> Result<Vec<u64>> {
    words.take("a node")?.split(',').map(|name| known.node(name)).collect()
}

fn when(words: &mut Words<'_>) -> Result<When> {
    if words.eat("by") || words.eat("at") {
        return Ok(When::By(duration_ms(words.take("a time")?)?));
    }
    if words.eat("from") {
        let from = duration_ms(words.take("a time")?)?;
        words.must("to")?;
        let to = duration_ms(words.take("a time")?)?;
        return match from < to {
            true => Ok(When::Throughout(from, to)),
            false => Err("the time of `from` has to be before that of `to`".to_owned()),
        };
    }
    Ok(When::AtTheEnd)
}

/// What an expectation is held against.
pub struct Evidence<'a> {
    pub timeline: &'a Timeline,
    pub log: &'a [String],
    pub until_ms: u64,
}

impl Expectation {
    /// The latest time that it names.
    pub fn latest_ms(&self) -> u64 {
        let when = match &self.what {
            What::Vm { when, .. } | What::Node { when, .. } => *when,
            _ => When::AtTheEnd,
        };
        match when {
            When::AtTheEnd => 0,
            When::By(at) | When::Throughout(_, at) => at,
        }
    }

    /// Why it is not met, if it is not.
    pub fn unmet(&self, evidence: &Evidence<'_>) -> Option<String> {
        let Evidence { timeline, log, until_ms } = *evidence;
        match &self.what {
            What::Vm { vm, how, when } => {
                let holds = |moment: &Moment| moment.vms.get(vm).is_some_and(|seen| how.is(seen));
                let seen = |moment: &Moment| describe(moment.vms.get(vm));
                check(timeline, *when, until_ms, holds, seen)
            }
            What::Node { node, phase, when } => {
                let holds = |moment: &Moment| moment.nodes.get(node).is_some_and(|it| it.is(phase));
                let seen = |moment: &Moment| {
                    moment.nodes.get(node).map_or("gone", |node| node.phase).to_owned()
                };
                check(timeline, *when, until_ms, holds, seen)
            }
            What::NeverOn { vm, nodes } => {
                let began =
                    timeline.begun.iter().find(|it| it.vm == *vm && nodes.contains(&it.node));
                let there = |moment: &&Moment| {
                    let on = moment.vms.get(vm).and_then(|seen| seen.on);
                    on.is_some_and(|node| nodes.contains(&node))
                };
                let at_ms = began.map(|it| it.at_ms);
                let at_ms = at_ms.or_else(|| Some(timeline.moments.iter().find(there)?.at_ms));
                at_ms.map(|at_ms| format!("it ran there at {}", duration(at_ms)))
            }
            What::DownAtMost { vm, ms } => {
                let down = |(moment, lasts): (&Moment, u64)| {
                    if moment.vms.get(vm).is_some_and(|seen| seen.up) { 0 } else { lasts }
                };
                let total: u64 = timeline.within(0, until_ms).map(down).sum();
                (total > *ms).then(|| format!("it was down for {}", duration(total)))
            }
            What::KeepsMemory { vm } => {
                let boot = timeline.begun.iter().find(|it| it.vm == *vm && !it.resumed);
                boot.map(|it| format!("it booted on n{} at {}", it.node, duration(it.at_ms)))
            }
            What::Boots { vm, times } => {
                let boots = timeline.begun.iter().filter(|it| it.vm == *vm && !it.resumed).count();
                (boots != *times).then(|| format!("it booted {boots} times"))
            }
            What::Apart { vm, other } => together(timeline, vm, other),
            What::Before { vm, other } => before(timeline, vm, other),
            What::Log { text, there } => {
                let line = log.iter().find(|line| line.contains(text.as_str()));
                match (line, there) {
                    (None, true) => Some("no line of the log says so".to_owned()),
                    (Some(line), false) => Some(format!("the log says: {}", line.trim())),
                    _ => None,
                }
            }
        }
    }
}

impl How {
    fn is(&self, seen: &VmSeen) -> bool {
        match self {
            Self::Runs(nodes) => {
                let there = |node| nodes.is_empty() || nodes.contains(&node);
                seen.up && seen.on.is_some_and(there)
            }
            Self::Down => !seen.up,
            Self::Stopped => seen.stopped,
            Self::Saved => seen.saved,
            Self::Paused => seen.paused,
            Self::Pending => seen.pending,
            Self::Halted => seen.halted,
        }
    }
}

impl NodeSeen {
    fn is(&self, phase: &str) -> bool {
        if phase == "quarantined" { self.quarantined } else { self.phase == phase }
    }
}

fn describe(seen: Option<&VmSeen>) -> String {
    let Some(seen) = seen else { return "it did not exist".to_owned() };
    match (seen.on, seen.up) {
        (Some(node), true) => format!("it ran on n{node}"),
        (Some(node), false) if seen.paused => format!("it was paused on n{node}"),
        (Some(node), false) => format!("it stood still on n{node}"),
        (None, _) if seen.saved => "it was saved".to_owned(),
        (None, _) if seen.stopped => "it was stopped".to_owned(),
        (None, _) if seen.pending => "it was down and pending".to_owned(),
        (None, _) => "it was down".to_owned(),
    }
}

fn check(
    timeline: &Timeline,
    when: When,
    until_ms: u64,
    holds: impl Fn(&Moment) -> bool,
    seen: impl Fn(&Moment) -> String,
) -> Option<String> {
    let at = |at_ms: u64| match timeline.at(at_ms) {
        Some(moment) if holds(moment) => None,
        Some(moment) => Some(format!("at {} {}", duration(at_ms), seen(moment))),
        None => Some("nothing was seen by then".to_owned()),
    };
    match when {
        When::AtTheEnd => at(until_ms),
        When::By(at_ms) => at(at_ms),
        When::Throughout(from, to) => {
            let broken = timeline.within(from, to).find(|(moment, _)| !holds(moment));
            broken.map(|(moment, _)| {
                format!("at {} {}", duration(moment.at_ms.max(from)), seen(moment))
            })
        }
    }
}

fn together(timeline: &Timeline, vm: &str, other: &str) -> Option<String> {
    let on = |moment: &Moment, name: &str| moment.vms.get(name).and_then(|seen| seen.on);
    let met = timeline.moments.iter().find(|moment| {
        let here = on(moment, vm);
        here.is_some() && here == on(moment, other)
    });
    met.map(|moment| format!("both were on one node at {}", duration(moment.at_ms)))
}

/// By the first start of each within the scenario.
fn before(timeline: &Timeline, vm: &str, other: &str) -> Option<String> {
    let first = |name: &str| timeline.begun.iter().find(|it| it.vm == name).map(|it| it.at_ms);
    match (first(vm), first(other)) {
        (Some(one), Some(two)) if one < two => None,
        (Some(one), Some(two)) => {
            Some(format!("it started at {}, the other at {}", duration(one), duration(two)))
        }
        (None, _) => Some("it did not start".to_owned()),
        (_, None) => Some(format!("{other} did not start")),
    }
}
