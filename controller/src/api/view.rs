//! The state and the reports as administrators see them.

use std::collections::BTreeMap;

use bellwether_core::fence;
use bellwether_core::state::Event;
use bellwether_core::{Member, Node, Observed, Place, State, Task, TaskKind, Vm, planner};
use bellwether_proto::v1;
use bellwether_types::{Strength, VmRules, VmState};

pub fn member(member: &Member) -> v1::Member {
    v1::Member {
        id: member.id,
        name: member.name.clone(),
        address: member.address.clone(),
        ports: Some(member.ports.into()),
    }
}

/// `suspect_after_ms` is the silence after which a node is called unknown.
pub fn node(
    state: &State,
    observed: &Observed,
    (now, suspect_after_ms): (u64, u64),
    node: &Node,
) -> v1::Node {
    let vms: Vec<String> = state.vms_of(node.id).map(|vm| vm.spec.name.clone()).collect();
    let free = planner::free(state, node);
    let report = observed.nodes.get(&node.id);
    v1::Node {
        id: node.id.0,
        name: node.name.clone(),
        address: node.address.clone(),
        phase: node.phase(state.load_of(node.id)).to_string(),
        boot_id: node.boot_id.map(|boot| boot.to_string()).unwrap_or_default(),
        memory_mib: node.memory_mib,
        memory_used_mib: node.memory_mib - free.memory_mib,
        vcpus: node.vcpus,
        vcpus_used: node.vcpus - free.vcpus,
        version: node.version.clone(),
        heard_ms_ago: report.map(|report| now.saturating_sub(report.heard_at)),
        reason: phase_reason(state, node, &vms),
        vms,
        quarantine_left_s: node
            .quarantined_until
            .map_or(0, |until| until.saturating_sub(now).div_ceil(1_000).max(1)),
        losses: u32::try_from(node.losses.len()).unwrap_or(u32::MAX),
        proofs: fence::yields(observed, node, suspect_after_ms).into_iter().map(proof).collect(),
    }
}

fn proof(outlook: fence::Yield) -> v1::ProofOutlook {
    let fence::Yield { proof, arbiter, after_ms, text } = outlook;
    v1::ProofOutlook { proof: proof.into(), arbiter: arbiter.to_string(), after_ms, text }
}

/// Why a node is in its phase, and what holds up a drain.
fn phase_reason(state: &State, node: &Node, vms: &[String]) -> String {
    use bellwether_core::Liveness;
    match &node.liveness {
        Liveness::Joining => "it has joined and its agent has not registered yet".into(),
        Liveness::Unknown { .. } => "its agent is not heard from; its VMs may be running".into(),
        Liveness::Fenced { proof } => proof.to_string(),
        Liveness::Online if node.cordoned && !vms.is_empty() => held_up(state, node),
        Liveness::Online if node.quarantined_until.is_some() => format!(
            "in quarantine: it was lost {} times; `bell node unquarantine {}` ends that",
            node.losses.len(),
            node.name
        ),
        Liveness::Online => String::new(),
    }
}

fn held_up(state: &State, node: &Node) -> String {
    let tried = Default::default();
    let stuck = state.vms_of(node.id).filter(|vm| vm.task.is_none()).find_map(|vm| {
        if vm.paused {
            return Some(format!("VM {} is paused; resume it so that it can move", vm.spec.name));
        }
        let leaving = Some(node.id);
        let wish = planner::Wish { vm, wanted: None, tried: &tried, leaving, task: None };
        planner::choose(state, &wish).err().map(|none| none.to_string())
    });
    stuck.unwrap_or_else(|| "its VMs are moving away".into())
}

pub fn vm(state: &State, observed: &Observed, vm: &Vm) -> v1::Vm {
    let (seen, reason) = seen_state(state, observed, vm);
    let (node, file) = match &vm.place {
        Place::Runner(runner) => (state.node_name(runner.node), None),
        Place::Sealed { file, .. } => (String::new(), Some(file.into())),
        Place::Stopped | Place::Revoked(_) => (String::new(), None),
    };
    v1::Vm {
        id: vm.id.to_string(),
        spec: Some((&vm.spec).into()),
        desired: vm.desired.as_str().into(),
        state: seen.to_string(),
        reason,
        epoch: vm.epoch.0,
        node,
        task: vm.task.map_or(0, |task| task.0),
        state_file: file,
        arbiter: vm.arbiter().to_string(),
        fence_proof: vm.last_proof.as_ref().map(|proof| proof.kind().into()).unwrap_or_default(),
        pending: vm.pending.clone().unwrap_or_default(),
        rules: Some(rules(state, &vm.rules)),
    }
}

