//! A node's fencer and its watchdog: what is decided is the product's (`bellwether_agent_core::fencing`).
//!
//! ```text
//!   fencer: arms --> pets under a fresh grant, or when nobody depends --> killed: armed still
//!   device: not petted for its period, which is up to a tenth longer --> the host ends within a second,
//!           and boots after a while; a software watchdog stands still together with its host
//! ```
//!
//! As with the kernel's devices, to open one is to pet it, and so is the end of the process that had it.

use std::rc::Rc;

use bellwether_agent_core::fencing::{self, Dependents, Grant, Petting, Verdict, Vmm};
use bellwether_types::{Arbiter, NodeId, WatchdogBound, WatchdogTiming};

use crate::faults;
use crate::kernel::{HostId, Kernel, MS, Nanos, ProcId, SECOND};
use crate::scenario::Watchdog;
use crate::world::{Facts, Shared, World};

/// Between two looks of a fencer.
const TICK: Nanos = 250 * MS;
/// From the end of a watchdog's period to the end of its host, at the latest.
const RESET_MAX: Nanos = SECOND;
/// How long a host takes to boot after it was reset.
const BOOT: (Nanos, Nanos) = (20 * SECOND, 40 * SECOND);

/// A watchdog that counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Armed {
    petted: Nanos,
    /// As it is, not as it says.
    period: Nanos,
    hardware: bool,
    /// Tells one arming from the next.
    serial: u64,
}

struct Fencer {
    world: Shared,
    process: ProcId,
    node: NodeId,
    bound: WatchdogBound,
}

/// Starts the fencer of a node that has a watchdog.
pub fn start(world: &Shared, node: NodeId) {
    let Some(watchdog) = world.cluster.equipment_of(node.0).watchdog else { return };
    let process = world.kernel.start_process(HostId(node.0), format!("f{node}"));
    world.fencers.borrow_mut().insert(node, process);
    let WatchdogTiming { pet_ms, stop_ms, .. } = WatchdogTiming::default();
    let bound = WatchdogBound { watchdog_ms: watchdog.period_ms(), pet_ms, stop_ms };
    let fencer = Fencer { world: Rc::clone(world), process, node, bound };
    world.kernel.spawn(process, async move {
        fencer.world.sleep(HostId(node.0), 20 * MS).await;
        arm(&fencer.world, node, watchdog);
        let hardware = matches!(watchdog, Watchdog::Hardware { .. });
        let facts = Facts { bound, hardware };
        fencer.world.runtime(node, |runtime| runtime.facts = Some(facts));
        loop {
            fencer.step();
            fencer.world.sleep(HostId(node.0), TICK).await;
        }
    });
}

/// Ends a fencer as SIGKILL does: the kernel pets the watchdog once more and leaves it armed.
pub fn kill(world: &World, node: NodeId) {
    let process = world.fencers.borrow_mut().remove(&node);
    if process.is_some_and(|process| world.kernel.end_process(process)) {
        pet(world, node);
    }
}

/// Asks the fencer to disarm its watchdog and to end, which it refuses while a VM depends on it.
pub fn disarm(world: &Shared, node: NodeId) {
    let process = world.fencers.borrow().get(&node).copied();
    let Some(process) = process.filter(|process| !world.kernel.is_standing(*process)) else {
        return;
    };
    let stop_ms = WatchdogTiming::default().stop_ms;
    if look(world, node, stop_ms * MS) != Dependents::None {
        world.hit("fencer", "not disarmed");
        return world.say("fencer", format!("n{node} refuses to disarm its watchdog"));
    }
    world.hit("fencer", "disarmed");
    world.say("fencer", format!("n{node} has disarmed its watchdog"));
    // Nobody may believe in it any more when it is disarmed.
    world.runtime(node, |runtime| runtime.facts = None);
    world.watchdogs.borrow_mut().remove(&node);
    world.fencers.borrow_mut().remove(&node);
    world.kernel.end_process(process);
}

impl Fencer {
    /// One look at everything, in the order of `bellwether-fencer`.
    fn step(&self) {
        let (world, node) = (&self.world, self.node);
        let now = world.kernel.boottime(HostId(node.0));
        let deadline = world.runtime(node, |runtime| runtime.grant.deadline_ns);
        let grant = fencing::grant(Some(deadline), now, self.bound.pet_ms * MS);
        if grant == Grant::Fresh {
            self.pet("pets: granted");
        }
        let dependents = look(world, node, self.bound.stop_ms * MS);
        match fencing::petting(grant, dependents) {
            Petting::Granted => {}
            Petting::NobodyDepends => self.pet("pets: nobody depends"),
            Petting::Held => world.hit("fencer", "holds"),
        }
    }

