//! What faults do to the world, and how each of them ends.

use std::rc::Rc;

use bellwether_types::{BootId, NodeId};

use crate::kernel::{HostId, MS, ProcId};
use crate::net::Weather;
use crate::scenario::Fault;
use crate::world::Shared;
use crate::{agent, controller, fencer, vmm};

/// Lets a fault happen now, and end after its time.
pub fn inject(world: &Shared, fault: &Fault) {
    world.hit("fault", fault.kind());
    world.say("fault", fault.to_string());
    match fault.clone() {
        Fault::Power { node, for_ms } => {
            power_off(world, node);
            later(world, for_ms, move |world| power_on(world, node));
        }
        Fault::Freeze { node, for_ms } => freeze(world, node, for_ms, false),
        Fault::Suspend { node, for_ms } => freeze(world, node, for_ms, true),
        Fault::KillAgent { node, for_ms } => {
            agent::kill(world, NodeId(node));
            later(world, for_ms, move |world| start_agent(world, node));
        }
        Fault::KillController { id, for_ms } => {
            controller::kill(world, id);
            later(world, for_ms, move |world| start_controller(world, id));
        }
        Fault::StopAgent { node, for_ms } => {
            let process = world.agents.borrow().get(&NodeId(node)).copied();
            stop(world, process, for_ms);
        }
        Fault::StopController { id, for_ms } => {
            let process = world.controllers.borrow().get(&id).copied();
            stop(world, process, for_ms);
        }
        Fault::KillLeader { for_ms } => {
            let Some(id) = world.leader.get() else { return };
            controller::kill(world, id);
            later(world, for_ms, move |world| start_controller(world, id));
        }
        Fault::StopLeader { for_ms } => {
            let leader = world.leader.get();
            let process = leader.and_then(|id| world.controllers.borrow().get(&id).copied());
            stop(world, process, for_ms);
        }
        Fault::RuntimeFull { node, for_ms } => {
            world.runtime(NodeId(node), |runtime| runtime.full = true);
            later(world, for_ms, move |world| {
                world.runtime(NodeId(node), |runtime| runtime.full = false);
            });
        }
        Fault::KillFencer { node, for_ms } => {
            fencer::kill(world, NodeId(node));
            later(world, for_ms, move |world| start_fencer(world, node));
        }
        Fault::Disarm { node, for_ms } => {
            fencer::disarm(world, NodeId(node));
            later(world, for_ms, move |world| start_fencer(world, node));
        }
        Fault::Clock { node, jump_ms } => {
            world.kernel.change_host(HostId(node), |host| host.wall_ahead_ms += jump_ms);
        }
        fault => inject_further(world, fault),
    }
}

fn inject_further(world: &Shared, fault: Fault) {
    match fault {
        Fault::KillVmm { vm } => end_guest(world, &vm, None),
        Fault::GuestCrash { vm } => end_guest(world, &vm, Some("triple-fault")),
        Fault::GuestShutdown { vm } => end_guest(world, &vm, Some("guest-shutdown")),
        Fault::StopVmm { vm, for_ms } => {
            let process = world.find_vm(&vm).and_then(|vm| world.runner(vm));
            stop(world, process, for_ms);
        }
        Fault::Cut { from, to, both, for_ms } => {
            cut(world, from, to, for_ms);
            if both {
                cut(world, to, from, for_ms);
            }
        }
        Fault::Split { side, for_ms } => {
            let all = 1..=world.cluster.nodes;
            for other in all.filter(|other| !side.contains(other)) {
                for one in &side {
                    cut(world, *one, other, for_ms);
                    cut(world, other, *one, for_ms);
                }
            }
        }
        Fault::CutStorage { node, for_ms } => {
            world.storage.cut(HostId(node));
            later(world, for_ms, move |world| world.storage.mend(HostId(node)));
        }
        Fault::Weather { loss_permille, repeat_permille, extra_ms, for_ms } => {
            let extra_ns = extra_ms * MS;
            world.net.set_weather(Weather { loss_permille, repeat_permille, extra_ns });
            later(world, for_ms, |world| world.net.set_weather(Weather::default()));
        }
        Fault::StorageFull { for_ms } => {
            world.storage.server(|server| server.full = true);
            later(world, for_ms, |world| world.storage.server(|server| server.full = false));
        }
        Fault::StorageError { for_ms } => {
            world.storage.server(|server| server.failing = true);
            later(world, for_ms, |world| world.storage.server(|server| server.failing = false));
        }
        _ => {}
    }
}

fn later(world: &Shared, for_ms: u64, undo: impl FnOnce(&Shared) + 'static) {
    let world = Rc::clone(world);
    let kernel = world.kernel.clone();
    kernel.after(for_ms * MS, move |_| undo(&world));
}

