//! Events in the words of a scenario file, so that what a seed was minimised to can be pasted into one.

use std::fmt;

use bellwether_types::{ClusterPatch, RestartPolicy};

use super::words::{FOREVER_MS, duration, memory};
use crate::scenario::{Event, Fault, Request, Rules, Timed, VmSetup};

impl fmt::Display for Timed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {:<8} ", duration(self.at_ms))?;
        match &self.event {
            Event::Request(request) => write!(f, "{request}"),
            Event::Fault(fault) => write!(f, "{fault}"),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |option: &str, node: &Option<u64>| {
            node.map_or_else(String::new, |node| format!(" --{option} n{node}"))
        };
        match self {
            Self::Create { vm } => {
                let start = if vm.start { " --start" } else { "" };
                write!(f, "bell vm create {}{}{start}", vm.name, options(vm))
            }
            Self::Start { vm, node } => write!(f, "bell vm start {vm}{}", at("on", node)),
            Self::Stop { vm } => write!(f, "bell vm stop {vm}"),
            Self::Shutdown { vm } => write!(f, "bell vm shutdown {vm}"),
            Self::Migrate { vm, node } => write!(f, "bell vm migrate {vm}{}", at("to", node)),
            Self::Save { vm } => write!(f, "bell vm save {vm}"),
            Self::Restore { vm } => write!(f, "bell vm restore {vm}"),
            Self::Delete { vm } => write!(f, "bell vm delete {vm}"),
            Self::Show { vm } => write!(f, "bell vm show {vm}"),
            Self::Pause { vm } => write!(f, "bell vm pause {vm}"),
            Self::Resume { vm } => write!(f, "bell vm resume {vm}"),
            Self::SetVm { vm, rules } => write!(f, "bell vm set {vm}{rules}"),
            Self::Drain { node } => write!(f, "bell node drain n{node}"),
            Self::Undrain { node } => write!(f, "bell node resume n{node}"),
            Self::ConfirmDown { node } => write!(f, "bell node confirm-down n{node}"),
            Self::Unquarantine { node } => write!(f, "bell node unquarantine n{node}"),
            Self::SetCluster { patch } => write!(f, "bell cluster set{}", settings(patch)),
        }
    }
}

fn options(vm: &VmSetup) -> String {
    let arbiter = if vm.lease_arbiter { " --arbiter lease" } else { "" };
    format!(" --memory {} --vcpus {}{arbiter}{}", memory(vm.memory_mib), vm.vcpus, vm.rules)
}

fn settings(patch: &ClusterPatch) -> String {
    let number = |option: &str, value: Option<u32>| {
        value.map(|value| format!(" --{option} {value}")).unwrap_or_default()
    };
    let time = |option: &str, seconds: Option<u64>| {
        let written = |seconds| format!(" --{option} {}", duration(seconds * 1_000));
        seconds.map(written).unwrap_or_default()
    };
    [
        number("reserve-nodes", patch.reserve_nodes),
        number("quarantine-after", patch.quarantine_exits),
        time("quarantine-window", patch.quarantine_window_s),
        time("quarantine-time", patch.quarantine_s),
    ]
    .concat()
}

fn listed(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    if items.is_empty() { "none".to_owned() } else { items.join(",") }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = |numbers: &[u64]| listed(numbers.iter().map(|it| format!("n{it}")));
        if let Some(priority) = self.priority {
            write!(f, " --priority {priority}")?;
        }
        if let Some(policy) = self.restart {
            let word = if policy == RestartPolicy::Restart { "restart" } else { "never" };
            write!(f, " --restart {word}")?;
        }
        if let Some(owners) = &self.owners {
            write!(f, " --owner {}", nodes(owners))?;
        }
        if let Some(prefer) = &self.prefer {
            write!(f, " --prefer {}", nodes(prefer))?;
        }
        if let Some(failback) = self.failback {
            write!(f, " --failback {failback}")?;
        }
        if let Some(apart) = &self.apart {
            let groups = apart.iter().map(|(group, how)| format!("{group}:{}", how.as_str()));
            write!(f, " --apart {}", listed(groups))?;
        }
        if let Some(after) = &self.after {
            write!(f, " --after {}", listed(after.iter().cloned()))?;
        }
        match self.restarts {
            Some(Some(limit)) => {
                write!(f, " --restarts {}/{}", limit.times, duration(limit.period_s * 1_000))
            }
            Some(None) => write!(f, " --restarts none"),
            None => Ok(()),
        }
    }
}

