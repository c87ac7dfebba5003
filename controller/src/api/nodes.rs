//! What agents tell: registrations, reports, and requests for the lease.

use std::sync::Arc;

use bellwether_core::command::Registration;
use bellwether_core::contact::{Contact, Next};
use bellwether_core::fence::Promise;
use bellwether_core::observe::VmReport;
use bellwether_member::not_started;
use bellwether_pki::caller;
use bellwether_proto::v1;
use bellwether_proto::v1::nodes_server::Nodes;
use bellwether_types::{BootId, Epoch, NodeId, VmId, VmState, WatchdogBound};
use tonic::{Request, Response, Status};

use super::{commit, view};
use crate::controller::Controller;

/// The most incarnations that one report may name.
const REPORT_VMS_MAX: usize = 4_096;
/// The longest reason why a node yields no proof.
const PROBLEM_LEN_MAX: usize = 512;

pub struct NodesApi {
    controller: Arc<Controller>,
}

impl NodesApi {
    pub fn new(controller: Arc<Controller>) -> Self {
        Self { controller }
    }

    /// A quorum says, after the request came in, that this controller leads: only then is a grant
    /// worth anything (protocol 1), and only then does a report count.
    async fn confirm(&self) -> Result<u64, Status> {
        let confirmed = self.controller.raft.confirm_leadership().await;
        confirmed.map(|confirmed| confirmed.term).map_err(|error| not_started(error.to_string()))
    }

    /// Takes a message in, as the core says, until there is an answer.
    async fn take(&self, mut contact: Contact) -> Result<Answer, Status> {
        loop {
            let now = self.controller.clock.now_ms();
            let next = contact.next(&self.controller.state(), now);
            match next {
                Next::Confirm => contact.confirmed(self.confirm().await?),
                Next::Note { node, report } => self.controller.take_report(node, report),
                Next::Commit(change) => drop(commit(&self.controller, change).await?),
                Next::Unregistered { term } => {
                    return Ok(Answer { term, register: true, ..Answer::default() });
                }
                Next::Known { boot_id } => {
                    return Ok(Answer { known: Some(boot_id), ..Answer::default() });
                }
                Next::Done { term, grants } => {
                    return Ok(Answer { term, grants, ..Answer::default() });
                }
            }
        }
    }
}

/// What is answered to an agent.
#[derive(Default)]
struct Answer {
    term: u64,
    grants: Vec<(VmId, Epoch)>,
    /// It has to register first.
    register: bool,
    /// The boot that its registration has to name.
    known: Option<BootId>,
}

#[tonic::async_trait]
impl Nodes for NodesApi {
    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterReply>, Status> {
        let identity = caller(&request)?.clone();
        let message = request.into_inner();
        let node = NodeId(identity.id);
        let boot_id = boot_id(&message.boot_id)?;
        let replaces = match message.replaces.is_empty() {
            true => None,
            false => Some(self::boot_id(&message.replaces)?),
        };
        let vms = reports(message.vms)?;
        if message.address.parse::<std::net::IpAddr>().is_err() {
            return Err(Status::invalid_argument(format!(
                "the address `{}` of the node is not an IP address",
                message.address
            )));
        }
        let agent_port = u16::try_from(message.agent_port)
            .map_err(|_| Status::invalid_argument("agent_port is not a port"))?;
        let registration = Registration {
            node,
            name: identity.name,
            boot_id,
            address: message.address,
            agent_port,
            memory_mib: message.memory_mib,
            vcpus: message.vcpus,
            version: message.version,
            replaces,
        };
        let answer = self.take(Contact::registration(registration, vms)).await?;
        let state = self.controller.state();
        let storage = state.cluster.as_ref().map(|cluster| cluster.storage.display().to_string());
        Ok(Response::new(v1::RegisterReply {
            storage: storage.unwrap_or_default(),
            lease_ms: self.controller.timing.lease_ms,
            known_boot_id: answer.known.map(|boot| boot.to_string()).unwrap_or_default(),
        }))
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::RenewReply>, Status> {
        let node = NodeId(caller(&request)?.id);
        let message = request.into_inner();
        let boot_id = boot_id(&message.boot_id)?;
        let vms = reports(message.vms)?;
        let mut contact = Contact::renewal(node, boot_id, message.nonce, vms);
        if let Some(watchdog) = message.watchdog {
            contact = contact.with_promise(promise(watchdog));
        }
        let answer = self.take(contact).await?;
        let grant =
            |(vm, epoch): (VmId, Epoch)| v1::Grant { vm_id: vm.to_string(), epoch: epoch.0 };
        let state = self.controller.state();
        Ok(Response::new(v1::RenewReply {
            nonce: message.nonce,
            lease_ms: self.controller.timing.lease_ms,
            term: answer.term,
            grants: answer.grants.into_iter().map(grant).collect(),
            controllers: state.controllers.values().map(view::member).collect(),
            register: answer.register,
            pulse_ms: self.controller.clock.now_ms(),
        }))
    }
}

fn promise(said: v1::Watchdog) -> Promise {
    let v1::Watchdog { problem, watchdog_ms, pet_ms, stop_ms } = said;
    match problem.is_empty() {
        true => Ok(WatchdogBound { watchdog_ms, pet_ms, stop_ms }),
        // It is kept in replicated state.
        false => Err(problem.chars().take(PROBLEM_LEN_MAX).collect()),
    }
}

fn boot_id(text: &str) -> Result<BootId, Status> {
    text.parse().map_err(|_| Status::invalid_argument(format!("boot_id `{text}` is not a UUID")))
}

fn reports(vms: Vec<v1::VmObservation>) -> Result<Vec<VmReport>, Status> {
    if vms.len() > REPORT_VMS_MAX {
        return Err(Status::invalid_argument(format!("a report of {} VMs is too long", vms.len())));
    }
    vms.into_iter().map(report).collect()
}

fn report(seen: v1::VmObservation) -> Result<VmReport, Status> {
    let vm = seen.vm_id.parse().map_err(|_| {
        Status::invalid_argument(format!("vm_id `{}` of a report is not a UUID", seen.vm_id))
    })?;
    let state = VmState::from_word(&seen.state).ok_or_else(|| {
        Status::invalid_argument(format!("`{}` of a report is not the state of a VM", seen.state))
    })?;
    Ok(VmReport {
        vm,
        epoch: Epoch(seen.epoch),
        state,
        reason: seen.reason,
        memory_loaded_bytes: seen.memory_loaded_bytes,
        memory_total_bytes: seen.memory_total_bytes,
    })
}
