//! A file, line by line.

use std::collections::BTreeSet;
use std::fmt;

use super::deeds::{deed, rule, settings};
use super::expect::{Expectation, expectation};
use super::words::{FOREVER_MS, Result, Words, duration_ms, memory_mib, number};
use super::{Recorded, Script};
use crate::scenario::{
    Cluster, Equipment, Event, Fault, NodeSize, Opening, PowerSwitch, Scenario, Timed, VmSetup,
    Watchdog,
};
use crate::storage::StorageKind;

/// The most nodes of a scenario, and the most VMs.
const NODES_MAX: u64 = 64;
const VMS_MAX: usize = 1_000;
/// How long a scenario goes on after its last event, if it does not say.
const AFTERWARDS_MS: u64 = 60_000;

/// What is wrong with a file, and how to mend it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseError {
    pub line: usize,
    pub text: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.text)
    }
}

impl std::error::Error for ParseError {}

/// The names that a line may use.
#[derive(Clone, Debug, Default)]
pub struct Known {
    nodes: u64,
    controllers: u64,
    vms: BTreeSet<String>,
}

impl Known {
    pub fn node(&self, name: &str) -> Result<u64> {
        let number = name.strip_prefix('n').and_then(|number| number.parse().ok());
        number.filter(|number| (1..=self.nodes).contains(number)).ok_or_else(|| {
            format!("there is no node `{name}`; the nodes are n1 to n{}", self.nodes)
        })
    }

    pub fn controller(&self, name: &str) -> Result<u64> {
        let number = name.strip_prefix('n').and_then(|number| number.parse().ok());
        number.filter(|number| (1..=self.controllers).contains(number)).ok_or_else(|| {
            format!("there is no controller on `{name}`; they are on n1 to n{}", self.controllers)
        })
    }

    pub fn is_node(&self, name: &str) -> bool {
        !self.vms.contains(name) && self.node(name).is_ok()
    }

    pub fn vm(&self, name: &str) -> Result<String> {
        match self.vms.contains(name) {
            true => Ok(name.to_owned()),
            false => Err(format!(
                "there is no VM `{name}` up to here; define it with a line `vm {name} memory 1G`"
            )),
        }
    }

    pub fn new_vm(&mut self, name: &str) -> Result<String> {
        if self.vms.len() >= VMS_MAX {
            return Err(format!("{VMS_MAX} VMs are the most"));
        }
        match self.vms.insert(name.to_owned()) {
            true => Ok(name.to_owned()),
            false => Err(format!("there is a VM `{name}` already; give this one another name")),
        }
    }
}

struct Reader {
    known: Known,
    title: String,
    cluster: Cluster,
    seed: u64,
    events: Vec<Timed>,
    until_ms: Option<u64>,
    expectations: Vec<Expectation>,
}

/// Reads a whole file.
pub fn parse(text: &str) -> std::result::Result<Script, ParseError> {
    let mut reader = Reader::new();
    let mut recorded = None;
    let lines: Vec<&str> = text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        let number = index + 1;
        let code = without_comment(line).trim();
        if code == "log" {
            let kept = lines[number..].iter().map(|line| line.trim_end().to_owned()).collect();
            recorded = Some(Recorded { line: number, lines: trimmed(kept) });
            break;
        }
        if !code.is_empty() {
            let read = reader.line(number, code);
            read.map_err(|text| ParseError { line: number, text })?;
        }
    }
    reader.finish(recorded).map_err(|text| ParseError { line: lines.len().max(1), text })
}

/// Empty lines at the end of the log mean nothing.
fn trimmed(mut lines: Vec<String>) -> Vec<String> {
    while lines.last().is_some_and(|line| line.trim().is_empty()) {
        lines.pop();
    }
    lines
}

/// A comment begins at a `#` that stands first or behind a space.
fn without_comment(line: &str) -> &str {
    if line.trim_start().starts_with('#') {
        return "";
    }
    line.find(" #").map_or(line, |at| &line[..at])
}

impl Reader {
    fn new() -> Self {
        let mut cluster = Cluster::of(3, &[]);
        cluster.size = NodeSize { memory_mib: 16_384, vcpus: 8 };
        cluster.storage = StorageKind::Network { lease_ms: 10_000 };
        Self {
            known: Known { nodes: 3, controllers: 3, vms: BTreeSet::new() },
            title: String::new(),
            cluster,
            seed: 1,
            events: Vec::new(),
            until_ms: None,
            expectations: Vec::new(),
        }
    }

