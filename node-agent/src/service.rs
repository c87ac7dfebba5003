//! The Agent service: from the wire to the owners and back. See `agent.proto`.

mod pre_copy;
mod trial;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bellwether_agent_core::{Answer, Order};
use bellwether_proto::v1;
use bellwether_proto::v1::agent_server::Agent;
use bellwether_types::VmSpec;
use futures::{Stream, StreamExt, stream};
use tonic::{Request, Response, Status, Streaming};

use crate::inspect;
use crate::owner::{Command, Details, Reply};
use crate::registry::Registry;
use crate::wire;

/// The longest that an order may ask to wait for locks.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(600);
/// Looking at kernel, disks and storage; storage that takes longer is a problem of its own.
const INSPECT_MAX: Duration = Duration::from_secs(10);
/// How long a console may take to say which VM it is for.
const CONSOLE_HELLO_MAX: Duration = Duration::from_secs(10);

/// The service of one node.
#[derive(Clone, Debug)]
pub struct AgentService {
    registry: Arc<Registry>,
}

impl AgentService {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }

    async fn order(
        &self,
        order: Option<v1::Order>,
        what: Order,
        details: Details,
    ) -> Result<Reply, Status> {
        let (vm, stamped) = wire::stamped(order, what)?;
        self.registry.order(vm, Command { stamped, details }).await
    }

    async fn plain(&self, order: Option<v1::Order>, what: Order) -> Result<Answer, Status> {
        match self.order(order, what, Details::Plain).await? {
            Reply::Answer(answer) => Ok(answer),
            other => Err(unexpected(&other)),
        }
    }
}

/// A mistake of ours: the owner has answered another question.
fn unexpected(reply: &Reply) -> Status {
    Status::internal(format!("the agent has answered another order: {reply:?}"))
}

fn wait_of(ms: u64) -> Duration {
    Duration::from_millis(ms).min(LOCK_WAIT_MAX)
}

