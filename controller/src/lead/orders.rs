//! Orders to agents, and what their answers mean for a task.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bellwether_core::answer::{self, Failure, Kind};
use bellwether_core::observe::Seen;
use bellwether_core::reconcile::strays_of;
use bellwether_core::state::{Node, Runner};
use bellwether_core::task::{Measures, Retry};
use bellwether_core::{Attempt, Place, State, Step, StepEvent, Task, TaskKind, Vm, state_file};
use bellwether_proto::v1;
use bellwether_proto::v1::agent_client::AgentClient;
use bellwether_types::{
    BootId, Epoch, FenceProof, Handover, NodeId, PreCopy, StateFileRef, TaskId, VmId, VmSpec,
};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::Leadership;
use crate::controller::Controller;

/// How long an order may take before its outcome counts as unknown.
const SHORT: Duration = Duration::from_secs(15);
/// Reading what one order names.
const AHEAD: Duration = Duration::from_secs(60);
/// Sealing writes all of the guest's memory.
const SEAL: Duration = Duration::from_secs(600);

pub type Result<T> = std::result::Result<T, Failure>;

/// A sealed state, with the parts of the time that it took.
pub struct Sealed {
    pub file: StateFileRef,
    pub measures: Measures,
}

/// Orders on behalf of one task. What they need of the state is taken out when they are made; the
/// state itself is not kept.
pub struct Orders<'a> {
    controller: &'a Controller,
    leadership: Leadership,
    task: &'a Task,
    vm: Option<Vm>,
    /// Those that the task is about.
    nodes: Vec<Node>,
    storage: String,
    pre_copy_mib_s: u32,
}

impl<'a> Orders<'a> {
    pub fn new(controller: &'a Controller, leadership: Leadership, task: &'a Task) -> Self {
        let state = controller.state();
        let vm = state.vms.get(&task.vm).cloned();
        let concerned = concerned(task, vm.as_ref());
        let nodes = concerned.iter().filter_map(|id| state.nodes.get(id).cloned()).collect();
        let (storage, pre_copy_mib_s) = (storage(&state), state.settings.pre_copy_mib_s);
        Self { controller, leadership, task, vm, nodes, storage, pre_copy_mib_s }
    }

    fn vm(&self) -> Result<&Vm> {
        let gone = || Failure::Unknown("the VM is gone from the state".into());
        self.vm.as_ref().ok_or_else(gone)
    }

    fn node(&self, id: NodeId) -> Result<&Node> {
        let gone = || Failure::Unknown(format!("task {} is not about node {id}", self.task.id.0));
        self.nodes.iter().find(|node| node.id == id).ok_or_else(gone)
    }

    /// Without a connection nothing can be said of an order that may have been given before.
    fn agent(&self, id: NodeId) -> Result<AgentClient<Channel>> {
        self.controller.links.agent(self.node(id)?).map_err(Failure::Unknown)
    }

    /// An order to a node, in the boot that this leader knows of.
    fn order(&self, node: NodeId, epoch: Epoch) -> Result<Option<v1::Order>> {
        let (term, task, vm) = (self.leadership.term, self.task.id, self.task.vm);
        let order = order(term, task, vm, epoch, self.node(node)?);
        order.map(Some).map_err(Failure::Unknown)
    }

    /// The storage that the replicated state names: all controllers must mean the same claims.
    fn storage(&self) -> String {
        self.storage.clone()
    }

    pub async fn prepare(&self, attempt: Attempt) -> Result<StepEvent> {
        self.clear_the_way(attempt).await?;
        let vm = self.vm()?;
        let request = v1::PrepareRequest {
            order: self.order(attempt.node, attempt.epoch)?,
            spec: Some((&vm.spec).into()),
            arbiter: vm.arbiter().to_string(),
            storage: self.storage(),
        };
        let mut agent = self.agent(attempt.node)?;
        agent.prepare(within(SHORT, request)).await.map_err(failure)?;
        Ok(StepEvent::Prepared)
    }

    /// An agent holds one incarnation of a VM at a time: what an earlier fault left there goes first.
    async fn clear_the_way(&self, attempt: Attempt) -> Result<()> {
        let (node, vm) = (attempt.node, self.task.vm);
        let left = strays_of(&self.controller.state(), &self.controller.observed(), node, vm);
        for stray in left {
            self.release(Attempt { node: stray.node, epoch: stray.epoch }).await?;
        }
        Ok(())
    }

