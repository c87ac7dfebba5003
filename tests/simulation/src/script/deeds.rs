//! What happens at a time: commands of `bell`, and faults.

use std::collections::BTreeMap;

use bellwether_types::{ClusterPatch, Failback, RestartLimit, RestartPolicy, Strength};

use super::lines::Known;
use super::words::{Result, Words, duration_ms, memory_mib, number, permille};
use crate::scenario::{Event, Fault, Request, Rules, VmSetup};

/// What a line may say behind its time, for whoever wrote something else.
pub const DEEDS: &str = "bell …, power off, freeze, suspend, cut, kill, hang, crash guest, halt guest, \
                         fill, break storage, jump clock, bad network, disarm";

/// Reads what happens, up to the end of the line.
pub fn deed(words: &mut Words<'_>, known: &mut Known) -> Result<Event> {
    let event = match words.take("what happens")? {
        "bell" => Event::Request(request(words, known)?),
        verb => Event::Fault(fault(verb, words, known)?),
    };
    words.end()?;
    Ok(event)
}

fn fault(verb: &str, words: &mut Words<'_>, known: &Known) -> Result<Fault> {
    let host = |words: &mut Words<'_>| -> Result<(u64, u64)> {
        Ok((known.node(words.take("a node")?)?, words.lasting()?))
    };
    match verb {
        "power" => {
            words.must("off")?;
            let (node, for_ms) = host(words)?;
            Ok(Fault::Power { node, for_ms })
        }
        "freeze" => host(words).map(|(node, for_ms)| Fault::Freeze { node, for_ms }),
        "suspend" => host(words).map(|(node, for_ms)| Fault::Suspend { node, for_ms }),
        "cut" => cut(words, known),
        "kill" => kill(words, known),
        "hang" => hang(words, known),
        "crash" => Ok(Fault::GuestCrash { vm: guest(words, known)? }),
        "halt" => Ok(Fault::GuestShutdown { vm: guest(words, known)? }),
        "fill" => match words.take("`storage` or `runtime`")? {
            "storage" => Ok(Fault::StorageFull { for_ms: words.lasting()? }),
            "runtime" => host(words).map(|(node, for_ms)| Fault::RuntimeFull { node, for_ms }),
            other => Err(format!("`fill {other}`: write `fill storage` or `fill runtime n1`")),
        },
        "break" => {
            words.must("storage")?;
            Ok(Fault::StorageError { for_ms: words.lasting()? })
        }
        "jump" => jump(words, known),
        "bad" => weather(words),
        "disarm" => host(words).map(|(node, for_ms)| Fault::Disarm { node, for_ms }),
        other => Err(format!("`{other}` is nothing that can happen here; write one of: {DEEDS}")),
    }
}

fn guest(words: &mut Words<'_>, known: &Known) -> Result<String> {
    words.must("guest")?;
    known.vm(words.take("a VM")?)
}

fn cut(words: &mut Words<'_>, known: &Known) -> Result<Fault> {
    match words.take("a node, `off` or `storage`")? {
        "storage" => {
            let node = known.node(words.take("a node")?)?;
            Ok(Fault::CutStorage { node, for_ms: words.lasting()? })
        }
        "off" => {
            let mut side = vec![known.node(words.take("a node")?)?];
            while let Some(name) = words.peek().filter(|word| *word != "for") {
                side.push(known.node(name)?);
                words.next();
            }
            Ok(Fault::Split { side, for_ms: words.lasting()? })
        }
        name => {
            let from = known.node(name)?;
            let both = words.eat("from");
            if !both && !words.eat("to") {
                return Err("write `cut n1 from n2` for both ways, `cut n1 to n2` for one, or \
                            `cut off n1`"
                    .to_owned());
            }
            let to = known.node(words.take("a node")?)?;
            Ok(Fault::Cut { from, to, both, for_ms: words.lasting()? })
        }
    }
}

fn kill(words: &mut Words<'_>, known: &Known) -> Result<Fault> {
    match words.take("`agent`, `controller`, `fencer`, `leader` or `vmm`")? {
        "agent" => {
            let node = known.node(words.take("a node")?)?;
            Ok(Fault::KillAgent { node, for_ms: words.lasting()? })
        }
        "fencer" => {
            let node = known.node(words.take("a node")?)?;
            Ok(Fault::KillFencer { node, for_ms: words.lasting()? })
        }
        "controller" => {
            let id = known.controller(words.take("a node")?)?;
            Ok(Fault::KillController { id, for_ms: words.lasting()? })
        }
        "leader" => Ok(Fault::KillLeader { for_ms: words.lasting()? }),
        "vmm" => Ok(Fault::KillVmm { vm: known.vm(words.take("a VM")?)? }),
        other => Err(whom("kill", other)),
    }
}

