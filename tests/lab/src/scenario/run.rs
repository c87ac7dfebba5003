//! Running a scenario: one step after the other, and what must hold at the end of every one.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Line, Scenario, Step, WatchdogWay};
use crate::cluster;
use crate::failover::{self, Failover};
use crate::journal::Journal;
use crate::lab::Lab;

/// How one scenario went.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub scenario: String,
    pub passed: bool,
    pub seconds: f64,
    /// What did not hold, with the step.
    pub failure: Option<String>,
    pub steps: Vec<Timing>,
    pub vms: Vec<VmReport>,
    pub failovers: Vec<Failover>,
}

/// When a step was done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Timing {
    pub step: String,
    /// How long it took.
    pub seconds: f64,
    /// Since the first fault of the scenario, at its end.
    pub after_fault: Option<f64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmReport {
    pub vm: String,
    /// The longest time without a tick since the first fault.
    pub longest_silence_s: f64,
    pub boots: usize,
    pub records: u64,
    pub acknowledged: u64,
    pub io_errors: u64,
    pub faults: Vec<String>,
}

/// A VM of the scenario.
pub(super) struct OwnVm {
    pub id: String,
    /// Boots heard before the first fault.
    pub boots: usize,
}

pub struct Runner<'a> {
    pub(super) lab: &'a mut Lab,
    pub(super) vms: BTreeMap<String, OwnVm>,
    pub(super) names: BTreeMap<String, String>,
    pub(super) first_fault: Option<Duration>,
    pub(super) last_event: u64,
}

/// How long the cluster may take to be whole again after a scenario.
const SETTLE: Duration = Duration::from_secs(180);

impl<'a> Runner<'a> {
    pub fn new(lab: &'a mut Lab) -> Self {
        Self { lab, vms: BTreeMap::new(), names: BTreeMap::new(), first_fault: None, last_event: 0 }
    }

    pub fn lab(&mut self) -> &mut Lab {
        self.lab
    }

