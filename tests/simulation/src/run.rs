//! One run: a scenario becomes a world, faults happen, they end, and the world must come to rest.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bellwether_core::state::Desired;
use bellwether_core::{Place, State, Task, Vm};
use bellwether_types::{BootId, NodeId, Strength, VmId};

use crate::coverage::Coverage;
use crate::kernel::{Host, MS, Nanos};
use crate::scenario::{Event, Opening, Request, Scenario};
use crate::timeline::{Begun, Timeline};
use crate::world::{Shared, World};
use crate::{admin, agent, controller, faults, fencer};

/// How often a run looks whether something is broken, or at rest.
const LOOK: Nanos = 100 * MS;
/// So long it must stay at rest.
const REST_MS: u64 = 5_000;
/// So long a cluster may take to stand.
const OPENING_MS_MAX: u64 = 120_000;

/// One line of the decision log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    pub at_ms: u64,
    /// Who speaks: `cluster`, `task`, a controller, `admin`, `fault`.
    pub source: String,
    pub text: String,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { at_ms, source, text } = self;
        write!(f, "{:>4}.{:03}  {source:<8} {text}", at_ms / 1_000, at_ms % 1_000)
    }
}

/// How a run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Everything held, and the cluster came to rest.
    Held,
    Broken {
        at_ms: u64,
        what: String,
    },
}

/// What a run gave.
#[derive(Clone, PartialEq, Debug)]
pub struct Run {
    pub verdict: Verdict,
    pub log: Vec<Line>,
    /// Of every event in its order: the same for the same scenario.
    pub trace_hash: u64,
    pub coverage: Coverage,
    pub events: u64,
    pub virtual_ms: u64,
    /// What was true when, of a scenario that begins with a cluster that stands.
    pub timeline: Timeline,
}

/// Runs a scenario to its end.
pub fn run(scenario: &Scenario) -> Run {
    let world = World::new(scenario.seed, &scenario.cluster);
    let mut timeline = Timeline::default();
    begin(&world, scenario);
    let opened = open(&world, scenario);
    let broken = opened.and_then(|()| drive(&world, scenario, &mut timeline)).err();
    timeline.begun = begun(&world);
    let verdict = match broken {
        None => Verdict::Held,
        Some(what) => Verdict::Broken { at_ms: world.kernel.now() / MS, what },
    };
    let (revoked, late, torn) =
        world.storage.server(|server| (server.revoked, server.late_refused, server.torn));
    for (name, count) in
        [("lock-revoked", revoked), ("late-write-refused", late), ("torn-or-lost", torn)]
    {
        (0..count).for_each(|_| world.hit("storage", name));
    }
    let result = Run {
        verdict,
        log: world.log.borrow().clone(),
        trace_hash: world.kernel.trace_hash(),
        coverage: world.coverage.borrow().clone(),
        events: world.kernel.events(),
        virtual_ms: world.kernel.now() / MS,
        timeline,
    };
    world.dispose();
    result
}

fn begin(world: &Shared, scenario: &Scenario) {
    let desk = Host {
        up: true,
        frozen: false,
        boot_id: BootId::from_uuid(uuid::Uuid::nil()),
        booted_at: 0,
        drift_ppm: 0,
        wall_ahead_ms: 0,
        suspended_ns: 0,
        suspended_since: None,
    };
    world.kernel.add_host(admin::HOST, desk);
    for id in 1..=scenario.cluster.controllers {
        controller::start(world, id);
    }
    for node in 1..=scenario.cluster.nodes {
        agent::start(world, NodeId(node));
        fencer::start(world, NodeId(node));
    }
    let founder = Rc::clone(world);
    let wait = scenario.opening == Opening::WhenReady;
    spawn_admin(world, async move { admin::found(&founder, wait).await });
}

/// Waits for the moment at which the scenario's times begin, and plans its events.
fn open(world: &Shared, scenario: &Scenario) -> Result<(), String> {
    if scenario.opening == Opening::WhenReady {
        while !world.founded.get() {
            step(world)?;
            if world.kernel.now() > OPENING_MS_MAX * MS {
                return Err("the cluster does not come up by itself".to_owned());
            }
        }
        world.log.borrow_mut().clear();
        world.opened_at.set(world.kernel.now());
        crate::narrate::opening(world);
    }
    for timed in &scenario.events {
        let (there, event) = (Rc::clone(world), timed.event.clone());
        world.kernel.at(world.opened_at.get() + timed.at_ms * MS, move |_| happen(&there, event));
    }
    if scenario.settle_ms_max.is_some() {
        let there = Rc::clone(world);
        world.kernel.at(scenario.heal_at_ms * MS, move |_| {
            faults::heal(&there);
            let nodes = 1..=there.cluster.nodes;
            nodes.for_each(|node| happen(&there, Event::Request(Request::Undrain { node })));
        });
        // Nodes that were lost too often, with the last of what was under way.
        for after_ms in [1_000, 60_000] {
            let there = Rc::clone(world);
            world.kernel.at((scenario.heal_at_ms + after_ms) * MS, move |_| {
                let nodes = 1..=there.cluster.nodes;
                let lift = |node| happen(&there, Event::Request(Request::Unquarantine { node }));
                nodes.for_each(lift);
            });
        }
    }
    Ok(())
}

