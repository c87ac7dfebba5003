//! A process that behaves like a VMM towards an agent, and misbehaves on demand. For the agent's
//! tests only: no guest runs in it, but it holds the real claim, so that takeovers are real.
//!
//! The VM's kernel command line says what goes wrong: `create=refused`, `start=hang`, `save=full`,
//! `save=hang`, `stop=hang`, `load=mute` (it loads, makes the file `loaded` beside its exit file, and
//! never answers).

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bellwether_claim::{Claim, ClaimRecord};
use bellwether_proto::v1;
use bellwether_proto::v1::vmm_server::{Vmm, VmmServer};
use bellwether_types::{Epoch, NodeId};
use futures::{Stream, StreamExt};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

#[derive(Default)]
struct State {
    state: &'static str,
    reason: String,
    epoch: u64,
    created: v1::CreateRequest,
    claim: Option<Claim>,
    sealed: Option<v1::SealedState>,
}

struct StandIn {
    state: Arc<Mutex<State>>,
    exit_file: PathBuf,
}

impl StandIn {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_told(&self, what: &str) -> bool {
        let state = self.lock();
        let cmdline = state.created.spec.as_ref().map_or("", |spec| spec.cmdline.as_str());
        cmdline.split(' ').any(|word| word == what)
    }

    fn exit(&self, reason: &str) -> Result<(), Status> {
        let text = format!("{{\"reason\":\"{reason}\"}}");
        std::fs::write(&self.exit_file, text).map_err(|error| Status::internal(error.to_string()))
    }
}

impl State {
    fn status(&self) -> v1::VmmStatus {
        v1::VmmStatus {
            vm_id: self.created.vm_id.clone(),
            epoch: self.epoch,
            state: self.state.to_owned(),
            reason: self.reason.clone(),
            locked: self.claim.is_some(),
            pid: std::process::id(),
            sealed: self.sealed.clone(),
            ..v1::VmmStatus::default()
        }
    }

    fn needs(&self, states: &[&str]) -> Result<(), Status> {
        match states.contains(&self.state) {
            true => Ok(()),
            false => Err(Status::failed_precondition(format!("the VMM is {}", self.state))),
        }
    }

    fn take_claim(&mut self, epoch: u64) -> Result<(), Status> {
        let bad = |error: &dyn std::fmt::Display| Status::failed_precondition(error.to_string());
        let record = ClaimRecord {
            vm_id: self.created.vm_id.parse().map_err(|error| bad(&error))?,
            epoch: Epoch(epoch),
            node: NodeId(self.created.node_id),
            boot_id: self.created.boot_id.parse().map_err(|error| bad(&error))?,
            nonce: u64::from(std::process::id()),
        };
        match &mut self.claim {
            Some(claim) => claim.raise(Epoch(epoch), record.nonce).map_err(|error| bad(&error))?,
            none => {
                let path = Path::new(&self.created.claim_path);
                *none = Some(Claim::acquire(path, record).map_err(|error| bad(&error))?);
            }
        }
        self.epoch = epoch;
        Ok(())
    }
}

