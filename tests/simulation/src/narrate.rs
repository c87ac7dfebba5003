//! From committed entries to the decision log and the coverage table.

use bellwether_core::command::Change;
use bellwether_core::state::Level;
use bellwether_core::{Place, State, Step, StepEvent, Task};

use crate::raft::Applied;
use crate::world::World;

/// An entry was applied for the first time: tells what the cluster decided.
pub fn applied(world: &World, it: &Applied<'_>) {
    let Some(command) = &it.entry.command else {
        world.hit("raft", "elected");
        world.leader.set(Some(it.controller));
        world.say(format!("c{}", it.controller), format!("leads in term {}", it.entry.term));
        return;
    };
    count(world, it.after, &command.change);
    count_places(world, it.after);
    let known = world.log_seen.replace(it.after.next_event);
    for event in it.after.events.iter().filter(|event| event.seq >= known) {
        let mark = match event.level {
            Level::Info => "",
            Level::Warn => "warning: ",
            Level::Error => "error: ",
        };
        world.say("cluster", format!("{mark}{}", event.text));
    }
    if let Change::Advance { task, event, .. } = &command.change
        && *it.outcome == bellwether_core::Outcome::Done
        && let Some(task) = it.after.tasks.get(task)
    {
        placed(world, it.after, task, event);
        let text = format!(
            "task {} ({} {}): {} -> {}",
            task.id,
            task.kind.as_str(),
            task.vm_name,
            name(event),
            task.step.name()
        );
        world.say("task", text);
    }
}

/// Tells why a VM goes where it goes.
fn placed(world: &World, after: &State, task: &Task, event: &StepEvent) {
    let StepEvent::Placed { node, why } = event else { return };
    if matches!(task.step, Step::Prepare(_)) {
        let name = after.node_name(*node);
        let why = why.strip_prefix(name.as_str()).unwrap_or(why).trim_start();
        world.say("place", format!("VM {} goes to {name}, which {why}", task.vm_name));
    }
}

/// The word for what happened in a step.
pub fn name(event: &StepEvent) -> &'static str {
    match event {
        StepEvent::Chosen { .. } => "chosen",
        StepEvent::Placed { .. } => "placed",
        StepEvent::NoNode { .. } => "no-node",
        StepEvent::Proven(_) => "proven",
        StepEvent::Reinstated => "reinstated",
        StepEvent::Prepared => "prepared",
        StepEvent::Held => "held",
        StepEvent::HeldWithState { .. } => "held-with-state",
        StepEvent::Busy { .. } => "busy",
        StepEvent::PreCopied { .. } => "pre-copied",
        StepEvent::Sealed { .. } => "sealed",
        StepEvent::Loaded { .. } => "loaded",
        StepEvent::Activated { .. } => "activated",
        StepEvent::ClaimedBack { .. } => "claimed-back",
        StepEvent::Released { .. } => "released",
        StepEvent::Asked { .. } => "asked",
        StepEvent::GuestEnded => "guest-ended",
        StepEvent::Purged => "purged",
        StepEvent::Failed { .. } => "failed",
        StepEvent::RunnerLost { .. } => "runner-lost",
        StepEvent::TimedOut => "timed-out",
    }
}

fn count(world: &World, after: &State, change: &Change) {
    match change {
        Change::Advance { event, task, step_no } => {
            world.hit("event", name(event));
            // One that moved its task on has raised the number.
            if after.tasks.get(task).is_some_and(|task| task.step_no != step_no + 1) {
                world.hit("event", "late");
            }
            if let Some(task) = after.tasks.get(task) {
                world.hit("step", task.step.name());
                if let Some(proof) = &task.proof {
                    world.hit("proof", proof.kind());
                }
            }
        }
        Change::BeginTask(request) | Change::Begin { request, .. } => {
            world.hit("task", request.kind.as_str());
        }
        _ => {}
    }
}

const fn place(place: &Place) -> &'static str {
    match place {
        Place::Stopped => "stopped",
        Place::Runner(_) => "runner",
        Place::Sealed { .. } => "sealed",
        Place::Revoked(_) => "revoked",
    }
}

fn count_places(world: &World, after: &State) {
    let mut places = world.places.borrow_mut();
    for vm in after.vms.values() {
        let before = places.insert(vm.id, vm.place.clone());
        let Some(before) = before.filter(|before| *before != vm.place) else { continue };
        world.hit("place", format!("{} -> {}", place(&before), place(&vm.place)));
        if let Some(proof) = &vm.last_proof {
            world.hit("proof", proof.kind());
        }
    }
}

/// How the cluster stands when the scenario's times begin.
pub fn opening(world: &World) {
    let lines: Vec<String> = world.committed(|state| {
        let names = |vms: Vec<&str>| if vms.is_empty() { "nothing".into() } else { vms.join(", ") };
        let runs = state.nodes.values().map(|node| {
            let mut here: Vec<_> = state.vms_of(node.id).map(|vm| vm.spec.name.as_str()).collect();
            here.sort_unstable();
            format!("{} runs {}", node.name, names(here))
        });
        let idle = state.vms.values().filter(|vm| vm.place.runner().is_none());
        let mut idle: Vec<&str> = idle.map(|vm| vm.spec.name.as_str()).collect();
        idle.sort_unstable();
        let idle = (!idle.is_empty()).then(|| format!("not running: {}", idle.join(", ")));
        let leads = world.leader.get().map(|id| format!("n{id} leads"));
        leads.into_iter().chain(runs).chain(idle).collect()
    });
    lines.into_iter().for_each(|line| world.say("begin", line));
}