    /// Runs the scenario, heals everything, and judges the disks.
    pub fn run(mut self, scenario: &Scenario) -> Report {
        let started = self.lab.timeline.now();
        self.lab.note(&format!("scenario {} begins", scenario.name));
        let mut steps = Vec::new();
        let mut failure = self.steps(&scenario.lines, &mut steps).err();
        let (mut vms, mut failovers) = (Vec::new(), Vec::new());
        match self.settle(&mut vms, &mut failovers) {
            Ok(()) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
        let failure = failure.map(|error| format!("{error:#}"));
        let verdict = failure.as_deref().unwrap_or("passed");
        self.lab.note(&format!("scenario {} ends: {verdict}", scenario.name));
        Report {
            scenario: scenario.name.clone(),
            passed: failure.is_none(),
            seconds: (self.lab.timeline.now() - started).as_secs_f64(),
            failure,
            steps,
            vms,
            failovers,
        }
    }

    fn steps(&mut self, lines: &[Line], timings: &mut Vec<Timing>) -> Result<()> {
        let events = cluster::events(self.lab, 0)?;
        self.last_event =
            events.iter().filter_map(|event| event["seq"].as_u64()).max().unwrap_or(0);
        for line in lines {
            let started = self.lab.timeline.now();
            self.lab.note(&format!("step {}: {}", line.number, line.text));
            if line.step.is_fault() && self.first_fault.is_none() {
                self.fault_begins(started);
            }
            let done = self.step(&line.step);
            let now = self.lab.timeline.now();
            timings.push(Timing {
                step: line.text.clone(),
                seconds: (now - started).as_secs_f64(),
                after_fault: self.first_fault.map(|fault| (now - fault).as_secs_f64()),
            });
            done.with_context(|| format!("line {}, `{}`", line.number, line.text))?;
        }
        Ok(())
    }

    fn fault_begins(&mut self, now: Duration) {
        self.first_fault = Some(now);
        for own in self.vms.values_mut() {
            own.boots = self.lab.watch.vm(&own.id).boots();
            self.lab.watch.forget_silence(&own.id);
        }
    }

    /// Heals what is broken, waits until every VM ticks again, and judges what they wrote.
    fn settle(&mut self, reports: &mut Vec<VmReport>, failovers: &mut Vec<Failover>) -> Result<()> {
        self.lab.note("settle: heal everything");
        self.lab.heal_all()?;
        self.undo()?;
        let nodes = self.lab.nodes();
        cluster::await_online(self.lab, nodes.len(), SETTLE)?;
        let vms: Vec<String> = self.vms.keys().cloned().collect();
        for vm in &vms {
            self.await_tick(vm, SETTLE).with_context(|| format!("after healing, VM {vm}"))?;
        }
        *failovers = self.failovers()?;
        for vm in &vms {
            let report = self.judge(vm)?;
            self.lab.note(&format!("judged: {report:?}"));
            let faults = report.faults.join("; ");
            reports.push(report);
            if !faults.is_empty() {
                bail!("the disk of VM {vm}: {faults}");
            }
            cluster::delete_vm(self.lab, vm)?;
        }
        // One that could not even be made must not stand in the way of the next scenario.
        cluster::delete_leftovers(self.lab)?;
        // Not before: a fencer disarms no watchdog on which a VM depends.
        nodes.iter().try_for_each(|node| cluster::set_watchdog(self.lab, node, WatchdogWay::Off))
    }

    fn failovers(&mut self) -> Result<Vec<Failover>> {
        let Some(fault) = self.first_fault else { return Ok(Vec::new()) };
        let events = cluster::events(self.lab, self.last_event)?;
        let tasks = cluster::tasks(self.lab)?;
        let timeline = self.lab.timeline.clone();
        let own = |task: &serde_json::Value| {
            let vm = self.vms.values().find(|own| task["vm_id"] == own.id.as_str())?;
            let heard = self.lab.watch.vm(&vm.id);
            failover::measure(task, &events, &heard, fault, &timeline)
        };
        let found: Vec<Failover> = tasks.iter().filter_map(own).collect();
        found.iter().for_each(|failover| self.lab.note(&failover.to_string()));
        Ok(found)
    }

    fn judge(&mut self, vm: &str) -> Result<VmReport> {
        let sectors = cluster::take_journal(self.lab, vm)?;
        let heard = self.lab.watch.vm(&self.vms[vm].id);
        let journal = Journal::judge(&sectors, heard.acknowledged);
        let mut faults: Vec<String> = journal.faults.iter().map(ToString::to_string).collect();
        faults.extend(heard.fatal.iter().map(|line| format!("the guest said {line}")));
        if journal.records == 0 {
            faults.push("no record was written at all".to_owned());
        }
        Ok(VmReport {
            vm: vm.to_owned(),
            longest_silence_s: heard.longest_silence.as_secs_f64(),
            boots: heard.boots(),
            records: journal.records,
            acknowledged: heard.acknowledged,
            io_errors: heard.io_errors,
            faults,
        })
    }
}

impl Report {
    /// For people.
    pub fn line(&self) -> String {
        let verdict = if self.passed { "passed" } else { "FAILED" };
        let mut text = format!("{verdict}  {:<24} {:>6.1} s", self.scenario, self.seconds);
        for vm in &self.vms {
            text += &format!(
                "  {}: silent {:.1} s, {} boots, {} records",
                vm.vm, vm.longest_silence_s, vm.boots, vm.records
            );
        }
        for failover in &self.failovers {
            text += &format!("\n        {failover}");
        }
        if let Some(failure) = &self.failure {
            text += &format!("\n        {failure}");
        }
        text
    }
}

impl Step {
    /// Steps that break something; times are counted from the first one.
    fn is_fault(&self) -> bool {
        !matches!(
            self,
            Self::Vm { .. }
                | Self::Let { .. }
                | Self::Wait { .. }
                | Self::Expect { .. }
                | Self::Watchdog { .. }
                | Self::Switch { .. }
        )
    }
}
