//! The text of a scenario, a step per line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::fabric::{Direction, Network};
use crate::supply::Manner;

#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: String,
    pub path: PathBuf,
    pub lines: Vec<Line>,
}

/// A step, and the text that it was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    pub number: usize,
    pub text: String,
    pub step: Step,
}

/// A host is a name, or `$name` of an earlier `let`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    Vm { vm: String, node: Option<String>, leased: bool },
    Let { name: String, value: Value },
    PowerOff { host: String },
    PowerOn { host: String },
    Freeze { host: String },
    Thaw { host: String },
    Cut { network: Network, host: String, direction: Direction },
    Heal { network: Network, host: String },
    HealAll,
    Kill { program: String, host: String },
    Stop { program: String, host: String },
    Start { program: String, host: String },
    Clock { host: String, seconds: i64 },
    FillStorage,
    FreeStorage,
    RestartNfs,
    Migrate { vm: String, to: Option<String>, waits: bool },
    Save { vm: String },
    Restore { vm: String },
    Drain { node: String },
    Resume { node: String },
    Reboot { host: String },
    Hang { host: String },
    Switch { host: String, manner: Option<Manner> },
    Watchdog { host: String, way: WatchdogWay },
    Wait { time: Duration },
    Expect { what: Expectation, within: Duration },
}

/// What a host's fencer is told of watchdogs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WatchdogWay {
    Off,
    Hardware,
    /// The kernel's own, which proves nothing.
    Software,
}

impl WatchdogWay {
    fn parse(word: &str) -> Result<Self> {
        Ok(match word {
            "off" => Self::Off,
            "hardware" => Self::Hardware,
            "software" => Self::Software,
            _ => bail!("a watchdog is off, hardware or software"),
        })
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    NodeOf { vm: String },
    Leader,
    OtherThan { hosts: Vec<String> },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expectation {
    Runs {
        vm: String,
        on: Option<String>,
        not_on: Option<String>,
    },
    State {
        vm: String,
        state: String,
    },
    Ticks {
        vm: String,
    },
    /// No boot since the scenario's start: its memory is the same.
    NeverRebooted {
        vm: String,
    },
    /// For the whole time, not at one moment of it.
    Silent {
        vm: String,
        host: String,
    },
    KeepsTicking {
        vm: String,
    },
    NodeState {
        node: String,
        state: String,
    },
    Event {
        text: String,
    },
    Leader,
    Intact {
        vm: String,
    },
    /// The latest takeover rested on this proof.
    Proof {
        vm: String,
        proof: String,
    },
    /// The cluster says that the node can yield this proof, or cannot.
    Yields {
        node: String,
        proof: String,
        yields: bool,
    },
    /// Since the first fault; `before` names a VM whose guest must have ticked elsewhere only after.
    WatchdogFired {
        host: String,
        before: Option<String>,
    },
    WatchdogQuiet {
        host: String,
    },
    /// The cluster has a reason why the VM does not run, with this text in it.
    Waits {
        vm: String,
        text: String,
    },
    /// No guest was told of a failed request.
    NoIoErrors {
        vm: String,
    },
}

const DEFAULT_WITHIN: Duration = Duration::from_secs(60);

impl Scenario {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read scenario {}", path.display()))?;
        let lines = Self::parse(&text).with_context(|| format!("scenario {}", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, path: path.to_owned(), lines })
    }

    fn parse(text: &str) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        for (at, text) in text.lines().enumerate() {
            let text = text.split('#').next().unwrap_or_default().trim();
            if !text.is_empty() {
                let number = at + 1;
                let step = Step::parse(text).with_context(|| format!("line {number}: `{text}`"))?;
                lines.push(Line { number, text: text.to_owned(), step });
            }
        }
        Ok(lines)
    }
}

