//! What if, and why: questions about decisions. None of them changes anything.

use std::collections::BTreeSet;

use bellwether_core::explain;
use bellwether_core::forecast::{Forecast, Pace, Scenario, forecast};
use bellwether_core::{Node, State, Vm};
use bellwether_proto::v1;
use bellwether_types::{NodeId, TaskId, VmSpec};
use tonic::Status;

use super::AdminApi;
use crate::api::view;

impl AdminApi {
    pub(super) async fn forecast(
        &self,
        request: v1::WhatIfRequest,
    ) -> Result<v1::Forecast, Status> {
        self.confirm().await?;
        let scenario = self.scenario(request)?;
        let (state, timing) = (self.controller.state_to_keep(), self.controller.timing.clone());
        let now = self.controller.clock.now_ms();
        // A large cluster has many decisions to make, and the leader has other things to do.
        let work = move || {
            let pace = Pace::measured(&state);
            let told = forecast(&state, &timing, &pace, scenario, now);
            to_message(&state, told)
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| Status::internal(format!("the forecast broke off: {error}")))
    }

    fn scenario(&self, request: v1::WhatIfRequest) -> Result<Scenario, Status> {
        let v1::WhatIfRequest { nodes_down, drain, add_vm } = request;
        match (&nodes_down[..], &drain[..], add_vm) {
            ([_, ..], [], None) => Ok(Scenario::NodesDown(self.node_set(&nodes_down)?)),
            ([], [_, ..], None) => Ok(Scenario::Drain(self.node_set(&drain)?)),
            ([], [], Some(new)) => {
                let spec =
                    new.spec.ok_or_else(|| Status::invalid_argument("the VM has no spec"))?;
                let rules = self.rules(new.rules.unwrap_or_default())?;
                Ok(Scenario::AddVm(Box::new((VmSpec::try_from(spec)?, rules))))
            }
            _ => Err(Status::invalid_argument(
                "name nodes that are down, or nodes to drain, or a VM to add: one of these",
            )),
        }
    }

    fn node_set(&self, names: &[String]) -> Result<BTreeSet<NodeId>, Status> {
        names.iter().map(|name| Ok(self.find_node(name)?.id)).collect()
    }

    pub(super) fn vm_explanation(&self, name: &str) -> Result<v1::VmExplanation, Status> {
        let vm = self.find_vm(name)?;
        let state = self.controller.state();
        let node = vm.place.runner().map(|runner| state.node_name(runner.node));
        let verdicts = explain::nodes_for(&state, &vm).into_iter().map(|(node, judged)| {
            let free = judged.as_ref().ok().copied();
            v1::NodeVerdict {
                node: state.node_name(node),
                could_take_it: judged.is_ok(),
                reason: judged.err().map(|reason| reason.to_string()).unwrap_or_default(),
                memory_free_mib: free.map_or(0, |free| free.memory_mib),
                vcpus_free: free.map_or(0, |free| free.vcpus),
            }
        });
        Ok(v1::VmExplanation {
            vm: vm.spec.name.clone(),
            node: node.unwrap_or_default(),
            placed: placement(&state, &vm),
            pending: vm.pending.clone().or(vm.halted.clone()).unwrap_or_default(),
            next: explain::next_place(&state, vm.id).unwrap_or_default(),
            nodes: verdicts.collect(),
        })
    }

    pub(super) fn task_explanation(&self, id: u64) -> Result<v1::TaskExplanation, Status> {
        let task = self.task(id)?;
        let state = self.controller.state();
        let events = state
            .tasks
            .get(&TaskId(id))
            .map(|task| explain::events_of(&state, task).map(view::event).collect::<Vec<_>>());
        Ok(v1::TaskExplanation { task: Some(task), events: events.unwrap_or_default() })
    }
}

/// The recorded decision, if it is the one that counts: a VM that runs nowhere is explained by what
/// it waits for.
fn placement(state: &State, vm: &Vm) -> Option<v1::Placement> {
    let placed = vm.placed.as_ref()?;
    let runner = vm.place.runner().filter(|runner| runner.node == placed.node)?;
    Some(v1::Placement {
        node: state.node_name(runner.node),
        at_ms: placed.at,
        task: placed.task.0,
        kind: placed.kind.as_str().into(),
        requested_by: placed.by.clone(),
        why: placed.why.clone(),
    })
}

fn to_message(state: &State, told: Forecast) -> v1::Forecast {
    let name = |id: NodeId| state.nodes.get(&id).map(|node: &Node| node.name.clone());
    let moves = told.moves.into_iter().map(|one| v1::ForecastMove {
        vm: one.vm,
        kind: one.kind.as_str().into(),
        from: one.from.and_then(name).unwrap_or_default(),
        to: name(one.to).unwrap_or_default(),
        at_ms: one.at_ms,
        outage_ms: one.outage_ms,
        why: one.why,
    });
    let stuck = told.stuck.into_iter().map(|one| v1::ForecastStuck {
        vm: one.vm,
        reason: one.reason,
        before: one.before,
    });
    let nodes = told.nodes.into_iter().map(|node| v1::ForecastNode {
        name: node.name,
        phase: node.phase.into(),
        memory_free_before_mib: node.before.memory_mib,
        memory_free_after_mib: node.after.memory_mib,
        vcpus_free_before: node.before.vcpus,
        vcpus_free_after: node.after.vcpus,
        vms_before: node.before.vms as u64,
        vms_after: node.after.vms as u64,
    });
    v1::Forecast {
        moves: moves.collect(),
        stuck: stuck.collect(),
        nodes: nodes.collect(),
        events: told.events.into_iter().map(|(at_ms, text)| v1::TaskLine { at_ms, text }).collect(),
        ends_ms: told.ends_ms,
        finished: told.finished,
        refused: told.refused.unwrap_or_default(),
    }
}
