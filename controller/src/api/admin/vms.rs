//! VMs: creation, and the verbs that begin tasks.

use bellwether_core::command::Change;
use bellwether_core::task::TaskRequest;
use bellwether_core::{Node, Outcome, TaskKind, Vm};
use bellwether_proto::v1;
use bellwether_types::{Arbiter, NodeId, VmId, VmSpec};
use tonic::{Response, Status};
use uuid::Uuid;

use super::{AdminApi, Answer};
use crate::api::{commit, view};
use crate::lead::orders;

impl AdminApi {
    pub(super) fn find_vm(&self, name: &str) -> Result<Vm, Status> {
        self.controller.state().find_vm(name).cloned().ok_or_else(|| {
            Status::not_found(format!("there is no VM `{name}`; see `bell vm list`"))
        })
    }

    pub(super) async fn vms(&self) -> Result<v1::ListVmsReply, Status> {
        self.confirm().await?;
        let state = self.controller.state();
        let observed = self.controller.observed();
        let vms = state.vms.values().map(|vm| view::vm(&state, &observed, vm)).collect();
        Ok(v1::ListVmsReply { vms })
    }

    pub(super) async fn vm(&self, name: &str) -> Result<v1::VmReply, Status> {
        self.confirm().await?;
        self.vm_reply(&self.find_vm(name)?, 0)
    }

    fn vm_reply(&self, vm: &Vm, task: u64) -> Result<v1::VmReply, Status> {
        let state = self.controller.state();
        let vm = state.vms.get(&vm.id).unwrap_or(vm);
        let vm = view::vm(&state, &self.controller.observed(), vm);
        Ok(v1::VmReply { vm: Some(vm), task })
    }

    pub(super) async fn create(
        &self,
        request: v1::CreateVmRequest,
        who: String,
    ) -> Result<v1::VmReply, Status> {
        let spec = request.spec.ok_or_else(|| Status::invalid_argument("the VM has no spec"))?;
        let spec = VmSpec::try_from(spec)?;
        self.inspect(&spec).await?;
        let id = VmId::from_uuid(Uuid::now_v7());
        let name = spec.name.clone();
        let rules = self.rules(request.rules.unwrap_or_default())?;
        if request.start {
            self.admit(id, &spec, &rules)?;
        }
        let arbiter = arbiter(&request.arbiter)?;
        commit(&self.controller, Change::DefineVmUnder { id, spec, rules, arbiter }).await?;
        match request.start {
            true => Ok(self.begin(TaskKind::Start, &name, "", who).await?.into_inner()),
            false => self.vm(&name).await,
        }
    }

    /// Asks one of the VM's possible nodes whether its files are there and good, so that a mistake
    /// is found now and not in the middle of a failover.
    async fn inspect(&self, spec: &VmSpec) -> Result<(), Status> {
        let Some(node) = self.possible_node(spec) else { return Ok(()) };
        match orders::inspect(&self.controller, &node, spec).await {
            Ok(problems) if problems.is_empty() => Ok(()),
            Ok(problems) => {
                let text = format!("VM {}: {}", spec.name, problems.join("; "));
                Err(Status::invalid_argument(text))
            }
            // A node that cannot be asked now says nothing about the VM.
            Err(error) => {
                tracing::warn!(node_id = node.id.0, %error, "a VM's files were not inspected");
                Ok(())
            }
        }
    }

    fn possible_node(&self, spec: &VmSpec) -> Option<Node> {
        let state = self.controller.state();
        let may =
            |id: &NodeId| spec.possible_owners.is_empty() || spec.possible_owners.contains(id);
        state.nodes.values().find(|node| node.is_online() && may(&node.id)).cloned()
    }

    pub(super) async fn begin(
        &self,
        kind: TaskKind,
        vm: &str,
        node: &str,
        by: String,
    ) -> Answer<v1::VmReply> {
        let vm = self.find_vm(vm)?;
        let node = match node {
            "" => None,
            name => Some(self.find_node(name)?.id),
        };
        let request = TaskRequest { vm: vm.id, kind, node, by };
        let task = match commit(&self.controller, Change::BeginTask(request)).await? {
            Outcome::Task(task) => task.0,
            _ => 0,
        };
        self.vm_reply(&vm, task).map(Response::new)
    }

    pub(super) async fn delete(&self, vm: &str, by: String) -> Result<v1::DeleteVmReply, Status> {
        let id = self.find_vm(vm)?.id;
        let request = TaskRequest { vm: id, kind: TaskKind::Delete, node: None, by };
        commit(&self.controller, Change::BeginTask(request)).await?;
        let mut states = self.controller.raft.watch_state();
        let gone = states.wait_for(|view| !view.state.vms.contains_key(&id));
        match tokio::time::timeout(std::time::Duration::from_secs(10), gone).await {
            Ok(Ok(_)) => Ok(v1::DeleteVmReply {}),
            _ => Err(Status::deadline_exceeded(format!(
                "VM {vm} is being deleted and is not gone yet; see `bell task list`"
            ))),
        }
    }

    pub(super) async fn set_paused(&self, vm: &str, paused: bool) -> Result<v1::VmReply, Status> {
        let found = self.find_vm(vm)?;
        let change = Change::SetPaused { vm: found.id, paused };
        let committed = commit(&self.controller, change).await?;
        // Intent first: should this leader die now, asking again does the rest.
        match orders::set_paused(&self.controller, &found, paused).await {
            Ok(()) => {
                if let Some(runner) = found.place.runner() {
                    self.controller.note(|observed| {
                        observed.note_paused(runner.node, found.id, runner.epoch, paused);
                    });
                }
                self.vm_reply(&found, 0)
            }
            // It may have been done, so the intent stays; asking again does the rest.
            Err(status) if orders::is_unknown(status.code()) => {
                let word = if paused { "pause" } else { "resume" };
                Err(Status::deadline_exceeded(format!(
                    "{word} VM {vm}: the outcome is unknown, ask again: {}",
                    status.message()
                )))
            }
            Err(status) if committed == Outcome::Unchanged => Err(status),
            Err(status) => {
                let undo = Change::SetPaused { vm: found.id, paused: !paused };
                commit(&self.controller, undo).await?;
                Err(status)
            }
        }
    }
}

/// What a request for a new VM says; the storage where it says nothing.
fn arbiter(word: &str) -> Result<Arbiter, Status> {
    let word = if word.is_empty() { "storage" } else { word };
    Arbiter::from_word(word).ok_or_else(|| {
        Status::invalid_argument(format!("the arbiter is `{word}`; give storage or lease"))
    })
}