    fn line(&mut self, number: usize, text: &str) -> Result<()> {
        let mut words = Words::of(text);
        match words.take("a keyword")? {
            "title" => self.title = words.rest(),
            "nodes" => self.nodes(&mut words)?,
            "node" => {
                let node = self.known.node(words.take("a node")?)?;
                let known = (self.cluster.size_of(node), self.cluster.equipment_of(node));
                let (size, equipment) = host(&mut words, known)?;
                self.cluster.other_sizes.insert(node, size);
                self.cluster.other_equipment.insert(node, equipment);
            }
            "controllers" => self.controllers(&mut words)?,
            "storage" => self.cluster.storage = storage(&mut words)?,
            "cluster" => self.cluster.settings = settings(&mut words)?,
            "handover-after" => {
                self.cluster.handover_after_ms = duration_ms(words.take("a time")?)?;
            }
            "seed" => self.seed = crate::script::words::number(words.take("a number")?)?,
            "vm" => self.vm(&mut words)?,
            "at" => {
                let at_ms = duration_ms(words.take("a time")?)?;
                let event = deed(&mut words, &mut self.known)?;
                self.events.push(Timed { at_ms, event });
            }
            "until" => self.until_ms = Some(duration_ms(words.take("a time")?)?),
            "expect" => {
                let expected = expectation(number, text, &mut words, &self.known)?;
                self.expectations.push(expected);
            }
            other => return Err(format!("`{other}` begins no line here; {KEYWORDS}")),
        }
        words.end()
    }

    fn nodes(&mut self, words: &mut Words<'_>) -> Result<()> {
        let nodes = number(words.take("how many nodes there are")?)?;
        if !(1..=NODES_MAX).contains(&nodes) {
            return Err(format!("{nodes} nodes; give 1 to {NODES_MAX}"));
        }
        if !self.cluster.vms.is_empty() || !self.events.is_empty() {
            return Err("the nodes come before VMs and events; move this line up".to_owned());
        }
        self.cluster.nodes = nodes;
        let known = (self.cluster.size, self.cluster.equipment);
        (self.cluster.size, self.cluster.equipment) = host(words, known)?;
        let controllers = if nodes < 3 { 1 } else { 3 };
        (self.cluster.controllers, self.known) =
            (controllers, Known { nodes, controllers, ..Known::default() });
        Ok(())
    }

    fn controllers(&mut self, words: &mut Words<'_>) -> Result<()> {
        let count: u64 = number(words.take("how many controllers there are")?)?;
        let most = self.known.nodes.min(7);
        if count.is_multiple_of(2) || count > most {
            return Err(format!(
                "{count} controllers; give an odd number of at most {most}: they are on the first nodes"
            ));
        }
        (self.cluster.controllers, self.known.controllers) = (count, count);
        Ok(())
    }

    fn vm(&mut self, words: &mut Words<'_>) -> Result<()> {
        let names = range(words.take("a name")?)?;
        let mut vm = VmSetup { memory_mib: 1_024, ..VmSetup::new("") };
        while let Some(word) = words.next() {
            match word {
                "memory" => vm.memory_mib = memory_mib(words.take("a size")?)?,
                "vcpus" => vm.vcpus = number(words.take("a number")?)?,
                "on" => vm.on = Some(self.known.node(words.take("a node")?)?),
                "stopped" => vm.start = false,
                "lease" => vm.lease_arbiter = true,
                option => {
                    rule(&mut vm.rules, option, words, &self.known).map_err(|error| match error
                        .contains("is not a rule")
                    {
                        true => format!("{error}; besides them: memory, vcpus, on, stopped, lease"),
                        false => error,
                    })?
                }
            }
        }
        for name in names {
            let name = self.known.new_vm(&name)?;
            self.cluster.vms.push(VmSetup { name, ..vm.clone() });
        }
        Ok(())
    }

    fn finish(mut self, recorded: Option<Recorded>) -> Result<Script> {
        self.events.sort_by_key(|timed| timed.at_ms);
        let last = self.events.iter().map(ends_at).max().unwrap_or(0);
        let until_ms = self.until_ms.unwrap_or(last + AFTERWARDS_MS);
        if let Some(late) = self.events.iter().find(|timed| timed.at_ms >= until_ms) {
            return Err(format!("`{late}` happens after the end; raise `until`"));
        }
        if let Some(late) = self.expectations.iter().find(|it| it.latest_ms() > until_ms) {
            return Err(format!("`{}` looks beyond the end; raise `until`", late.text));
        }
        let scenario = Scenario {
            seed: self.seed,
            cluster: self.cluster,
            events: self.events,
            opening: Opening::WhenReady,
            heal_at_ms: until_ms,
            settle_ms_max: None,
        };
        Ok(Script { title: self.title, scenario, expectations: self.expectations, recorded })
    }
}