type Answered<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Vmm for StandIn {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Answered<v1::VmmStatus> {
        Ok(Response::new(self.lock().status()))
    }

    async fn create(&self, request: Request<v1::CreateRequest>) -> Answered<v1::VmmStatus> {
        self.lock().created = request.into_inner();
        if self.is_told("create=refused") {
            return Err(Status::invalid_argument("kernel `/k`: no PVH entry"));
        }
        let mut state = self.lock();
        state.needs(&["empty"])?;
        state.state = "created";
        Ok(Response::new(state.status()))
    }

    async fn lock(&self, request: Request<v1::LockRequest>) -> Answered<v1::VmmStatus> {
        let mut state = self.lock();
        state.needs(&["created", "loaded"])?;
        state.take_claim(request.into_inner().epoch)?;
        Ok(Response::new(state.status()))
    }

    async fn load(&self, _: Request<v1::LoadRequest>) -> Answered<v1::LoadReply> {
        if self.is_told("load=mute") {
            self.lock().state = "loaded";
            std::fs::write(self.exit_file.with_file_name("loaded"), "")?;
            std::future::pending::<()>().await;
        }
        let mut state = self.lock();
        state.needs(&["created"])?;
        state.state = "loaded";
        Ok(Response::new(v1::LoadReply { status: Some(state.status()), load_us: 7 }))
    }

    async fn start(&self, request: Request<v1::StartRequest>) -> Answered<v1::StartReply> {
        if self.is_told("start=hang") {
            std::future::pending::<()>().await;
        }
        let mut state = self.lock();
        state.needs(&["created", "loaded", "sealed"])?;
        state.take_claim(request.into_inner().epoch)?;
        state.state = "running";
        state.sealed = None;
        let timings = v1::ActivateTimings { lock_us: 1, resume_us: 2, running_at_ns: 3 };
        Ok(Response::new(v1::StartReply { status: Some(state.status()), timings: Some(timings) }))
    }

    async fn pause(&self, _: Request<v1::PauseRequest>) -> Answered<v1::VmmStatus> {
        let mut state = self.lock();
        state.needs(&["running"])?;
        (state.state, state.reason) = ("paused", "administrator".into());
        Ok(Response::new(state.status()))
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Answered<v1::VmmStatus> {
        let mut state = self.lock();
        state.needs(&["paused"])?;
        (state.state, state.reason) = ("running", String::new());
        Ok(Response::new(state.status()))
    }

    async fn hand_over(&self, _: Request<v1::HandOverRequest>) -> Answered<v1::VmmStatus> {
        let state = self.lock();
        state.needs(&["sealed"])?;
        Ok(Response::new(state.status()))
    }

    async fn save(&self, request: Request<v1::SaveRequest>) -> Answered<v1::SaveReply> {
        if self.is_told("save=full") {
            return Err(Status::internal(
                "write state file: No space left on device (os error 28)",
            ));
        }
        if self.is_told("save=hang") {
            std::future::pending::<()>().await;
        }
        let request = request.into_inner();
        let mut state = self.lock();
        state.needs(&["running", "paused"])?;
        let name = format!("{}.{}.{}.state", state.created.vm_id, state.epoch, request.generation);
        let path = Path::new(&request.directory).join(name);
        std::fs::write(&path, "sealed").map_err(|error| Status::internal(error.to_string()))?;
        let file = v1::StateFile {
            path: path.display().to_string(),
            hash: vec![9; 32],
            epoch: state.epoch,
            bytes: 6,
        };
        let timings = v1::SaveTimings { stop_us: 4, ..v1::SaveTimings::default() };
        state.state = "sealed";
        state.sealed = Some(v1::SealedState { file: Some(file.clone()), timings: Some(timings) });
        Ok(Response::new(v1::SaveReply { file: Some(file), timings: Some(timings) }))
    }

    async fn stop(&self, _: Request<v1::StopRequest>) -> Answered<v1::StopReply> {
        if self.is_told("stop=hang") {
            std::future::pending::<()>().await;
        }
        self.exit("stopped")?;
        self.lock().claim = None;
        // The process ends when the agent has the answer and closes the connection, or kills it.
        tokio::spawn(async {
            tokio::task::yield_now().await;
            std::process::exit(0);
        });
        Ok(Response::new(v1::StopReply { reason: "stopped".into() }))
    }

    async fn shutdown(&self, _: Request<v1::ShutdownRequest>) -> Answered<v1::VmmStatus> {
        let status = self.lock().status();
        self.exit("guest-shutdown")?;
        tokio::spawn(async {
            tokio::task::yield_now().await;
            std::process::exit(0);
        });
        Ok(Response::new(status))
    }

    type PreCopyStream = Pin<Box<dyn Stream<Item = Result<v1::PreCopyProgress, Status>> + Send>>;

    async fn pre_copy(&self, _: Request<v1::PreCopyRequest>) -> Answered<Self::PreCopyStream> {
        Err(Status::unimplemented("the stand-in has no memory to copy"))
    }

    async fn load_ahead(&self, _: Request<v1::LoadAheadRequest>) -> Answered<v1::LoadAheadReply> {
        Err(Status::unimplemented("the stand-in has no memory to load"))
    }

    async fn abort_pre_copy(&self, _: Request<v1::AbortPreCopyRequest>) -> Answered<v1::VmmStatus> {
        Ok(Response::new(self.lock().status()))
    }

    type ConsoleStream = Pin<Box<dyn Stream<Item = Result<v1::ConsoleOutput, Status>> + Send>>;

    async fn console(
        &self,
        request: Request<Streaming<v1::ConsoleInput>>,
    ) -> Answered<Self::ConsoleStream> {
        let echo = request
            .into_inner()
            .map(|input| input.map(|input| v1::ConsoleOutput { data: input.data, dropped: 5 }));
        Ok(Response::new(Box::pin(echo)))
    }
}

fn argument(name: &str) -> PathBuf {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1).unwrap_or_else(|| panic!("{name} is missing")).into()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listener = UnixListener::bind(argument("--api-socket"))?;
    let state = Arc::new(Mutex::new(State { state: "empty", ..State::default() }));
    let service = StandIn { state, exit_file: argument("--exit-file") };
    tonic::transport::Server::builder()
        .add_service(VmmServer::new(service))
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await?;
    Ok(())
}