fn rules(state: &State, rules: &VmRules) -> v1::VmRules {
    let limit = rules.restart_limit;
    let strength =
        |(group, strength): (&String, &Strength)| (group.clone(), strength.as_str().to_owned());
    v1::VmRules {
        preferred_owners: rules.preferred_owners.iter().map(|node| node.0).collect(),
        failback: rules.failback.to_string(),
        anti_affinity: rules.anti_affinity.iter().map(strength).collect(),
        start_after: rules.start_after.iter().map(|vm| state.vm_name(*vm)).collect(),
        restarts_max: limit.map_or(0, |limit| limit.times),
        restarts_period_s: limit.map_or(0, |limit| limit.period_s),
        pre_copy: rules.pre_copy.as_str().to_owned(),
        downtime_ms: rules.downtime_ms,
    }
}

/// The state as last reported. Where no runner can report, the task that works on it says more.
pub fn seen_state(state: &State, observed: &Observed, vm: &Vm) -> (VmState, String) {
    let kind = vm.task.and_then(|id| state.tasks.get(&id)).map(|task| task.kind);
    match (&vm.place, kind) {
        (Place::Runner(runner), _) => {
            let online = state.nodes.get(&runner.node).is_some_and(Node::is_online);
            match observed.report(runner.node, vm.id, runner.epoch) {
                Some(report) if online => (report.state, report.reason.clone()),
                None if online && kind.is_some() => (VmState::Starting, String::new()),
                None if online => {
                    (VmState::Unknown, "its node has not reported to this leader yet".into())
                }
                _ => (VmState::Unknown, "its node is not heard from".into()),
            }
        }
        (Place::Revoked(runner), _) => {
            let text = format!("waiting for proof that {} let go", state.node_name(runner.node));
            (VmState::Unknown, text)
        }
        (Place::Sealed { .. }, Some(TaskKind::Restore | TaskKind::Migrate)) => {
            (VmState::Restoring, String::new())
        }
        (Place::Sealed { .. }, _) => (VmState::Saved, String::new()),
        (Place::Stopped, Some(TaskKind::Start | TaskKind::Failover)) => {
            (VmState::Starting, String::new())
        }
        (Place::Stopped, _) => match &vm.halted {
            Some(reason) => (VmState::Failed, reason.clone()),
            None => (VmState::Stopped, String::new()),
        },
    }
}

pub fn task(state: &State, task: &Task) -> v1::Task {
    let (outcome, error) = match &task.outcome {
        None => ("running", String::new()),
        Some(Ok(())) => ("done", String::new()),
        Some(Err(error)) => ("failed", error.clone()),
    };
    let name = |node: Option<_>| node.map(|id| state.node_name(id)).unwrap_or_default();
    v1::Task {
        id: task.id.0,
        kind: task.kind.as_str().into(),
        vm_id: task.vm.to_string(),
        vm_name: task.vm_name.clone(),
        step: task.step.name().into(),
        outcome: outcome.into(),
        error,
        created_at_ms: task.created_at,
        ended_at_ms: task.ended_at,
        source: name(task.source),
        destination: name(task.destination),
        requested_by: task.by.clone(),
        measures: measures(task),
        fence_proof: task.proof.as_ref().map(|proof| proof.kind().into()).unwrap_or_default(),
        log: task
            .log
            .iter()
            .map(|(at, text)| v1::TaskLine { at_ms: *at, text: text.clone() })
            .collect(),
    }
}

/// What was measured, without the leader's own time stamps.
fn measures(task: &Task) -> BTreeMap<String, u64> {
    let shown = |(name, _): &(&String, &u64)| !name.contains("_at_");
    let measures = task.measures.iter().filter(shown);
    measures.map(|(name, value)| (name.clone(), *value)).collect()
}

pub fn event(event: &Event) -> v1::Event {
    v1::Event {
        seq: event.seq,
        at_ms: event.at,
        level: event.level.as_str().into(),
        vm: event.vm.clone().unwrap_or_default(),
        node: event.node.clone().unwrap_or_default(),
        task: event.task.map_or(0, |task| task.0),
        text: event.text.clone(),
    }
}