type Answered<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Agent for AgentService {
    async fn inspect(&self, request: Request<v1::InspectRequest>) -> Answered<v1::InspectReply> {
        let v1::InspectRequest { spec, storage } = request.into_inner();
        let spec = spec.ok_or_else(|| Status::invalid_argument("the field `spec` is missing"))?;
        let spec = VmSpec::try_from(spec)?;
        let root = PathBuf::from(&storage);
        let cluster = self.registry.cluster();
        let look = tokio::task::spawn_blocking(move || inspect::problems(&spec, &root, cluster));
        let problems = match tokio::time::timeout(INSPECT_MAX, look).await {
            Ok(problems) => problems.map_err(|error| Status::internal(error.to_string()))?,
            Err(_) => vec![format!(
                "the storage of the kernel, a disk or `{storage}` has not answered for {} s; \
                 check its mount on this node",
                INSPECT_MAX.as_secs()
            )],
        };
        Ok(Response::new(v1::InspectReply { problems }))
    }

    async fn prepare(&self, request: Request<v1::PrepareRequest>) -> Answered<v1::PrepareReply> {
        let request = request.into_inner();
        let arbiter = wire::arbiter(&request.arbiter)?;
        let spec = request.spec.ok_or_else(|| Status::invalid_argument("`spec` is missing"))?;
        // Checked here, so that a VMM is never started for a specification that cannot be.
        VmSpec::try_from(spec.clone())?;
        let details = Details::Prepare { spec: Box::new(spec), storage: request.storage.into() };
        match self.order(request.order, Order::Prepare { arbiter }, details).await? {
            Reply::Answer(Answer::Prepared { prepare_us }) => {
                Ok(Response::new(v1::PrepareReply { prepare_us }))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn take_over(
        &self,
        request: Request<v1::TakeOverRequest>,
    ) -> Answered<v1::TakeOverReply> {
        let request = request.into_inner();
        let details = Details::TakeOver { wait: wait_of(request.wait_ms) };
        let reply = match self.order(request.order, Order::TakeOver, details).await? {
            Reply::Answer(Answer::TakenOver { handover }) => v1::TakeOverReply {
                held: true,
                holder: String::new(),
                handover: handover.map(v1::Handover::from),
            },
            Reply::NotHeld { holder } => v1::TakeOverReply { held: false, holder, handover: None },
            other => return Err(unexpected(&other)),
        };
        Ok(Response::new(reply))
    }

    async fn load_state(
        &self,
        request: Request<v1::LoadStateRequest>,
    ) -> Answered<v1::LoadStateReply> {
        let request = request.into_inner();
        let file = wire::state_file(request.file)?;
        let what = Order::LoadState { hash: file.hash };
        match self.order(request.order, what, Details::LoadState { file }).await? {
            Reply::Answer(Answer::Loaded { load_us }) => {
                Ok(Response::new(v1::LoadStateReply { load_us }))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn activate(&self, request: Request<v1::ActivateRequest>) -> Answered<v1::ActivateReply> {
        let request = request.into_inner();
        let details = Details::Activate { lock_wait: wait_of(request.lock_wait_ms) };
        let what = Order::Activate { hash: wire::state_hash(&request.state_hash)? };
        match self.order(request.order, what, details).await? {
            Reply::Answer(Answer::Activated(timings)) => {
                let timings = Some(wire::activate_timings_out(&timings));
                Ok(Response::new(v1::ActivateReply { timings }))
            }
            other => Err(unexpected(&other)),
        }
    }

    type PreCopyStream = Pin<Box<dyn Stream<Item = Result<v1::PreCopyProgress, Status>> + Send>>;

    async fn pre_copy(
        &self,
        request: Request<v1::StartPreCopyRequest>,
    ) -> Answered<Self::PreCopyStream> {
        let stream = self.start_pre_copy(request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    async fn end_pre_copy(
        &self,
        request: Request<v1::EndPreCopyRequest>,
    ) -> Answered<v1::EndPreCopyReply> {
        self.plain(request.into_inner().order, Order::EndPreCopy).await?;
        Ok(Response::new(v1::EndPreCopyReply {}))
    }

    async fn load_ahead(
        &self,
        request: Request<v1::LoadPiecesRequest>,
    ) -> Answered<v1::LoadAheadReply> {
        self.load_pieces(request.into_inner()).await.map(Response::new)
    }

    async fn seal(&self, request: Request<v1::SealRequest>) -> Answered<v1::SealReply> {
        let request = request.into_inner();
        let details = Details::Seal { storage: request.storage.into() };
        match self.order(request.order, Order::Seal, details).await? {
            Reply::Answer(Answer::Sealed(sealed)) => Ok(Response::new(v1::SealReply {
                file: Some(v1::StateFile::from(&sealed.file)),
                timings: Some(wire::save_timings_out(&sealed.timings)),
            })),
            other => Err(unexpected(&other)),
        }
    }

    async fn claim_back(
        &self,
        request: Request<v1::ClaimBackRequest>,
    ) -> Answered<v1::ClaimBackReply> {
        let request = request.into_inner();
        let file = request.file.map(|file| wire::state_file(Some(file))).transpose()?;
        let what = Order::ClaimBack { sealed_epoch: bellwether_types::Epoch(request.sealed_epoch) };
        match self.order(request.order, what, Details::ClaimBack { file }).await? {
            Reply::Answer(Answer::ClaimedBack(timings)) => {
                let timings = Some(wire::activate_timings_out(&timings));
                Ok(Response::new(v1::ClaimBackReply { timings }))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answered<v1::ReleaseReply> {
        match self.plain(request.into_inner().order, Order::Release).await? {
            Answer::Released { reason } => {
                let boot_id = self.registry.boot_id().to_string();
                Ok(Response::new(v1::ReleaseReply { boot_id, reason }))
            }
            other => Err(unexpected(&Reply::Answer(other))),
        }
    }

    async fn pause_vm(&self, request: Request<v1::PauseVmRequest>) -> Answered<v1::PauseVmReply> {
        self.plain(request.into_inner().order, Order::Pause).await?;
        Ok(Response::new(v1::PauseVmReply {}))
    }

    async fn resume_vm(
        &self,
        request: Request<v1::ResumeVmRequest>,
    ) -> Answered<v1::ResumeVmReply> {
        self.plain(request.into_inner().order, Order::Resume).await?;
        Ok(Response::new(v1::ResumeVmReply {}))
    }

    async fn shutdown_vm(
        &self,
        request: Request<v1::ShutdownVmRequest>,
    ) -> Answered<v1::ShutdownVmReply> {
        self.plain(request.into_inner().order, Order::Shutdown).await?;
        Ok(Response::new(v1::ShutdownVmReply {}))
    }

    async fn remove_state(
        &self,
        request: Request<v1::RemoveStateRequest>,
    ) -> Answered<v1::RemoveStateReply> {
        let request = request.into_inner();
        let details =
            Details::RemoveState { storage: request.storage.into(), purge: request.purge };
        match self.order(request.order, Order::RemoveState, details).await? {
            Reply::Removed { files } => {
                Ok(Response::new(v1::RemoveStateReply { files_removed: files }))
            }
            other => Err(unexpected(&other)),
        }
    }

    type HoldTrialStream = Pin<Box<dyn Stream<Item = Result<v1::TrialHeld, Status>> + Send>>;

    async fn hold_trial(
        &self,
        request: Request<v1::TrialRequest>,
    ) -> Answered<Self::HoldTrialStream> {
        let held = trial::hold(request.into_inner(), self.registry.cluster()).await?;
        Ok(Response::new(Box::pin(held)))
    }

    async fn look_at_trial(&self, request: Request<v1::TrialRequest>) -> Answered<v1::TrialSight> {
        trial::look(request.into_inner(), self.registry.cluster()).await.map(Response::new)
    }

    type ConsoleStream = Pin<Box<dyn Stream<Item = Result<v1::ConsoleDown, Status>> + Send>>;

    async fn console(
        &self,
        request: Request<Streaming<v1::ConsoleUp>>,
    ) -> Answered<Self::ConsoleStream> {
        let mut up = request.into_inner();
        let hello = tokio::time::timeout(CONSOLE_HELLO_MAX, up.message()).await;
        let hello = hello.map_err(|_| Status::deadline_exceeded("the console sent no order"))??;
        let hello = hello.ok_or_else(|| Status::invalid_argument("the console sent no order"))?;
        let vmm = match self.order(hello.order, Order::Console, Details::Plain).await? {
            Reply::Connection(vmm) => vmm,
            other => return Err(unexpected(&other)),
        };
        // A console that breaks off has ended; the VM goes on without it.
        let typed =
            tokio_stream::StreamExt::map_while(up, |message| Some(input(message.ok()?.data)));
        let input = stream::iter([input(hello.data)]).chain(typed);
        let output = vmm.client().console(input).await?.into_inner();
        let down = output.map(|message| {
            message.map(|it| v1::ConsoleDown { data: it.data, dropped: it.dropped })
        });
        Ok(Response::new(Box::pin(down)))
    }
}

fn input(data: Vec<u8>) -> v1::ConsoleInput {
    v1::ConsoleInput { data }
}
