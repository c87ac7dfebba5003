//! What each step does.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;

use super::parse::{Expectation, Value};
use super::run::OwnVm;
use super::{Runner, Step};
use crate::cluster::{self, retry};
use crate::lab::{Lab, STORAGE};

const COMMAND: Duration = Duration::from_secs(60);
/// A guest whose ticks come every 200 ms is silent after so long; hosts that share a processor
/// stand still for a second now and then.
const SILENCE: Duration = Duration::from_secs(8);
const BALLAST: &str = "/export/ballast";

impl Runner<'_> {
    pub fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Vm { vm, node, leased } => self.vm(vm, node.as_deref(), *leased),
            Step::Let { name, value } => self.assign(name, value),
            Step::PowerOff { host } => self.lab.switch_off(&self.name(host)?),
            Step::PowerOn { host } => {
                let host = self.name(host)?;
                self.lab.switch_on(&host)?;
                self.lab.await_boot(&host)
            }
            Step::Freeze { host } => self.lab.freeze(&self.name(host)?),
            Step::Thaw { host } => self.lab.thaw(&self.name(host)?),
            Step::Cut { network, host, direction } => {
                self.lab.cut(*network, &self.name(host)?, *direction)
            }
            Step::Heal { network, host } => self.lab.heal(*network, &self.name(host)?),
            Step::HealAll => self.lab.heal_all(),
            Step::Kill { program, host } => {
                self.each(host, &["pkill", "-KILL", "-x", &process_name(program)])
            }
            Step::Stop { program, host } => self.stop(program, host),
            Step::Start { program, host } => {
                self.each(host, &["systemctl", "start", &format!("bellwether-{program}")])
            }
            Step::Clock { host, seconds } => {
                let host = self.name(host)?;
                let jump = format!("date -s @$(( $(date +%s) + {seconds} ))");
                self.lab.exec_ok(&host, &["sh", "-c", &jump], COMMAND).map(drop)
            }
            Step::FillStorage => {
                let fill = format!("dd if=/dev/zero of={BALLAST} bs=1M; true");
                self.lab.exec_ok(STORAGE, &["sh", "-c", &fill], COMMAND).map(drop)
            }
            Step::FreeStorage => {
                self.lab.exec_ok(STORAGE, &["rm", "-f", BALLAST], COMMAND).map(drop)
            }
            Step::RestartNfs => self
                .lab
                .exec_ok(STORAGE, &["systemctl", "restart", "nfs-server"], COMMAND)
                .map(drop),
            Step::Migrate { vm, to, waits } => self.migrate(vm, to.as_deref(), *waits),
            Step::Save { vm } => self.order_vm("save", vm),
            Step::Restore { vm } => self.order_vm("restore", vm),
            Step::Drain { node } => self.drain(node),
            Step::Resume { node } => {
                let (node, from) = (self.name(node)?, cluster::any_well(self.lab)?);
                cluster::bell(self.lab, &from, &["node", "resume", &node]).map(drop)
            }
            Step::Reboot { host } => {
                let host = self.name(host)?;
                self.lab.reboot(&host)
            }
            Step::Watchdog { host, way } => {
                let hosts = self.names(host)?;
                hosts.iter().try_for_each(|host| cluster::set_watchdog(self.lab, host, *way))
            }
            Step::Switch { host, manner } => {
                let hosts = self.names(host)?;
                hosts.iter().try_for_each(|host| cluster::set_switch(self.lab, host, *manner))
            }
            Step::Hang { host } => self.lab.hang(&self.name(host)?),
            Step::Wait { time } => self.wait(*time),
            Step::Expect { what, within } => self.expect(what, *within),
        }
    }

    /// What steps of this scenario may have left: stopped programs, a full disk, false clocks.
    pub(super) fn undo(&mut self) -> Result<()> {
        self.lab.exec_ok(STORAGE, &["rm", "-f", BALLAST], COMMAND)?;
        for node in self.lab.nodes() {
            cluster::set_switch(self.lab, &node, None)?;
            self.lab.set_clock(&node)?;
            let units = ["bellwether-controller", "bellwether-agent"];
            self.lab.exec_ok(&node, &[&["systemctl", "start"][..], &units].concat(), COMMAND)?;
        }
        Ok(())
    }

    fn name(&self, word: &str) -> Result<String> {
        match word.strip_prefix('$') {
            None => Ok(word.to_owned()),
            Some(name) => self
                .names
                .get(name)
                .cloned()
                .with_context(|| format!("no `let {name} = …` came before")),
        }
    }

    /// `all` means every node.
    fn names(&self, word: &str) -> Result<Vec<String>> {
        match word {
            "all" => Ok(self.lab.nodes()),
            word => Ok(vec![self.name(word)?]),
        }
    }

    fn each(&mut self, hosts: &str, argv: &[&str]) -> Result<()> {
        let hosts = self.names(hosts)?;
        hosts.iter().try_for_each(|host| self.lab.exec_ok(host, argv, COMMAND).map(drop))
    }

    /// Without leave to end in order, and it does not come back by itself.
    fn stop(&mut self, program: &str, hosts: &str) -> Result<()> {
        let unit = format!("bellwether-{program}");
        let stop =
            format!("systemctl kill --kill-who=main --signal=KILL {unit}; systemctl stop {unit}");
        self.each(hosts, &["sh", "-c", &stop])
    }

    fn vm(&mut self, vm: &str, node: Option<&str>, leased: bool) -> Result<()> {
        let id = cluster::create_vm(self.lab, vm, leased)?;
        self.vms.insert(vm.to_owned(), OwnVm { id, boots: 0 });
        self.await_tick(vm, COMMAND)?;
        if let Some(node) = node {
            let node = self.name(node)?;
            if cluster::vm(self.lab, vm)?["node"] != node.as_str() {
                self.migrate(vm, Some(&node), true)?;
                self.await_tick(vm, COMMAND)?;
            }
        }
        Ok(())
    }

    fn assign(&mut self, name: &str, value: &Value) -> Result<()> {
        let found = match value {
            Value::NodeOf { vm } => {
                let vm = cluster::vm(self.lab, vm)?;
                vm["node"].as_str().context("it has no node")?.to_owned()
            }
            Value::Leader => cluster::leader(self.lab)?,
            Value::OtherThan { hosts } => {
                let not: Vec<String> =
                    hosts.iter().map(|host| self.name(host)).collect::<Result<_>>()?;
                let nodes = self.lab.nodes();
                nodes.into_iter().find(|node| !not.contains(node)).context("there is no other")?
            }
        };
        self.lab.note(&format!("${name} is {found}"));
        self.names.insert(name.to_owned(), found);
        Ok(())
    }

    fn migrate(&mut self, vm: &str, to: Option<&str>, waits: bool) -> Result<()> {
        let from = cluster::any_well(self.lab)?;
        let mut words = vec!["vm", "migrate", vm];
        if !waits {
            words.push("--no-wait");
        }
        let to = to.map(|node| self.name(node)).transpose()?;
        if let Some(node) = &to {
            words.extend(["--to", node]);
        }
        cluster::bell_within(self.lab, &from, &words, 2 * COMMAND).map(drop)
    }

    fn order_vm(&mut self, verb: &str, vm: &str) -> Result<()> {
        let from = cluster::any_well(self.lab)?;
        cluster::bell_within(self.lab, &from, &["vm", verb, vm], 2 * COMMAND).map(drop)
    }

    /// Waits until no VM is left on it.
    fn drain(&mut self, node: &str) -> Result<()> {
        let (node, from) = (self.name(node)?, cluster::any_well(self.lab)?);
        cluster::bell_within(self.lab, &from, &["node", "drain", &node], 3 * COMMAND).map(drop)
    }

    /// Time passes; a scenario may ask for that.
    fn wait(&mut self, time: Duration) -> Result<()> {
        let (_never, pace) = std::sync::mpsc::channel::<()>();
        let _ = pace.recv_timeout(time);
        Ok(())
    }

    pub(super) fn await_tick(&mut self, vm: &str, limit: Duration) -> Result<()> {
        let since = self.lab.timeline.now();
        let own = self.vms.get(vm).with_context(|| format!("this scenario has no VM {vm}"))?;
        let ticks = self.lab.watch.wait(&own.id, limit, |vm| vm.last_tick() > Some(since));
        ensure!(ticks, "VM {vm} printed nothing for {} s", limit.as_secs());
        Ok(())
    }

    fn expect(&mut self, what: &Expectation, within: Duration) -> Result<()> {
        let timeline = self.lab.timeline.clone();
        let until = |what: &str, lab: &mut Lab, is_so: &mut dyn FnMut(&mut Lab) -> Result<bool>| {
            retry(&timeline, what, within, || Ok(is_so(lab)?.then_some(())))
        };
        match what {
            Expectation::Runs { vm, on, not_on } => {
                self.runs(vm, on.as_deref(), not_on.as_deref(), within)
            }
            Expectation::State { vm, state } => until("that state", self.lab, &mut |lab| {
                has(&cluster::vm(lab, vm)?, "state", state)
            }),
            Expectation::NodeState { node, state } => {
                let node = self.name(node)?;
                until("that state", self.lab, &mut |lab| {
                    let phase = cluster::node_phase(lab, &node)?;
                    ensure!(phase == *state, "node {node} is {phase}");
                    Ok(true)
                })
            }
            Expectation::Event { text } => {
                let after = self.last_event;
                until("that event", self.lab, &mut |lab| {
                    let events = cluster::events(lab, after)?;
                    let mut texts = events.iter().filter_map(|event| event["text"].as_str());
                    Ok(texts.any(|found| found.contains(text)))
                })
            }
            Expectation::Leader => {
                until("a leader", self.lab, &mut |lab| cluster::leader(lab).map(|_| true))
            }
            Expectation::Proof { vm, proof } => until("that proof", self.lab, &mut |lab| {
                has(&cluster::vm(lab, vm)?, "fence_proof", proof)
            }),
            Expectation::Waits { vm, text } => until("that reason", self.lab, &mut |lab| {
                let pending = cluster::vm(lab, vm)?["pending"].as_str().unwrap_or("").to_owned();
                ensure!(pending.contains(text), "the reason is `{pending}`");
                Ok(true)
            }),
            Expectation::Yields { node, proof, yields } => {
                let node = self.name(node)?;
                until("that promise", self.lab, &mut |lab| {
                    let found = cluster::proof_outlook(lab, &node, proof)?;
                    ensure!(found["after_ms"].is_u64() == *yields, "it says {found}");
                    Ok(true)
                })
            }
            Expectation::WatchdogFired { host, before } => {
                self.watchdog_fired(&self.name(host)?, before.as_deref(), within)
            }
            Expectation::WatchdogQuiet { host } => {
                let (host, since) = (self.name(host)?, self.first_fault);
                let fired = self.lab.watchdog_fired(&host)?;
                let count = fired.iter().filter(|at| Some(**at) > since).count();
                ensure!(count == 0, "the watchdog of {host} has fired");
                Ok(())
            }
            Expectation::Ticks { vm } => self.await_tick(vm, within),
            Expectation::KeepsTicking { vm } => self.keeps_ticking(vm, within),
            Expectation::Silent { vm, host } => self.silent(vm, &self.name(host)?, within),
            Expectation::NeverRebooted { vm } => self.never_rebooted(vm),
            Expectation::Intact { vm } => self.intact(vm),
            Expectation::NoIoErrors { vm } => {
                let errors = self.lab.watch.vm(&self.own(vm)?.id).io_errors;
                ensure!(errors == 0, "the guest of {vm} was told of {errors} failed requests");
                Ok(())
            }
        }
    }

    /// The cluster says so, and the guest ticks.
    fn runs(
        &mut self,
        vm: &str,
        on: Option<&str>,
        not_on: Option<&str>,
        within: Duration,
    ) -> Result<()> {
        let timeline = self.lab.timeline.clone();
        let on = on.map(|node| self.name(node)).transpose()?;
        let not_on = not_on.map(|node| self.name(node)).transpose()?;
        let lab = &mut *self.lab;
        retry(&timeline, "that VM to run there", within, || {
            let vm = cluster::vm(lab, vm)?;
            Ok(is_running(&vm, on.as_deref(), not_on.as_deref())?.then_some(()))
        })?;
        self.await_tick(vm, within)
    }

    fn own(&self, vm: &str) -> Result<&OwnVm> {
        self.vms.get(vm).with_context(|| format!("this scenario has no VM {vm}"))
    }

    fn watchdog_fired(&mut self, host: &str, before: Option<&str>, within: Duration) -> Result<()> {
        let (timeline, since) = (self.lab.timeline.clone(), self.first_fault);
        let what = format!("the watchdog of {host} to fire");
        let lab = &mut *self.lab;
        let fired = retry(&timeline, &what, within, || {
            let fired = lab.watchdog_fired(host)?;
            Ok(fired.into_iter().find(|at| Some(*at) > since))
        })?;
        let Some(vm) = before else { return Ok(()) };
        let heard = self.lab.watch.vm(&self.own(vm)?.id);
        let elsewhere = heard.incarnations.iter().filter(|((name, _), _)| name != host);
        let mut first =
            elsewhere.filter_map(|(_, it)| it.first_tick.filter(|at| Some(*at) > since));
        match first.find(|at| *at < fired) {
            Some(at) => bail!(
                "VM {vm} ran elsewhere {:.1} s before the watchdog of {host} had fired",
                (fired - at).as_secs_f64()
            ),
            None => Ok(()),
        }
    }

    fn keeps_ticking(&mut self, vm: &str, time: Duration) -> Result<()> {
        let end = self.lab.timeline.now() + time;
        while self.lab.timeline.now() < end {
            self.await_tick(vm, SILENCE)?;
        }
        Ok(())
    }

    fn silent(&mut self, vm: &str, host: &str, time: Duration) -> Result<()> {
        let since = self.lab.timeline.now();
        let id = self.own(vm)?.id.clone();
        let ticked = self.lab.watch.wait(&id, time, |vm| vm.last_tick_on(host) > Some(since));
        ensure!(!ticked, "a guest of VM {vm} ran on {host}");
        Ok(())
    }

    fn never_rebooted(&mut self, vm: &str) -> Result<()> {
        let own = self.own(vm)?;
        let boots = self.lab.watch.vm(&own.id).boots();
        ensure!(
            boots <= own.boots.max(1),
            "the guest of {vm} booted {} times more",
            boots - own.boots
        );
        Ok(())
    }

    /// While it runs: the newest record may still be under way, so only older ones are judged.
    fn intact(&mut self, vm: &str) -> Result<()> {
        let sectors = cluster::read_journal(self.lab, vm)?;
        let journal = crate::journal::Journal::judge(&sectors, 0);
        match journal.faults.first() {
            None => Ok(()),
            Some(fault) => bail!("the disk of VM {vm}: {fault}"),
        }
    }
}

/// The kernel keeps 15 characters of a process's name.
fn process_name(program: &str) -> String {
    format!("bellwether-{program}").chars().take(15).collect()
}

fn has(value: &Json, key: &str, expected: &str) -> Result<bool> {
    let found = value[key].as_str().unwrap_or_default();
    ensure!(found == expected, "its {key} is {found}: {}", value["reason"]);
    Ok(true)
}

fn is_running(vm: &Json, on: Option<&str>, not_on: Option<&str>) -> Result<bool> {
    let (state, node) = (&vm["state"], vm["node"].as_str().unwrap_or_default());
    let there = on.is_none_or(|on| node == on) && not_on.is_none_or(|not_on| node != not_on);
    ensure!(state == "running" && there, "it is {state} on `{node}`; {}", vm["pending"]);
    Ok(true)
}