/// Everything is well again.
pub fn heal(world: &Shared) {
    world.say("heal", "all faults end");
    world.healed.set(true);
    world.net.mend_all();
    world.storage.server(|server| (server.full, server.failing) = (false, false));
    for node in 1..=world.cluster.nodes.max(world.cluster.controllers) {
        let host = HostId(node);
        world.storage.mend(host);
        if world.kernel.is_frozen(host) {
            thaw(world, node);
        }
        world.runtime(NodeId(node), |runtime| runtime.full = false);
        for process in world.kernel.processes_on(host) {
            world.kernel.pause_process(process, false);
        }
        power_on(world, node);
        start_controller(world, node);
        start_agent(world, node);
        start_fencer(world, node);
    }
}

pub fn power_off(world: &Shared, node: u64) {
    let host = HostId(node);
    if !world.kernel.is_up(host) {
        return;
    }
    world.kernel.change_host(host, |host| {
        (host.up, host.frozen, host.suspended_since) = (false, false, None);
    });
    controller::kill(world, node);
    agent::kill(world, NodeId(node));
    fencer::kill(world, NodeId(node));
    world.watchdogs.borrow_mut().remove(&NodeId(node));
    let vmms = world.kernel.processes_on(host);
    for process in &vmms {
        world.kernel.end_process(*process);
        world.vmm_vanished(*process);
    }
    world.storage.power_lost(host, &vmms);
}

pub fn power_on(world: &Shared, node: u64) {
    let host = HostId(node);
    world.switched_off.borrow_mut().remove(&NodeId(node));
    if world.kernel.is_up(host) {
        return;
    }
    let boot_id = BootId::from_uuid(world.chance.borrow_mut().uuid());
    let now = world.kernel.now();
    world.kernel.change_host(host, |host| {
        (host.up, host.boot_id, host.booted_at, host.suspended_ns) = (true, boot_id, now, 0);
    });
    // The runtime directory lives as long as a boot.
    world.runtimes.borrow_mut().remove(&NodeId(node));
    world.storage.mount(host, boot_id);
    start_controller(world, node);
    start_agent(world, node);
    start_fencer(world, node);
}

fn start_fencer(world: &Shared, node: u64) {
    let there = world.fencers.borrow().get(&NodeId(node)).is_some_and(|it| world.kernel.lives(*it));
    if node <= world.cluster.nodes && world.kernel.is_up(HostId(node)) && !there {
        fencer::start(world, NodeId(node));
    }
}

fn start_agent(world: &Shared, node: u64) {
    let there = world.agents.borrow().get(&NodeId(node)).is_some_and(|it| world.kernel.lives(*it));
    if node <= world.cluster.nodes && world.kernel.is_up(HostId(node)) && !there {
        agent::start(world, NodeId(node));
    }
}

fn start_controller(world: &Shared, id: u64) {
    let there = world.controllers.borrow().get(&id).is_some_and(|it| world.kernel.lives(*it));
    if id <= world.cluster.controllers && world.kernel.is_up(HostId(id)) && !there {
        controller::start(world, id);
    }
}

fn freeze(world: &Shared, node: u64, for_ms: u64, suspended: bool) {
    let host = HostId(node);
    if !world.kernel.is_up(host) || world.kernel.is_frozen(host) {
        return;
    }
    let since = suspended.then(|| world.kernel.now());
    world.kernel.change_host(host, |host| (host.frozen, host.suspended_since) = (true, since));
    world.storage.silence(host);
    later(world, for_ms, move |world| thaw(world, node));
}

fn thaw(world: &Shared, node: u64) {
    world.kernel.thaw(HostId(node));
    world.storage.speak(HostId(node));
}

fn stop(world: &Shared, process: Option<ProcId>, for_ms: u64) {
    let Some(process) = process else { return };
    world.kernel.pause_process(process, true);
    later(world, for_ms, move |world| world.kernel.pause_process(process, false));
}

fn cut(world: &Shared, from: u64, to: u64, for_ms: u64) {
    world.net.cut(HostId(from), HostId(to));
    later(world, for_ms, move |world| world.net.mend(HostId(from), HostId(to)));
}

fn end_guest(world: &Shared, vm: &str, reason: Option<&str>) {
    let process = world.find_vm(vm).and_then(|vm| world.runner(vm));
    let Some(process) = process else { return };
    let fact = world.oracle.borrow().vmms.get(&process).cloned();
    match (reason, fact) {
        (Some(reason), Some(fact)) => vmm::end_guest(world, process, &fact, reason),
        _ => world.end_vmm(process, None),
    }
}
