//! Rules of VMs, settings of the cluster, quarantines.

use bellwether_core::command::Change;
use bellwether_core::{State, Vm, planner};
use bellwether_proto::{restart_policy, rules, v1};
use bellwether_types::{NodeId, VmId, VmPatch, VmRules, VmSpec};
use tonic::Status;

use super::AdminApi;
use crate::api::commit;

impl AdminApi {
    pub(super) async fn change_cluster(
        &self,
        request: v1::SetClusterRequest,
    ) -> Result<v1::ClusterStatus, Status> {
        commit(&self.controller, Change::SetCluster { patch: request.into() }).await?;
        self.cluster_status().await
    }

    pub(super) async fn unquarantine(
        &self,
        name: &str,
        by: String,
    ) -> Result<v1::NodeReply, Status> {
        let node = self.find_node(name)?.id;
        commit(&self.controller, Change::LiftQuarantine { node, by }).await?;
        self.node(name).await
    }

    pub(super) async fn change_vm(&self, request: v1::SetVmRequest) -> Result<v1::VmReply, Status> {
        let vm = self.find_vm(&request.vm)?.id;
        let patch = self.patch(request.changes.unwrap_or_default())?;
        commit(&self.controller, Change::SetVm { vm, patch }).await?;
        self.vm(&request.vm).await
    }

    /// The rules of a VM that is to be created.
    pub(super) fn rules(&self, changes: v1::VmChanges) -> Result<VmRules, Status> {
        let mut rules = VmRules::default();
        rules.change(self.patch(changes)?);
        Ok(rules)
    }

    /// Names become numbers and ids; words become values.
    fn patch(&self, changes: v1::VmChanges) -> Result<VmPatch, Status> {
        let restart = Some(changes.restart).filter(|word| !word.is_empty()).map(restart_policy);
        let owners = changes.possible_owners.map(|names| self.nodes_named(&names)).transpose()?;
        let preferred = changes.preferred_owners.map(|names| self.nodes_named(&names));
        Ok(VmPatch {
            possible_owners: owners.map(|nodes| nodes.into_iter().collect()),
            priority: changes.priority,
            restart: restart.transpose()?,
            preferred_owners: preferred.transpose()?,
            failback: rules::failback(&changes.failback)?,
            anti_affinity: changes.anti_affinity.map(rules::groups).transpose()?,
            start_after: changes.start_after.map(|names| self.vms_named(&names)).transpose()?,
            restart_limit: changes.restart_limit.map(rules::restart_limit),
            pre_copy: rules::pre_copy(&changes.pre_copy)?,
            downtime_ms: changes.downtime_ms,
        })
    }

    fn nodes_named(&self, names: &v1::NodeNames) -> Result<Vec<NodeId>, Status> {
        names.nodes.iter().map(|name| Ok(self.find_node(name)?.id)).collect()
    }

    fn vms_named<C: FromIterator<VmId>>(&self, names: &v1::VmNames) -> Result<C, Status> {
        names.vms.iter().map(|name| Ok(self.find_vm(name)?.id)).collect()
    }

    /// Refuses a VM that is to start at once and must not, before it is created. The start itself
    /// is checked again: only there is it certain.
    pub(super) fn admit(&self, id: VmId, spec: &VmSpec, rules: &VmRules) -> Result<(), Status> {
        let state = self.controller.state();
        let vm = Vm::new(id, spec.clone(), rules.clone(), 0);
        admit(&state, &vm)
    }
}

fn admit(state: &State, vm: &Vm) -> Result<(), Status> {
    planner::admit(state, vm).map_err(Status::failed_precondition)
}