/// The guests that began since the times began.
fn begun(world: &Shared) -> Vec<Begun> {
    let oracle = world.oracle.borrow();
    let since = oracle.begun.iter().filter(|(at, ..)| *at >= world.opened_at.get());
    let begun = since.map(|(at, vm, node, resumed)| Begun {
        at_ms: world.since_opening(*at),
        vm: oracle.reference().vm_name(*vm),
        node: node.0,
        resumed: *resumed,
    });
    begun.collect()
}

fn spawn_admin(world: &Shared, work: impl Future<Output = ()> + 'static) {
    let process = world.kernel.start_process(admin::HOST, "admin");
    world.kernel.spawn(process, work);
}

fn happen(world: &Shared, event: Event) {
    match event {
        Event::Fault(fault) => faults::inject(world, &fault),
        Event::Request(request) => spawn_admin(world, admin::request(Rc::clone(world), request)),
    }
}

/// Lets time pass, until something is broken or all is at rest.
fn drive(world: &Shared, scenario: &Scenario, timeline: &mut Timeline) -> Result<(), String> {
    let watched = scenario.opening == Opening::WhenReady;
    while world.kernel.now() < world.opened_at.get() + scenario.heal_at_ms * MS {
        if watched {
            timeline.look(world);
        }
        step(world)?;
    }
    if watched {
        timeline.look(world);
    }
    let Some(settle_ms_max) = scenario.settle_ms_max else { return Ok(()) };
    come_to_rest(world, settle_ms_max)?;
    let stale = stale_files(world);
    if stale.is_empty() {
        return Ok(());
    }
    // What an earlier fault left goes with the next start.
    world.say("heal", "VMs with old state files are started anew");
    let there = Rc::clone(world);
    let vms: BTreeSet<VmId> = stale.iter().map(|(vm, _)| *vm).collect();
    let anew = admin::start_anew(there, vms.into_iter().collect());
    let done = Rc::new(Cell::new(false));
    let told = Rc::clone(&done);
    spawn_admin(world, async move {
        anew.await;
        told.set(true);
    });
    let end = world.kernel.now() + settle_ms_max * MS;
    while !done.get() && world.kernel.now() < end {
        step(world)?;
    }
    come_to_rest(world, settle_ms_max)?;
    match stale_files(world).first() {
        Some((_, path)) => {
            Err(format!("liveness: nobody needs the state file {path}, and it stays"))
        }
        None => Ok(()),
    }
}

/// Lets time pass until everything has been at rest for a while.
fn come_to_rest(world: &Shared, ms_max: u64) -> Result<(), String> {
    let end = world.kernel.now() + ms_max * MS;
    let mut rests_since = None;
    loop {
        step(world)?;
        let now = world.kernel.now();
        match unrest(world) {
            None if now - *rests_since.get_or_insert(now) >= REST_MS * MS => return Ok(()),
            None => {}
            Some(why) if now >= end => {
                let waited = ms_max / 1_000;
                return Err(format!("liveness: {waited} s after all faults ended: {why}"));
            }
            Some(_) => rests_since = None,
        }
    }
}

/// State files that no place names.
fn stale_files(world: &Shared) -> Vec<(VmId, String)> {
    let files: Vec<(VmId, String)> = world.storage.server(|server| {
        server.states.iter().map(|(path, file)| (file.vm, path.clone())).collect()
    });
    world.committed(|state| {
        let named = |vm: &VmId, path: &str| match state.vms.get(vm).map(|vm| &vm.place) {
            Some(Place::Sealed { file, .. }) => file.path.display().to_string() == path,
            _ => false,
        };
        // What waits for another VM is not started now.
        let idle = |vm: &VmId| state.vms.get(vm).is_some_and(|vm| waits(state, vm));
        files.into_iter().filter(|(vm, path)| !named(vm, path) && !idle(vm)).collect()
    })
}