impl Step {
    pub fn parse(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let host = |word: &&str| (*word).to_owned();
        Ok(match &words[..] {
            ["vm", vm] => Self::Vm { vm: host(vm), node: None, leased: false },
            ["vm", vm, "under", "lease"] => Self::Vm { vm: host(vm), node: None, leased: true },
            ["vm", vm, "on", node] => {
                Self::Vm { vm: host(vm), node: Some(host(node)), leased: false }
            }
            ["let", name, "=", value @ ..] => {
                Self::Let { name: host(name), value: Value::parse(value)? }
            }
            ["power", "off", name] => Self::PowerOff { host: host(name) },
            ["power", "on", name] => Self::PowerOn { host: host(name) },
            ["freeze", name] => Self::Freeze { host: host(name) },
            ["thaw", name] => Self::Thaw { host: host(name) },
            ["cut", name, target] => Self::cut(name, target, Direction::Both)?,
            ["cut", name, target, way] => Self::cut(name, target, direction(way)?)?,
            ["heal", "all"] => Self::HealAll,
            ["heal", name, target] => Self::Heal { network: network(name)?, host: host(target) },
            ["kill", name, "on", target] => {
                Self::Kill { program: program(name)?, host: host(target) }
            }
            ["stop", name, "on", target] => {
                Self::Stop { program: program(name)?, host: host(target) }
            }
            ["start", name, "on", target] => {
                Self::Start { program: program(name)?, host: host(target) }
            }
            ["clock", target, jump] => Self::Clock { host: host(target), seconds: jump_s(jump)? },
            ["fill", "storage"] => Self::FillStorage,
            ["free", "storage"] => Self::FreeStorage,
            ["restart", "nfs"] => Self::RestartNfs,
            ["migrate", rest @ ..] => Self::migrate(rest, true)?,
            ["begin", "migrate", rest @ ..] => Self::migrate(rest, false)?,
            ["save", vm] => Self::Save { vm: host(vm) },
            ["restore", vm] => Self::Restore { vm: host(vm) },
            ["drain", node] => Self::Drain { node: host(node) },
            ["resume", node] => Self::Resume { node: host(node) },
            ["reboot", name] => Self::Reboot { host: host(name) },
            ["watchdog", way, target] => {
                Self::Watchdog { host: host(target), way: WatchdogWay::parse(way)? }
            }
            ["switch", target, way] => Self::Switch { host: host(target), manner: manner(way)? },
            ["hang", name] => Self::Hang { host: host(name) },
            ["wait", rest @ ..] => Self::Wait { time: time(rest)? },
            ["expect", rest @ ..] => Self::expect(rest)?,
            _ => bail!("there is no such step; docs/lab.md lists them"),
        })
    }

    fn cut(name: &str, host: &str, direction: Direction) -> Result<Self> {
        Ok(Self::Cut { network: network(name)?, host: host.to_owned(), direction })
    }

    fn migrate(words: &[&str], waits: bool) -> Result<Self> {
        let (vm, to) = match words {
            [vm] => (vm, None),
            [vm, "to", node] => (vm, Some((*node).to_owned())),
            _ => bail!("migrate VM [to HOST]"),
        };
        Ok(Self::Migrate { vm: (*vm).to_owned(), to, waits })
    }

    fn expect(words: &[&str]) -> Result<Self> {
        let end = words.iter().rposition(|word| matches!(*word, "within" | "for"));
        let (words, within) = match end {
            Some(at) => (&words[..at], time(&words[at + 1..])?),
            None => (words, DEFAULT_WITHIN),
        };
        Ok(Self::Expect { what: Expectation::parse(words)?, within })
    }
}

impl Value {
    fn parse(words: &[&str]) -> Result<Self> {
        Ok(match words {
            ["node", "of", vm] => Self::NodeOf { vm: (*vm).to_owned() },
            ["leader"] => Self::Leader,
            ["other", "than", hosts @ ..] if !hosts.is_empty() => {
                Self::OtherThan { hosts: hosts.iter().map(|&host| host.to_owned()).collect() }
            }
            _ => bail!("a value is `node of VM`, `leader` or `other than HOST…`"),
        })
    }
}