fn hang(words: &mut Words<'_>, known: &Known) -> Result<Fault> {
    match words.take("`agent`, `controller`, `leader` or `vmm`")? {
        "agent" => {
            let node = known.node(words.take("a node")?)?;
            Ok(Fault::StopAgent { node, for_ms: words.lasting()? })
        }
        "controller" => {
            let id = known.controller(words.take("a node")?)?;
            Ok(Fault::StopController { id, for_ms: words.lasting()? })
        }
        "leader" => Ok(Fault::StopLeader { for_ms: words.lasting()? }),
        "vmm" => {
            let vm = known.vm(words.take("a VM")?)?;
            Ok(Fault::StopVmm { vm, for_ms: words.lasting()? })
        }
        other => Err(whom("hang", other)),
    }
}

fn whom(verb: &str, other: &str) -> String {
    format!(
        "`{verb} {other}`: write `{verb} agent n1`, `{verb} controller n1`, `{verb} leader` or \
         `{verb} vmm NAME`"
    )
}

fn jump(words: &mut Words<'_>, known: &Known) -> Result<Fault> {
    words.must("clock")?;
    let node = known.node(words.take("a node")?)?;
    words.must("by")?;
    let text = words.take("a duration")?;
    let (sign, length) = text.strip_prefix('-').map_or((1, text), |length| (-1, length));
    let length = i64::try_from(duration_ms(length)?).unwrap_or(i64::MAX);
    Ok(Fault::Clock { node, jump_ms: sign * length })
}

fn weather(words: &mut Words<'_>) -> Result<Fault> {
    words.must("network")?;
    let (mut loss_permille, mut repeat_permille, mut extra_ms) = (0, 0, 0);
    while let Some(word) = words.peek().filter(|word| *word != "for") {
        words.next();
        match word {
            "loss" => loss_permille = permille(words.take("a share")?)?,
            "repeats" => repeat_permille = permille(words.take("a share")?)?,
            "delay" => extra_ms = duration_ms(words.take("a duration")?)?,
            other => {
                return Err(format!(
                    "`{other}`: write `bad network loss 5% repeats 5% delay 2s for 20s`"
                ));
            }
        }
    }
    Ok(Fault::Weather { loss_permille, repeat_permille, extra_ms, for_ms: words.lasting()? })
}

fn request(words: &mut Words<'_>, known: &mut Known) -> Result<Request> {
    match (words.take("`vm`, `node` or `cluster`")?, words.take("a command")?) {
        ("vm", verb) => vm_request(verb, words, known),
        ("node", verb) => {
            let node = known.node(words.take("a node")?)?;
            if words.eat("--confirm") {
                words.take("the node's name")?;
            }
            match verb {
                "drain" => Ok(Request::Drain { node }),
                "resume" => Ok(Request::Undrain { node }),
                "confirm-down" => Ok(Request::ConfirmDown { node }),
                "unquarantine" => Ok(Request::Unquarantine { node }),
                other => Err(format!(
                    "`bell node {other}` is not simulated; these are: drain, resume, confirm-down, \
                     unquarantine"
                )),
            }
        }
        ("cluster", "set") => Ok(Request::SetCluster { patch: settings(words)? }),
        (noun, verb) => Err(format!(
            "`bell {noun} {verb}` is not simulated; these are: bell vm …, bell node …, bell cluster set"
        )),
    }
}

fn vm_request(verb: &str, words: &mut Words<'_>, known: &mut Known) -> Result<Request> {
    let name = words.take("a VM")?;
    if verb == "create" {
        let mut vm = VmSetup { start: false, ..VmSetup::new(known.new_vm(name)?) };
        while let Some(word) = words.next() {
            match word.trim_start_matches("--") {
                "memory" => vm.memory_mib = memory_mib(words.take("a size")?)?,
                "vcpus" => vm.vcpus = number(words.take("a number")?)?,
                "start" => vm.start = true,
                "arbiter" => vm.lease_arbiter = arbiter(words.take("an arbiter")?)?,
                option => rule(&mut vm.rules, option, words, known)?,
            }
        }
        return Ok(Request::Create { vm });
    }
    let vm = known.vm(name)?;
    if verb == "set" {
        let mut rules = Rules::default();
        while let Some(word) = words.next() {
            rule(&mut rules, word.trim_start_matches("--"), words, known)?;
        }
        return Ok(Request::SetVm { vm, rules });
    }
    let mut node = None;
    while let Some(word) = words.next() {
        match word {
            "--on" | "--to" => node = Some(known.node(words.take("a node")?)?),
            "--yes" | "-y" | "--no-wait" | "--wait" => {}
            other => return Err(format!("`{other}` is not an option of `bell vm {verb}` here")),
        }
    }
    match verb {
        "start" => Ok(Request::Start { vm, node }),
        "stop" => Ok(Request::Stop { vm }),
        "shutdown" => Ok(Request::Shutdown { vm }),
        "migrate" => Ok(Request::Migrate { vm, node }),
        "save" => Ok(Request::Save { vm }),
        "restore" => Ok(Request::Restore { vm }),
        "delete" => Ok(Request::Delete { vm }),
        "show" => Ok(Request::Show { vm }),
        "pause" => Ok(Request::Pause { vm }),
        "resume" => Ok(Request::Resume { vm }),
        other => Err(format!(
            "`bell vm {other}` is not simulated; these are: create, set, start, stop, shutdown, \
             migrate, save, restore, delete, show, pause, resume"
        )),
    }
}