fn step(world: &Shared) -> Result<(), String> {
    world.kernel.run_until(world.kernel.now() + LOOK);
    world.take_writes();
    match world.oracle.borrow().violation() {
        Some(violation) => Err(violation.to_owned()),
        None => Ok(()),
    }
}

/// Why the cluster is not where it is to be.
fn unrest(world: &Shared) -> Option<String> {
    let oracle = world.oracle.borrow();
    let state = oracle.reference();
    let works = |task: &&Task| !state.vms.get(&task.vm).is_some_and(|vm| waits(state, vm));
    if let Some(task) = state.active_tasks().find(works) {
        return Some(format!(
            "task {} ({} of {}) stands at {}: {:?}",
            task.id,
            task.kind.as_str(),
            task.vm_name,
            task.step.name(),
            task.log.last()
        ));
    }
    if let Some(node) = state.nodes.values().find(|node| !node.is_online()) {
        return Some(format!("{} is {:?}", node.name, node.liveness));
    }
    let vms = state.vms.values();
    vms.filter_map(|vm| unrest_of(world, &oracle, vm))
        .next()
        .or_else(|| together(state))
        .or_else(|| leftovers(world, &oracle))
}

/// Whether a VM does not run because one that has to run before it does not, as a person wants it.
fn waits(state: &State, vm: &Vm) -> bool {
    let is_down = |other: &Vm| other.desired != Desired::Running || waits(state, other);
    let others = vm.rules.start_after.iter().filter_map(|other| state.vms.get(other));
    vm.place.runner().is_none() && others.into_iter().any(is_down)
}

/// VMs that are strictly kept apart, and run on one node.
fn together(state: &State) -> Option<String> {
    let hard = |vm: &Vm| vm.rules.anti_affinity.values().any(|how| *how == Strength::Hard);
    let homes = state.vms.values().filter(|vm| hard(vm));
    let mut seen = BTreeMap::new();
    for vm in homes {
        let Some(node) = vm.place.runner().map(|runner| runner.node) else { continue };
        for group in vm.rules.anti_affinity.keys() {
            if let Some(other) = seen.insert((node, group), &vm.spec.name) {
                let name = &vm.spec.name;
                return Some(format!("{name} and {other} are to be apart, and are on one node"));
            }
        }
    }
    None
}

fn unrest_of(world: &Shared, oracle: &crate::oracle::Oracle, vm: &Vm) -> Option<String> {
    let lives: Vec<_> = oracle
        .vmms
        .iter()
        .filter(|(process, fact)| fact.vm == vm.id && world.kernel.lives(**process))
        .map(|(_, fact)| (fact.node, fact.epoch, fact.open || fact.paused))
        .collect();
    let name = &vm.spec.name;
    match (vm.desired, &vm.place) {
        (Desired::Running, _) if waits(oracle.reference(), vm) => {
            (!lives.is_empty()).then(|| format!("{name} waits for another VM, VMMs: {lives:?}"))
        }
        (Desired::Running, Place::Runner(runner)) => {
            let wanted = (runner.node, runner.epoch, true);
            (lives != [wanted]).then(|| format!("{name} is to run as {wanted:?}, VMMs: {lives:?}"))
        }
        (Desired::Stopped, Place::Stopped) => {
            (!lives.is_empty()).then(|| format!("{name} is stopped, VMMs: {lives:?}"))
        }
        (Desired::Saved, Place::Sealed { file, .. }) => {
            let path = file.path.display().to_string();
            let kept = world.storage.server(|server| server.states.contains_key(&path));
            (!lives.is_empty() || !kept)
                .then(|| format!("{name} is saved, file there: {kept}, VMMs: {lives:?}"))
        }
        (desired, place) => Some(format!("{name} is to be {}, and is {place:?}", desired.as_str())),
    }
}

/// VMMs, incarnations and files of VMs that are gone.
fn leftovers(world: &Shared, oracle: &crate::oracle::Oracle) -> Option<String> {
    let state = oracle.reference();
    let orphan = oracle
        .vmms
        .iter()
        .find(|(process, fact)| world.kernel.lives(**process) && !state.vms.contains_key(&fact.vm));
    if let Some((process, _)) = orphan {
        return Some(format!("{} belongs to no VM", world.kernel.name_of(*process)));
    }
    let gone = world.storage.server(|server| {
        let mut files = server.states.values();
        files.find(|file| !state.vms.contains_key(&file.vm)).cloned()
    });
    gone.map(|file| format!("a state file of a VM that was deleted: {file:?}"))
}