    fn pet(&self, why: &'static str) {
        let (world, node) = (&self.world, self.node);
        world.hit("fencer", why);
        pet(world, node);
        let boot = world.boot(node);
        let granted = world.granted.borrow().get(&boot).copied().unwrap_or(0);
        // A slow clock makes P longer by the drift that the formula of the proof allows.
        let latest = granted + self.bound.pet_ms * MS * 10 / 9;
        if world.kernel.now() > latest {
            world.oracle.borrow_mut().petted_without_grant(node, boot);
        }
        debug_assert!(world.kernel.lives(self.process));
    }
}

/// Looks at the VMMs of a node under the lease arbiter, and ends those that are overdue.
fn look(world: &Shared, node: NodeId, stop_ns: Nanos) -> Dependents {
    let now = world.kernel.boottime(HostId(node.0));
    let found: Vec<(Option<ProcId>, Vmm)> = world.runtime(node, |runtime| {
        let may = runtime
            .incarnations
            .iter()
            .filter(|(_, record)| record.arbiter == Arbiter::Lease && record.may_have_run);
        may.map(|(at, record)| {
            let deadline_ns = runtime.pages.get(at).map(|page| page.deadline_ns);
            (record.process, Vmm { deadline_ns, held: runtime.held.contains(at) })
        })
        .collect()
    });
    let mut dependents = Dependents::None;
    for (process, vmm) in found {
        dependents = dependents.and(match process {
            None => Dependents::Unknown,
            Some(process) if world.has_ended(process) => Dependents::None,
            Some(process) => {
                let verdict = fencing::verdict(vmm, now, stop_ns);
                if verdict == Verdict::Kill && world.kernel.lives(process) {
                    world.hit("fencer", "kills a VMM");
                    let name = world.kernel.name_of(process);
                    world.say("fencer", format!("n{node} kills {name}, which does not stop"));
                    world.end_vmm(process, None);
                }
                verdict.dependents()
            }
        });
    }
    dependents
}

// --- the device ---

/// Opens the device: it counts from now on, if it has not before.
fn arm(world: &Shared, node: NodeId, watchdog: Watchdog) {
    if world.watchdogs.borrow().contains_key(&node) {
        return pet(world, node);
    }
    let late = world.chance.borrow_mut().below(100);
    let (now, serial) = (world.kernel.now(), world.kernel.events());
    let period = watchdog.period_ms() * MS / 1_000 * (1_000 + late);
    let hardware = matches!(watchdog, Watchdog::Hardware { .. });
    let armed = Armed { petted: now, period, hardware, serial };
    world.watchdogs.borrow_mut().insert(node, armed);
    count(world, node, serial, now + period);
}

fn pet(world: &World, node: NodeId) {
    if let Some(armed) = world.watchdogs.borrow_mut().get_mut(&node) {
        armed.petted = world.kernel.now();
    }
}

/// Looks at its time, and ends the host when it has passed.
fn count(world: &Shared, node: NodeId, serial: u64, at: Nanos) {
    let there = Rc::clone(world);
    world.kernel.at(at, move |kernel| {
        let armed = there.watchdogs.borrow().get(&node).copied();
        let Some(armed) = armed.filter(|armed| armed.serial == serial) else { return };
        let (now, due) = (kernel.now(), armed.petted + armed.period);
        // What stands still does not count.
        let stands = !armed.hardware && kernel.is_frozen(HostId(node.0));
        match now >= due && !stands {
            true => fire(&there, node, kernel),
            false => count(&there, node, serial, due.max(now + TICK)),
        }
    });
}

fn fire(world: &Shared, node: NodeId, kernel: &Kernel) {
    world.hit("fencer", "watchdog resets the host");
    world.say("fencer", format!("the watchdog of n{node} resets its host"));
    world.watchdogs.borrow_mut().remove(&node);
    let boot = world.boot(node);
    let (last, boots) = {
        let mut chance = world.chance.borrow_mut();
        (chance.below(RESET_MAX), chance.within(BOOT.0, BOOT.1))
    };
    let there = Rc::clone(world);
    kernel.after(last, move |kernel| {
        // It may have lost power meanwhile, and have booted again.
        if there.boot(node) != boot || !kernel.is_up(HostId(node.0)) {
            return;
        }
        faults::power_off(&there, node.0);
        let later = Rc::clone(&there);
        kernel.after(boots, move |_| {
            if !later.switched_off.borrow().contains(&node) {
                faults::power_on(&later, node.0);
            }
        });
    });
}