fn arbiter(word: &str) -> Result<bool> {
    match word {
        "lease" => Ok(true),
        "storage" => Ok(false),
        other => Err(format!("`{other}` is no arbiter; write storage or lease")),
    }
}

/// One rule of a VM: an option of `bell vm set` and its value.
pub fn rule(rules: &mut Rules, option: &str, words: &mut Words<'_>, known: &Known) -> Result<()> {
    let value = words.take("a value")?;
    let nodes = || list(value).into_iter().map(|name| known.node(name)).collect::<Result<Vec<_>>>();
    match option {
        "priority" => rules.priority = Some(number(value)?),
        "restart" => {
            rules.restart = Some(match value {
                "restart" => RestartPolicy::Restart,
                "never" => RestartPolicy::Never,
                _ => return Err(format!("`{value}` is not a policy; write restart or never")),
            });
        }
        "owner" => rules.owners = Some(nodes()?),
        "prefer" => rules.prefer = Some(nodes()?),
        "failback" => {
            let bad = || format!("`{value}`: write never, immediately, or hours in UTC like 22-6");
            rules.failback = Some(Failback::from_word(value).ok_or_else(bad)?);
        }
        "apart" => rules.apart = Some(groups(value)?),
        "after" => {
            let names = list(value).into_iter().map(|name| known.vm(name));
            rules.after = Some(names.collect::<Result<_>>()?);
        }
        "restarts" => rules.restarts = Some(restarts(value)?),
        other => {
            return Err(format!(
                "`{other}` is not a rule of a VM; these are: priority, restart, owner, prefer, \
                 failback, apart, after, restarts"
            ));
        }
    }
    Ok(())
}

/// Settings of the cluster, as options of `bell cluster set`.
pub fn settings(words: &mut Words<'_>) -> Result<ClusterPatch> {
    let mut patch = ClusterPatch::default();
    while let Some(word) = words.next() {
        let value = words.take("a value")?;
        match word.trim_start_matches("--") {
            "reserve-nodes" => patch.reserve_nodes = Some(number(value)?),
            "quarantine-after" => patch.quarantine_exits = Some(number(value)?),
            "quarantine-window" => patch.quarantine_window_s = Some(duration_ms(value)? / 1_000),
            "quarantine-time" => patch.quarantine_s = Some(duration_ms(value)? / 1_000),
            other => {
                return Err(format!(
                    "`{other}` is not a setting; these are: reserve-nodes, quarantine-after, \
                     quarantine-window, quarantine-time"
                ));
            }
        }
    }
    Ok(patch)
}

fn list(text: &str) -> Vec<&str> {
    if text == "none" { Vec::new() } else { text.split(',').collect() }
}

fn groups(text: &str) -> Result<BTreeMap<String, Strength>> {
    let group = |item: &str| {
        let (group, how) = item.split_once(':').unwrap_or((item, ""));
        let strength = Strength::from_word(how).filter(|_| !group.is_empty());
        let strength = strength.ok_or_else(|| {
            format!("`{item}`: write the group and how, like web:hard or web:soft")
        })?;
        Ok((group.to_owned(), strength))
    };
    list(text).into_iter().map(group).collect()
}

fn restarts(text: &str) -> Result<Option<RestartLimit>> {
    if text == "none" {
        return Ok(None);
    }
    let bad = || format!("`{text}` is no limit; write it like 3/10m, or none");
    let (times, period) = text.split_once('/').ok_or_else(bad)?;
    let times = times.parse().map_err(|_| bad())?;
    Ok(Some(RestartLimit { times, period_s: duration_ms(period)? / 1_000 }))
}