    pub async fn take_over(&self, attempt: Attempt) -> Result<StepEvent> {
        let wait_ms = self.controller.timing.lock_wait_ms;
        let request =
            v1::TakeOverRequest { order: self.order(attempt.node, attempt.epoch)?, wait_ms };
        let mut agent = self.agent(attempt.node)?;
        let reply = agent.take_over(within(SHORT, request)).await.map_err(failure)?.into_inner();
        let handover = reply.handover.map(Handover::try_from).transpose();
        let handover = handover.map_err(|error| refused(error.to_string()))?;
        Ok(match (reply.held, handover) {
            (true, None) => StepEvent::Held,
            (true, Some(handover)) => {
                let storage = PathBuf::from(self.storage());
                let file = state_file::handed_over(&storage, self.task.vm, &handover);
                StepEvent::HeldWithState { file }
            }
            (false, _) => StepEvent::Busy { holder: reply.holder },
        })
    }

    /// Whether the attempt can load ahead; an older agent cannot.
    pub async fn can_load_ahead(&self, attempt: Attempt) -> Result<bool> {
        match self.load_ahead(attempt, v1::LoadPiecesRequest::default()).await {
            Err(Failure::Refused { error, .. }) if error == UNIMPLEMENTED => Ok(false),
            outcome => outcome.map(|_| true),
        }
    }

    /// Loads pieces of the file that the source writes.
    pub async fn load_ahead(
        &self,
        attempt: Attempt,
        request: v1::LoadPiecesRequest,
    ) -> Result<v1::LoadAheadReply> {
        let order = self.order(attempt.node, attempt.epoch)?;
        let request = v1::LoadPiecesRequest { order, ..request };
        let mut agent = self.agent(attempt.node)?;
        let reply = agent.load_ahead(within(AHEAD, request)).await.map_err(unless_unknown_rpc)?;
        Ok(reply.into_inner())
    }