impl Expectation {
    fn parse(words: &[&str]) -> Result<Self> {
        let owned = |word: &&str| (*word).to_owned();
        let runs = |vm: &&str, on: Option<&&str>, not_on: Option<&&str>| Self::Runs {
            vm: owned(vm),
            on: on.map(owned),
            not_on: not_on.map(owned),
        };
        Ok(match words {
            ["vm", vm, "runs"] => runs(vm, None, None),
            ["vm", vm, "runs", "on", node] => runs(vm, Some(node), None),
            ["vm", vm, "runs", "not", "on", node] => runs(vm, None, Some(node)),
            ["vm", vm, "is", state] => Self::State { vm: owned(vm), state: owned(state) },
            ["vm", vm, "ticks"] => Self::Ticks { vm: owned(vm) },
            ["vm", vm, "never", "rebooted"] => Self::NeverRebooted { vm: owned(vm) },
            ["vm", vm, "keeps", "ticking"] => Self::KeepsTicking { vm: owned(vm) },
            ["vm", vm, "silent", "on", host] => Self::Silent { vm: owned(vm), host: owned(host) },
            ["vm", vm, "intact"] => Self::Intact { vm: owned(vm) },
            ["vm", vm, "no", "io", "errors"] => Self::NoIoErrors { vm: owned(vm) },
            ["node", node, "is", state] => {
                Self::NodeState { node: owned(node), state: owned(state) }
            }
            ["vm", vm, "proof", proof] => Self::Proof { vm: owned(vm), proof: owned(proof) },
            ["vm", vm, "waits", text @ ..] if !text.is_empty() => {
                Self::Waits { vm: owned(vm), text: text.join(" ") }
            }
            ["node", node, "yields", proof] => {
                Self::Yields { node: owned(node), proof: owned(proof), yields: true }
            }
            ["node", node, "yields", "no", proof] => {
                Self::Yields { node: owned(node), proof: owned(proof), yields: false }
            }
            ["watchdog", host, "fired"] => Self::WatchdogFired { host: owned(host), before: None },
            ["watchdog", host, "fired", "before", vm, "ticked"] => {
                Self::WatchdogFired { host: owned(host), before: Some(owned(vm)) }
            }
            ["watchdog", host, "quiet"] => Self::WatchdogQuiet { host: owned(host) },
            ["event", text @ ..] if !text.is_empty() => Self::Event { text: text.join(" ") },
            ["leader"] => Self::Leader,
            _ => bail!("there is no such expectation; docs/lab.md lists them"),
        })
    }
}

fn network(name: &str) -> Result<Network> {
    Network::parse(name).context("the networks are management, storage and guests")
}

fn manner(word: &str) -> Result<Option<Manner>> {
    Ok(Some(match word {
        "none" => return Ok(None),
        "works" => Manner::Works,
        "lies" => Manner::Lies,
        "fails" => Manner::Fails,
        "hangs" => Manner::Hangs,
        _ => bail!("a power switch works, lies, fails, hangs, or there is none"),
    }))
}

fn direction(word: &str) -> Result<Direction> {
    Ok(match word {
        "in" => Direction::In,
        "out" => Direction::Out,
        "both" => Direction::Both,
        _ => bail!("a direction is in, out or both, as the host sees it"),
    })
}

fn program(name: &str) -> Result<String> {
    match name {
        "controller" | "agent" | "vmm" | "fencer" => Ok(name.to_owned()),
        _ => bail!("the programs are controller, agent, vmm and fencer"),
    }
}

/// `10 s`, `2 min`.
fn time(words: &[&str]) -> Result<Duration> {
    let [number, unit] = words else { bail!("a time is a number and `s` or `min`") };
    let number: u64 = number.parse().context("a time begins with a number")?;
    match *unit {
        "s" => Ok(Duration::from_secs(number)),
        "min" => Ok(Duration::from_secs(number * 60)),
        _ => bail!("the units of time are s and min"),
    }
}

/// `+1h`, `-90s`, `+5min`.
fn jump_s(text: &str) -> Result<i64> {
    let unit = text.trim_start_matches(['+', '-']).trim_start_matches(|c: char| c.is_ascii_digit());
    let factor = match unit {
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        _ => bail!("a jump is like +1h, -5min or +30s"),
    };
    let number: i64 = text.strip_suffix(unit).unwrap_or(text).parse()?;
    Ok(number * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read() {
        let cut = Step::Cut {
            network: Network::Storage,
            host: "$old".to_owned(),
            direction: Direction::Out,
        };
        assert_eq!(Step::parse("cut storage $old out").unwrap(), cut);
        let jump = Step::Clock { host: "node1".to_owned(), seconds: -3600 };
        assert_eq!(Step::parse("clock node1 -1h").unwrap(), jump);
        let runs =
            Expectation::Runs { vm: "web".to_owned(), on: None, not_on: Some("$old".to_owned()) };
        let expected = Step::Expect { what: runs, within: Duration::from_secs(90) };
        assert_eq!(Step::parse("expect vm web runs not on $old within 90 s").unwrap(), expected);
    }

    #[test]
    fn mistakes_name_their_line() {
        for (text, part) in [
            ("vm web\ncut power node1", "the networks are"),
            ("vm web\nclock node1 1 hour", "no such step"),
            ("vm web\nexpect vm web runs within 5 parsecs", "units of time"),
            ("vm web\nkill cat on node1", "the programs are"),
        ] {
            let refused = format!("{:#}", Scenario::parse(text).unwrap_err());
            assert!(refused.contains("line 2") && refused.contains(part), "{text}: {refused}");
        }
    }
}