fn lasting(for_ms: u64) -> String {
    match for_ms {
        FOREVER_MS => String::new(),
        for_ms => format!(" for {}", duration(for_ms)),
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Power { node, for_ms } => write!(f, "power off n{node}{}", lasting(*for_ms)),
            Self::Freeze { node, for_ms } => write!(f, "freeze n{node}{}", lasting(*for_ms)),
            Self::Suspend { node, for_ms } => write!(f, "suspend n{node}{}", lasting(*for_ms)),
            Self::CutStorage { node, for_ms } => {
                write!(f, "cut storage n{node}{}", lasting(*for_ms))
            }
            Self::RuntimeFull { node, for_ms } => {
                write!(f, "fill runtime n{node}{}", lasting(*for_ms))
            }
            Self::Disarm { node, for_ms } => write!(f, "disarm n{node}{}", lasting(*for_ms)),
            Self::Cut { from, to, both, for_ms } => {
                let word = if *both { "from" } else { "to" };
                write!(f, "cut n{from} {word} n{to}{}", lasting(*for_ms))
            }
            Self::Split { side, for_ms } => {
                let side: Vec<String> = side.iter().map(|node| format!("n{node}")).collect();
                write!(f, "cut off {}{}", side.join(" "), lasting(*for_ms))
            }
            Self::Weather { loss_permille, repeat_permille, extra_ms, for_ms } => {
                let share = |permille: &u32| format!("{}.{}%", permille / 10, permille % 10);
                let (loss, repeats) = (share(loss_permille), share(repeat_permille));
                let delay = duration(*extra_ms);
                let lasting = lasting(*for_ms);
                write!(f, "bad network loss {loss} repeats {repeats} delay {delay}{lasting}")
            }
            Self::StorageFull { for_ms } => write!(f, "fill storage{}", lasting(*for_ms)),
            Self::StorageError { for_ms } => write!(f, "break storage{}", lasting(*for_ms)),
            Self::Clock { node, jump_ms } => {
                let sign = if *jump_ms < 0 { "-" } else { "" };
                write!(f, "jump clock n{node} by {sign}{}", duration(jump_ms.unsigned_abs()))
            }
            processes => write_process_fault(processes, f),
        }
    }
}

fn write_process_fault(fault: &Fault, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let (deed, for_ms) = match fault {
        Fault::KillAgent { node, for_ms } => (format!("kill agent n{node}"), *for_ms),
        Fault::KillFencer { node, for_ms } => (format!("kill fencer n{node}"), *for_ms),
        Fault::KillController { id, for_ms } => (format!("kill controller n{id}"), *for_ms),
        Fault::KillLeader { for_ms } => ("kill leader".to_owned(), *for_ms),
        Fault::KillVmm { vm } => (format!("kill vmm {vm}"), FOREVER_MS),
        Fault::StopAgent { node, for_ms } => (format!("hang agent n{node}"), *for_ms),
        Fault::StopController { id, for_ms } => (format!("hang controller n{id}"), *for_ms),
        Fault::StopLeader { for_ms } => ("hang leader".to_owned(), *for_ms),
        Fault::StopVmm { vm, for_ms } => (format!("hang vmm {vm}"), *for_ms),
        Fault::GuestCrash { vm } => (format!("crash guest {vm}"), FOREVER_MS),
        Fault::GuestShutdown { vm } => (format!("halt guest {vm}"), FOREVER_MS),
        _ => (String::new(), FOREVER_MS),
    };
    write!(f, "{deed}{}", lasting(for_ms))
}