const KEYWORDS: &str = "a line begins with title, nodes, node, controllers, storage, cluster, handover-after, seed, vm, \
     at, until, expect or log";

/// When an event is over, if it ends.
fn ends_at(timed: &Timed) -> u64 {
    let for_ms = match &timed.event {
        Event::Fault(fault) => lasts(fault),
        Event::Request(_) => 0,
    };
    timed.at_ms + if for_ms == FOREVER_MS { 0 } else { for_ms }
}

fn lasts(fault: &Fault) -> u64 {
    match fault {
        Fault::Power { for_ms, .. }
        | Fault::Freeze { for_ms, .. }
        | Fault::Suspend { for_ms, .. }
        | Fault::KillAgent { for_ms, .. }
        | Fault::KillController { for_ms, .. }
        | Fault::KillLeader { for_ms }
        | Fault::StopAgent { for_ms, .. }
        | Fault::StopController { for_ms, .. }
        | Fault::StopLeader { for_ms }
        | Fault::StopVmm { for_ms, .. }
        | Fault::Cut { for_ms, .. }
        | Fault::Split { for_ms, .. }
        | Fault::CutStorage { for_ms, .. }
        | Fault::Weather { for_ms, .. }
        | Fault::StorageFull { for_ms }
        | Fault::StorageError { for_ms }
        | Fault::KillFencer { for_ms, .. }
        | Fault::Disarm { for_ms, .. }
        | Fault::RuntimeFull { for_ms, .. } => *for_ms,
        Fault::KillVmm { .. }
        | Fault::Clock { .. }
        | Fault::GuestCrash { .. }
        | Fault::GuestShutdown { .. } => 0,
    }
}

/// What a host has, and with what it can be ended.
fn host(words: &mut Words<'_>, known: (NodeSize, Equipment)) -> Result<(NodeSize, Equipment)> {
    let (mut size, mut equipment) = known;
    while let Some(word) = words.next() {
        match word {
            "memory" => size.memory_mib = memory_mib(words.take("a size")?)?,
            "vcpus" => size.vcpus = number(words.take("a number")?)?,
            "watchdog" => equipment.watchdog = watchdog(words.take("a period")?)?,
            "switch" => equipment.switch = switch(words.take("what the switch does")?)?,
            other => {
                return Err(format!(
                    "`{other}`: a node has `memory 16G`, `vcpus 8`, `watchdog 5s` and `switch works`"
                ));
            }
        }
    }
    Ok((size, equipment))
}

fn watchdog(text: &str) -> Result<Option<Watchdog>> {
    match text {
        "none" => Ok(None),
        "soft" => Ok(Some(Watchdog::Software { period_ms: 5_000 })),
        period => {
            let period_ms = duration_ms(period)?;
            match (1_000..=600_000).contains(&period_ms) {
                true => Ok(Some(Watchdog::Hardware { period_ms })),
                false => Err(format!("`{period}`: a watchdog's period is 1s to 10m")),
            }
        }
    }
}

fn switch(word: &str) -> Result<Option<PowerSwitch>> {
    match word {
        "none" => Ok(None),
        "works" => Ok(Some(PowerSwitch::Works)),
        "fails" => Ok(Some(PowerSwitch::Fails)),
        "hangs" => Ok(Some(PowerSwitch::Hangs)),
        "lies" => Ok(Some(PowerSwitch::Lies)),
        other => Err(format!("`switch {other}`: write works, fails, hangs, lies or none")),
    }
}

fn storage(words: &mut Words<'_>) -> Result<StorageKind> {
    match words.take("`nfs` or `one-kernel`")? {
        "one-kernel" => Ok(StorageKind::OneKernel),
        "nfs" => {
            let lease_ms = match words.eat("lease") {
                true => duration_ms(words.take("a duration")?)?,
                false => 10_000,
            };
            Ok(StorageKind::Network { lease_ms })
        }
        other => Err(format!("`{other}` is no storage; write `nfs lease 10s` or `one-kernel`")),
    }
}

/// One name, or all from `web-1..web-4`.
fn range(text: &str) -> Result<Vec<String>> {
    let Some((first, last)) = text.split_once("..") else { return Ok(vec![text.to_owned()]) };
    let bad = || format!("`{text}` is no range; write it like web-1..web-4");
    let split = |name: &str| {
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let (stem, number) = name.split_at(name.len() - digits);
        Some((stem.to_owned(), number.parse::<u64>().ok()?))
    };
    let (Some((stem, from)), Some((other, to))) = (split(first), split(last)) else {
        return Err(bad());
    };
    if stem != other || from > to || to - from >= VMS_MAX as u64 {
        return Err(bad());
    }
    Ok((from..=to).map(|number| format!("{stem}{number}")).collect())
}