    /// Starts or joins the pre-copy of this task; none if the runner's VMM does not know how.
    pub async fn pre_copy(
        &self,
        source: &Runner,
        tell_pieces: bool,
    ) -> Result<Option<tonic::Streaming<v1::PreCopyProgress>>> {
        let rules = &self.vm()?.rules;
        let parallel = self.controller.timing.drain_parallel.max(1) as u64;
        let request = v1::StartPreCopyRequest {
            order: self.order(source.node, source.epoch)?,
            storage: self.storage(),
            downtime_ms: rules.downtime_ms,
            finish_anyway: rules.pre_copy == PreCopy::Finish,
            rate_bytes_per_s: (u64::from(self.pre_copy_mib_s) << 20) / parallel,
            tell_pieces,
        };
        // Without a deadline: it would be one of the whole stream.
        let mut agent = self.agent(source.node)?;
        match agent.pre_copy(Request::new(request)).await.map_err(unless_unknown_rpc) {
            Ok(reply) => Ok(Some(reply.into_inner())),
            Err(Failure::Refused { error, .. }) if error == UNIMPLEMENTED => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Ends the pre-copy of this task. One that cannot be reached gives up by itself.
    async fn end_pre_copy(&self, source: &Runner) -> Result<()> {
        let order = self.order(source.node, source.epoch)?;
        let request = within(SHORT, v1::EndPreCopyRequest { order });
        self.agent(source.node)?.end_pre_copy(request).await.map_err(failure)?;
        Ok(())
    }

    pub async fn seal(&self, source: &Runner) -> Result<Sealed> {
        let request = v1::SealRequest {
            order: self.order(source.node, source.epoch)?,
            storage: self.storage(),
        };
        let mut agent = self.agent(source.node)?;
        let begun = Instant::now();
        let reply = agent.seal(within(SEAL, request)).await.map_err(failure)?.into_inner();
        let file = reply.file.ok_or_else(|| Failure::Unknown("the answer has no file".into()))?;
        let file = StateFileRef::try_from(file).map_err(|error| refused(error.to_string()))?;
        let storage = PathBuf::from(self.storage());
        let checked = state_file::check(&storage, self.task.vm, source, &file);
        checked.map_err(|error| Failure::Refused { error, retry: Retry::Never })?;
        let timings = reply.timings.unwrap_or_default();
        let mut measures = Measures::from([
            ("stop_us".into(), timings.stop_us),
            ("save_us".into(), timings.save_us),
            ("seal_us".into(), timings.seal_us),
            ("memory_bytes".into(), timings.bytes_written),
            ("stopped_at_ns".into(), timings.stopped_at_ns),
        ]);
        measures.insert("seal_order_us".into(), micros(begun.elapsed()));
        measures.insert("sealed_at_us".into(), self.now_us());
        Ok(Sealed { file, measures })
    }

    pub async fn load(&self, attempt: Attempt, file: &StateFileRef) -> Result<StepEvent> {
        let request = v1::LoadStateRequest {
            order: self.order(attempt.node, attempt.epoch)?,
            file: Some(file.into()),
        };
        let mut agent = self.agent(attempt.node)?;
        let reply = agent.load_state(within(SHORT, request)).await.map_err(failure)?.into_inner();
        let measures = Measures::from([("load_us".into(), reply.load_us)]);
        Ok(StepEvent::Loaded { measures })
    }

    /// The source lets go and the attempt comes up, at once: the attempt waits for the locks.
    pub async fn activate(
        &self,
        attempt: Attempt,
        release: Option<Runner>,
        file: Option<&StateFileRef>,
    ) -> Result<StepEvent> {
        let committed_at = self.now_us();
        let release = async {
            if let Some(source) = release {
                let source = Attempt { node: source.node, epoch: source.epoch };
                if let Err(failure) = self.release(source).await {
                    tracing::warn!(task = self.task.id.0, ?failure, "the source was not released");
                }
            }
        };
        let request = v1::ActivateRequest {
            order: self.order(attempt.node, attempt.epoch)?,
            lock_wait_ms: self.controller.timing.lock_wait_ms,
            state_hash: file.map(|file| file.hash.to_vec()).unwrap_or_default(),
        };
        let mut agent = self.agent(attempt.node)?;
        let activate = async {
            let reply = agent.activate(within(SHORT, request)).await;
            (reply, self.now_us())
        };
        let ((reply, running_at), ()) = tokio::join!(activate, release);
        match reply {
            Ok(reply) => {
                let timings = reply.into_inner().timings.unwrap_or_default();
                let measures = self.outage(&timings, committed_at, running_at);
                Ok(StepEvent::Activated { measures })
            }
            Err(status) => uncertain(status),
        }
    }

    /// The parts of the outage after the seal, and the whole as this leader saw it.
    fn outage(
        &self,
        timings: &v1::ActivateTimings,
        committed_at: u64,
        running_at: u64,
    ) -> Measures {
        let mut measures = Measures::from([
            ("lock_us".into(), timings.lock_us),
            ("resume_us".into(), timings.resume_us),
            ("running_at_ns".into(), timings.running_at_ns),
        ]);
        let known = &self.task.measures;
        let part = |name: &str| known.get(name).copied().unwrap_or(0);
        if let Some(sealed_at) = known.get("sealed_at_us") {
            measures.insert("commit_us".into(), committed_at.saturating_sub(*sealed_at));
            let source = part("stop_us") + part("save_us") + part("seal_us");
            let outage = source + running_at.saturating_sub(*sealed_at);
            measures.insert("outage_us".into(), outage);
        }
        measures
    }

    pub async fn claim_back(
        &self,
        source: Attempt,
        sealed: Epoch,
        file: &StateFileRef,
    ) -> Result<StepEvent> {
        let request = v1::ClaimBackRequest {
            order: self.order(source.node, source.epoch)?,
            sealed_epoch: sealed.0,
            file: Some(file.into()),
        };
        let mut agent = self.agent(source.node)?;
        match agent.claim_back(within(SHORT, request)).await {
            Ok(reply) => {
                let timings = reply.into_inner().timings.unwrap_or_default();
                let measures = Measures::from([("resume_us".into(), timings.resume_us)]);
                Ok(StepEvent::ClaimedBack { measures })
            }
            Err(status) => uncertain(status),
        }
    }

    /// Whether the attempt's node answers or not, the task goes on: what is left there is a stray.
    pub async fn abandon(&self, attempt: Attempt) -> Result<StepEvent> {
        let runner = self.vm()?.place.runner().filter(|_| self.task.kind == TaskKind::Migrate);
        let end_pre_copy = async {
            match runner {
                Some(source) => self.end_pre_copy(source).await,
                None => Ok(()),
            }
        };
        let (released, ended) = tokio::join!(self.release(attempt), end_pre_copy);
        if let Err(failure) = ended {
            tracing::warn!(task = self.task.id.0, ?failure, "a pre-copy may go on for a while");
        }
        match released {
            Ok(released) => Ok(released),
            Err(failure) => {
                tracing::warn!(task = self.task.id.0, ?failure, "an attempt was left behind");
                let error = "the attempt was left behind as a stray".into();
                Ok(StepEvent::Failed { error, retry: Retry::OtherNode })
            }
        }
    }

    pub async fn release(&self, attempt: Attempt) -> Result<StepEvent> {
        let request = v1::ReleaseRequest { order: self.order(attempt.node, attempt.epoch)? };
        let mut agent = self.agent(attempt.node)?;
        let reply = agent.release(within(SHORT, request)).await.map_err(failure)?.into_inner();
        let boot_id: BootId = reply
            .boot_id
            .parse()
            .map_err(|_| refused(format!("the answer names the boot `{}`", reply.boot_id)))?;
        let proof = FenceProof::Released { node: attempt.node, boot_id };
        Ok(StepEvent::Released { proof, reason: reply.reason })
    }

    pub async fn ask_guest(&self, runner: &Runner) -> Result<StepEvent> {
        let ended =
            self.controller.observed().vm(self.task.vm, runner.node, runner.boot_id, runner.epoch)
                == Seen::Ended;
        if !ended {
            let request = v1::ShutdownVmRequest { order: self.order(runner.node, runner.epoch)? };
            let mut agent = self.agent(runner.node)?;
            agent.shutdown_vm(within(SHORT, request)).await.map_err(failure)?;
        }
        let until = self.controller.clock.now_ms() + self.controller.timing.shutdown_ms;
        Ok(StepEvent::Asked { until })
    }

    /// Removes state files that an earlier fault left behind: those sealed before the epoch from
    /// which this runner's state comes. What is left after that goes with the next start.
    pub async fn sweep(&self, attempt: Attempt, below: Epoch) {
        let Some(last) = below.0.checked_sub(1).filter(|last| *last > 0) else { return };
        if let Err(failure) = self.remove_state(attempt.node, Epoch(last), false).await {
            tracing::warn!(task = self.task.id.0, ?failure, "old state files may be left");
        }
    }

    /// Removes the sealed state files of the VM up to an epoch; a purge takes its claim with them.
    async fn remove_state(&self, node: NodeId, up_to: Epoch, purge: bool) -> Result<()> {
        let order = self.order(node, up_to)?;
        let request = v1::RemoveStateRequest { order, storage: self.storage(), purge };
        let mut agent = self.agent(node)?;
        agent.remove_state(within(SHORT, request)).await.map(drop).map_err(failure)
    }

    pub async fn purge(&self, node: NodeId) -> Result<StepEvent> {
        self.remove_state(node, self.vm()?.epoch, true).await?;
        Ok(StepEvent::Purged)
    }

    /// This leader's clock in microseconds: only differences of one leader mean anything.
    fn now_us(&self) -> u64 {
        self.controller.clock.now_us()
    }
}

/// The nodes that an order of a task can be for: those that its step names, and the VM's runner.
fn concerned(task: &Task, vm: Option<&Vm>) -> Vec<NodeId> {
    let runner = match vm.map(|vm| &vm.place) {
        Some(Place::Runner(runner) | Place::Revoked(runner)) => Some(runner.node),
        Some(Place::Sealed { sealer, .. }) => sealer.as_ref().map(|sealer| sealer.node),
        Some(Place::Stopped) | None => None,
    };
    let other = match &task.step {
        Step::Activate { from, .. } => from.as_ref().map(|from| from.node),
        Step::Release(runner) => Some(runner.node),
        Step::ClaimBack { source, .. } => Some(source.node),
        Step::Purge(node) => Some(*node),
        _ => None,
    };
    let attempt = task.step.attempt().map(|attempt| attempt.node);
    [attempt, other, runner].into_iter().flatten().collect()
}

/// An order to a node in the boot that is known of it, given by whoever leads now.
pub fn order(
    term: u64,
    task: TaskId,
    vm: VmId,
    epoch: Epoch,
    node: &Node,
) -> std::result::Result<v1::Order, String> {
    let unknown = || format!("node {} has never registered; start its agent", node.name);
    let boot_id = node.boot_id.ok_or_else(unknown)?.to_string();
    Ok(v1::Order { term, task: task.0, vm_id: vm.to_string(), epoch: epoch.0, boot_id })
}

/// Asks a node whether a VM's files are there and good.
pub async fn inspect(
    controller: &Controller,
    node: &Node,
    spec: &VmSpec,
) -> std::result::Result<Vec<String>, Status> {
    let storage = storage(&controller.state());
    let request = v1::InspectRequest { spec: Some(spec.into()), storage };
    let mut agent = controller.links.agent(node).map_err(Status::unavailable)?;
    Ok(agent.inspect(within(SHORT, request)).await?.into_inner().problems)
}

/// Pauses or resumes the guest of a running VM.
pub async fn set_paused(
    controller: &Controller,
    vm: &Vm,
    paused: bool,
) -> std::result::Result<(), Status> {
    let Place::Runner(runner) = &vm.place else {
        return Err(Status::failed_precondition(format!("VM {} is not running", vm.spec.name)));
    };
    let confirmed = controller.raft.confirm_leadership().await;
    let term = confirmed.map_err(|error| Status::unavailable(error.to_string()))?.term;
    let node = controller.state().nodes.get(&runner.node).cloned();
    let node = node.ok_or_else(|| Status::unavailable("the VM's node is gone"))?;
    let mut agent = controller.links.agent(&node).map_err(Status::unavailable)?;
    let order = order(term, TaskId(0), vm.id, runner.epoch, &node).map_err(Status::unavailable)?;
    let order = Some(order);
    match paused {
        true => agent.pause_vm(within(SHORT, v1::PauseVmRequest { order })).await.map(drop),
        false => agent.resume_vm(within(SHORT, v1::ResumeVmRequest { order })).await.map(drop),
    }
}

pub fn storage(state: &State) -> String {
    let cluster = state.cluster.as_ref();
    cluster.map(|cluster| cluster.storage.display().to_string()).unwrap_or_default()
}

fn within<T>(timeout: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn refused(error: String) -> Failure {
    Failure::Refused { error, retry: Retry::OtherNode }
}

/// What the code of a status says (`agent.proto`).
fn kind(code: Code) -> Kind {
    match code {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            Kind::Silent
        }
        Code::Aborted => Kind::NeverRan,
        Code::DataLoss | Code::InvalidArgument => Kind::Unfit,
        _ => Kind::Refused,
    }
}

/// The kind of an answer, and its text for people.
fn read(status: &Status) -> (Kind, String) {
    let error = status.message();
    match kind(status.code()) {
        Kind::Silent => (Kind::Silent, format!("{:?}: {error}", status.code())),
        kind => (kind, error.to_owned()),
    }
}

/// Whether a status says nothing about what happened on the other side.
pub fn is_unknown(code: Code) -> bool {
    kind(code) == Kind::Silent
}

fn failure(status: Status) -> Failure {
    let (kind, error) = read(&status);
    answer::failure(kind, error)
}

/// The text of a refusal by somebody who does not know the order.
const UNIMPLEMENTED: &str = "it is of an older release, which does not know this order";

/// The same, and tells an order that the other side does not know.
fn unless_unknown_rpc(status: Status) -> Failure {
    match status.code() {
        Code::Unimplemented => refused(UNIMPLEMENTED.into()),
        _ => failure(status),
    }
}

/// After an order that lets the guest run, only ABORTED says that it has not run.
fn uncertain(status: Status) -> Result<StepEvent> {
    let (kind, error) = read(&status);
    let meaning = answer::uncertain(kind, error);
    if meaning == Ok(StepEvent::TimedOut) {
        tracing::warn!(%status, "it is not known whether the guest ran");
    }
    meaning
}
