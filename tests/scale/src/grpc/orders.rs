//! The Agent service of one simulated host: every order is answered as if its VMM had done it, at
//! once. What a load does not order is not there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bellwether_agent::node::Node;
use bellwether_agent_core::Observation;
use bellwether_proto::v1;
use bellwether_proto::v1::agent_server::Agent;
use bellwether_types::{Epoch, VmId, VmState};
use futures::stream::Empty;
use tonic::{Request, Response, Status, Streaming};

use super::claims::Claims;

type Answered<T> = Result<Response<T>, Status>;

/// One host without a hypervisor.
#[derive(Clone)]
pub struct Host {
    pub node: Arc<Node>,
    pub claims: Arc<Claims>,
    /// The host has lost power: it answers nothing any more.
    pub dark: Arc<AtomicBool>,
}

/// What an order is about, checked as an agent checks it.
struct About {
    vm: VmId,
    epoch: Epoch,
}

impl Host {
    async fn about(&self, order: Option<v1::Order>) -> Result<About, Status> {
        if self.dark.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let order = order.ok_or_else(|| Status::invalid_argument("`order` is missing"))?;
        if order.boot_id != self.node.boot_id.to_string() {
            return Err(Status::unavailable("the order is for another boot"));
        }
        let highest = self.node.terms.hear(order.term);
        if highest.map_err(|error| Status::internal(error.to_string()))? > order.term {
            return Err(Status::failed_precondition("the leader is deposed"));
        }
        let vm = order.vm_id.parse();
        let vm = vm.map_err(|_| Status::invalid_argument("vm_id is not a UUID"))?;
        Ok(About { vm, epoch: Epoch(order.epoch) })
    }

    /// What the next report says; a change is reported at once, as a real agent does.
    fn post(&self, vm: VmId, epoch: Epoch, state: VmState) {
        let observation = Observation {
            epoch,
            state,
            reason: String::new(),
            memory_loaded_bytes: 0,
            memory_total_bytes: 0,
        };
        self.node.board.post(vm, Some(observation));
    }
}

fn absent<T>(what: &str) -> Answered<T> {
    Err(Status::unimplemented(format!("a simulated host has no {what}")))
}

#[tonic::async_trait]
impl Agent for Host {
    async fn inspect(&self, _: Request<v1::InspectRequest>) -> Answered<v1::InspectReply> {
        if self.dark.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(v1::InspectReply { problems: Vec::new() }))
    }

    async fn prepare(&self, request: Request<v1::PrepareRequest>) -> Answered<v1::PrepareReply> {
        let About { vm, epoch } = self.about(request.into_inner().order).await?;
        self.post(vm, epoch, VmState::Starting);
        Ok(Response::new(v1::PrepareReply { prepare_us: 0 }))
    }

    async fn take_over(
        &self,
        request: Request<v1::TakeOverRequest>,
    ) -> Answered<v1::TakeOverReply> {
        let About { vm, epoch } = self.about(request.into_inner().order).await?;
        let taken = self.claims.take(vm, epoch, self.node.id);
        let (held, holder) = (taken.is_ok(), taken.err().unwrap_or_default());
        Ok(Response::new(v1::TakeOverReply { held, holder, handover: None }))
    }

    async fn activate(&self, request: Request<v1::ActivateRequest>) -> Answered<v1::ActivateReply> {
        let About { vm, epoch } = self.about(request.into_inner().order).await?;
        self.claims.run(vm, epoch, self.node.id)?;
        self.post(vm, epoch, VmState::Running);
        Ok(Response::new(v1::ActivateReply { timings: None }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answered<v1::ReleaseReply> {
        let About { vm, epoch } = self.about(request.into_inner().order).await?;
        self.claims.let_go(vm, epoch, self.node.id);
        self.node.board.post(vm, None);
        let boot_id = self.node.boot_id.to_string();
        Ok(Response::new(v1::ReleaseReply { boot_id, reason: "stopped".into() }))
    }

    async fn remove_state(
        &self,
        request: Request<v1::RemoveStateRequest>,
    ) -> Answered<v1::RemoveStateReply> {
        self.about(request.into_inner().order).await?;
        Ok(Response::new(v1::RemoveStateReply { files_removed: 0 }))
    }

    async fn load_state(&self, _: Request<v1::LoadStateRequest>) -> Answered<v1::LoadStateReply> {
        absent("state files")
    }

    type PreCopyStream = Empty<Result<v1::PreCopyProgress, Status>>;

    async fn pre_copy(&self, _: Request<v1::StartPreCopyRequest>) -> Answered<Self::PreCopyStream> {
        absent("memory")
    }

    async fn end_pre_copy(
        &self,
        _: Request<v1::EndPreCopyRequest>,
    ) -> Answered<v1::EndPreCopyReply> {
        absent("memory")
    }

    async fn load_ahead(&self, _: Request<v1::LoadPiecesRequest>) -> Answered<v1::LoadAheadReply> {
        absent("memory")
    }

    async fn seal(&self, _: Request<v1::SealRequest>) -> Answered<v1::SealReply> {
        absent("memory")
    }

    async fn claim_back(&self, _: Request<v1::ClaimBackRequest>) -> Answered<v1::ClaimBackReply> {
        absent("state files")
    }

    async fn pause_vm(&self, _: Request<v1::PauseVmRequest>) -> Answered<v1::PauseVmReply> {
        absent("guests")
    }

    async fn resume_vm(&self, _: Request<v1::ResumeVmRequest>) -> Answered<v1::ResumeVmReply> {
        absent("guests")
    }

    async fn shutdown_vm(
        &self,
        _: Request<v1::ShutdownVmRequest>,
    ) -> Answered<v1::ShutdownVmReply> {
        absent("guests")
    }

    type ConsoleStream = Empty<Result<v1::ConsoleDown, Status>>;

    async fn console(&self, _: Request<Streaming<v1::ConsoleUp>>) -> Answered<Self::ConsoleStream> {
        absent("consoles")
    }

    type HoldTrialStream = Empty<Result<v1::TrialHeld, Status>>;

    async fn hold_trial(&self, _: Request<v1::TrialRequest>) -> Answered<Self::HoldTrialStream> {
        absent("storage")
    }

    async fn look_at_trial(&self, _: Request<v1::TrialRequest>) -> Answered<v1::TrialSight> {
        absent("storage")
    }
}
