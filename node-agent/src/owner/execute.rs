//! The orders about a VMM that exists.

use std::path::Path;
use std::time::Duration;

use bellwether_agent_core::{Action, Answer, Outcome, VmmState};
use bellwether_proto::v1;
use bellwether_proto::v1::vmm_client::VmmClient;
use bellwether_types::{Arbiter, ClusterId, Epoch, StateFileRef};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{Command, Details, Owner, Reply};
use crate::storage::{self, StorageError};
use crate::vmm::{CallError, Vmm, bounded};
use crate::wire;

/// Reading and checking a state file's header and device states, on storage that may be slow.
const LOAD_MAX: Duration = Duration::from_secs(60);
/// The first instruction after the locks are held.
const START_MAX: Duration = Duration::from_secs(30);
/// Writing all memory of a large guest to slow storage.
const SAVE_MAX: Duration = Duration::from_secs(1800);
/// An abort waits for the writes that are under way, for at most ten seconds.
const END_PRE_COPY_MAX: Duration = Duration::from_secs(15);
/// Pause, resume and shutdown only reach for the vCPUs.
const SHORT_MAX: Duration = Duration::from_secs(10);
/// From the end of a VMM's connection to the end of its process.
const EXIT_MAX: Duration = Duration::from_secs(2);
/// How long an activation under the lease arbiter waits for the grant of its epoch.
const GRANT_MAX: Duration = Duration::from_secs(3);

/// An execution that did not succeed.
#[derive(Debug)]
pub struct Failure {
    pub status: Status,
    /// It may have happened, or may still happen.
    pub unknown: bool,
    /// A save failed: the text is to say what became of the guest.
    pub sealing: bool,
}

impl Failure {
    /// It did not happen.
    pub fn failed(status: Status) -> Self {
        Self { status, unknown: false, sealing: false }
    }
    /// It may have happened.
    pub fn unknown(status: Status) -> Self {
        Self { status, unknown: true, sealing: false }
    }
    /// The same for the machine.
    pub fn outcome(&self) -> Outcome {
        match self.unknown {
            true => Outcome::Unknown,
            false => Outcome::Failed,
        }
    }
    pub fn internal(text: impl Into<String>) -> Self {
        Self::failed(Status::internal(text))
    }
    pub fn precondition(text: impl Into<String>) -> Self {
        Self::failed(Status::failed_precondition(text))
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        let text = error.to_string();
        match error {
            CallError::Refused(status) => Self::failed(definite(status)),
            CallError::Timeout { .. } | CallError::Lost { .. } | CallError::Released { .. } => {
                Self::unknown(Status::deadline_exceeded(format!("{text}; outcome unknown")))
            }
            CallError::Connect { .. } => Self::failed(Status::unavailable(text)),
        }
    }
}

/// To the controller some codes leave the outcome open (`agent.proto`). What is known not to have
/// happened must not arrive under one of them, or the order would be given again for ever.
pub(super) fn definite(status: Status) -> Status {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            Status::internal(status.message())
        }
        _ => status,
    }
}

impl Owner {
    /// Carries out an admitted action.
    pub(super) async fn execute(
        &mut self,
        action: Action,
        command: &Command,
    ) -> Result<Reply, Failure> {
        if let (Action::Load, Details::LoadState { file }, Some(body)) =
            (&action, &command.details, &mut self.body)
        {
            body.loaded_file = Some(file.path.clone());
        }
        // Persist before send: a later agent must know that the guest may have run, and which file
        // may be loaded.
        if let Err(error) = self.save_record()
            && action.needs_record()
        {
            let text = format!("{error}; the VMM was not asked for anything, ask again");
            return Err(Failure::failed(Status::unavailable(text)));
        }
        match (action, &command.details) {
            (Action::Answer(answer), _) => Ok(Reply::Answer(answer)),
            (Action::Prepare { .. }, _) => self.prepare(command).await,
            (Action::Release, _) => self.release().await,
            (Action::GiveUp(why), _) => self.give_up(command, why).await,
            (Action::Lock, Details::TakeOver { wait }) => self.lock(command, *wait).await,
            (Action::Load, Details::LoadState { file }) => self.load(command, file).await,
            (Action::Start, Details::Activate { lock_wait }) => {
                self.activate(command, *lock_wait).await
            }
            (Action::PreCopy, Details::PreCopy { storage }) => {
                ensure_storage(storage, self.node.cluster).await?;
                Ok(Reply::Connection(self.connection()?.clone()))
            }
            (Action::EndPreCopy, _) => self.end_pre_copy(command).await,
            (Action::LoadAhead, _) => Ok(Reply::Connection(self.connection()?.clone())),
            (Action::Save, Details::Seal { storage }) => {
                self.save(command, storage).await.map_err(|it| Failure { sealing: true, ..it })
            }
            (Action::ClaimBack, Details::ClaimBack { file }) => {
                self.claim_back(command, file.as_ref()).await
            }
            (Action::HandOver, _) => self.hand_over(command).await,
            (Action::Pause, _) => self.pause(command).await,
            (Action::Resume, _) => self.resume(command).await,
            (Action::Shutdown, _) => self.shut_down(command).await,
            (Action::Console, _) => Ok(Reply::Connection(self.connection()?.clone())),
            (Action::RemoveState, Details::RemoveState { storage, purge }) => {
                self.remove_state(command, storage, *purge).await
            }
            (action, _) => Err(Failure::internal(format!("{action:?} without its details"))),
        }
    }

    fn connection(&self) -> Result<&Vmm, Failure> {
        let vmm = self.body.as_ref().and_then(|body| body.vmm());
        vmm.ok_or_else(|| {
            let text =
                format!("VM {}: its VMM cannot be reached; ask again or release it", self.vm);
            Failure::failed(Status::unavailable(text))
        })
    }

    pub(super) fn client(&self) -> Result<VmmClient<Channel>, Failure> {
        Ok(self.connection()?.client())
    }

    async fn load(&mut self, command: &Command, file: &StateFileRef) -> Result<Reply, Failure> {
        let mut client = self.client()?;
        let request = v1::LoadRequest { file: Some(v1::StateFile::from(file)) };
        let recall = self.recall(&command.stamped);
        let reply =
            bounded("load", self.node.allow(LOAD_MAX), recall, client.load(request)).await?;
        Ok(Reply::Answer(Answer::Loaded { load_us: reply.load_us }))
    }

    async fn activate(&mut self, command: &Command, wait: Duration) -> Result<Reply, Failure> {
        let epoch = command.stamped.epoch;
        self.show_page(epoch).await?;
        let loaded = self.machine.current().is_some_and(|current| current.loaded.is_some());
        let timings = self.start(command, wait, loaded).await?;
        Ok(Reply::Answer(Answer::Activated(wire::activate_timings(timings))))
    }

    async fn claim_back(
        &mut self,
        command: &Command,
        file: Option<&StateFileRef>,
    ) -> Result<Reply, Failure> {
        let epoch = command.stamped.epoch;
        self.show_page(epoch).await?;
        let timings = self.start(command, Duration::ZERO, true).await?;
        if let Some(file) = file {
            self.remove_claimed(file).await;
        }
        Ok(Reply::Answer(Answer::ClaimedBack(wire::activate_timings(timings))))
    }

    /// The guest has gone on, so the file must never be restored. The replicated state forbids it
    /// already; a file that cannot be removed only takes up space.
    async fn remove_claimed(&self, file: &StateFileRef) {
        let path = file.path.clone();
        if storage::state_file_epoch(self.vm, &path).is_none() {
            tracing::warn!(vm_id = %self.vm, path = %path.display(), "not a state file's name");
            return;
        }
        let removed = on_storage(&file.path, move || storage::remove_state(&path)).await;
        if let Err(failure) = removed {
            let reason = failure.status.message();
            tracing::warn!(vm_id = %self.vm, reason, "the claimed state file stays");
        }
    }

    /// The page comes before the start, because the VMM looks at it before its first instruction.
    async fn show_page(&self, epoch: Epoch) -> Result<(), Failure> {
        let arbiter = self.machine.current().map_or(Arbiter::Lease, |current| current.arbiter);
        if arbiter == Arbiter::Storage {
            self.node.desk.show_epoch(self.vm, epoch);
            return Ok(());
        }
        // The lease may be older than this epoch: only an answer that names it is leave to run it.
        // It also has to be to a request that was made after the record said that this VM may run:
        // such a request told of a watchdog that could not be disarmed any more.
        let newest = self.node.desk.newest_request();
        self.node.board.hurry();
        let wait = self.node.allow(GRANT_MAX);
        match self.node.desk.granted(self.vm, epoch, newest, wait).await {
            true => Ok(()),
            false => Err(Failure::failed(Status::unavailable(format!(
                "VM {} under epoch {epoch}: no controller has granted it to this node within {} \
                 ms; ask again when the node renews its lease",
                self.vm,
                wait.as_millis()
            )))),
        }
    }

    async fn start(
        &self,
        command: &Command,
        lock_wait: Duration,
        consume_state_file: bool,
    ) -> Result<v1::ActivateTimings, Failure> {
        let mut client = self.client()?;
        let request = v1::StartRequest {
            epoch: command.stamped.epoch.0,
            lock_wait_ms: millis(lock_wait),
            consume_state_file,
        };
        let after = self.node.allow(START_MAX).saturating_add(lock_wait);
        let recall = self.recall(&command.stamped);
        let reply = bounded("start", after, recall, client.start(request)).await?;
        Ok(reply.timings.unwrap_or_default())
    }

    async fn save(&mut self, command: &Command, storage: &Path) -> Result<Reply, Failure> {
        ensure_storage(storage, self.node.cluster).await?;
        let mut client = self.client()?;
        let request = v1::SaveRequest {
            directory: storage::state_dir(storage).display().to_string(),
            generation: command.stamped.task,
        };
        let recall = self.recall(&command.stamped);
        let saved = bounded("save", SAVE_MAX, recall, client.save(request)).await;
        let reply = saved.map_err(|error| save_failure(self.vm.to_string(), error))?;
        let sealed = wire::saved(reply).map_err(|error| {
            Failure::unknown(Status::internal(format!("the VMM's answer to save: {error}")))
        })?;
        Ok(Reply::Answer(Answer::Sealed(sealed)))
    }

    /// Records it in the claim, and ends the VMM, whose locks go with it. What was sealed is still
    /// told to whoever asks.
    async fn hand_over(&mut self, command: &Command) -> Result<Reply, Failure> {
        let mut client = self.client()?;
        let recall = self.recall(&command.stamped);
        let call = client.hand_over(v1::HandOverRequest {});
        bounded("hand over", STORAGE_MAX, recall, call).await?;
        let reason = self.end_process().await?;
        self.machine.ended(&reason);
        Ok(Reply::Answer(Answer::Done))
    }

    /// A VMM that knows no pre-copy has none to end.
    async fn end_pre_copy(&mut self, command: &Command) -> Result<Reply, Failure> {
        let mut client = self.client()?;
        let recall = self.recall(&command.stamped);
        let call = client.abort_pre_copy(v1::AbortPreCopyRequest {});
        match bounded("end of the pre-copy", END_PRE_COPY_MAX, recall, call).await {
            Err(CallError::Refused(status)) if status.code() == Code::Unimplemented => {}
            other => drop(other?),
        }
        Ok(Reply::Answer(Answer::Done))
    }

    async fn pause(&mut self, command: &Command) -> Result<Reply, Failure> {
        let mut client = self.client()?;
        let recall = self.recall(&command.stamped);
        let call = client.pause(v1::PauseRequest {});
        self.reached(
            VmmState::Paused,
            bounded("pause", self.node.allow(SHORT_MAX), recall, call).await,
        )
        .await
    }

    async fn resume(&mut self, command: &Command) -> Result<Reply, Failure> {
        let mut client = self.client()?;
        let recall = self.recall(&command.stamped);
        let call = client.resume(v1::ResumeRequest {});
        self.reached(
            VmmState::Running,
            bounded("resume", self.node.allow(SHORT_MAX), recall, call).await,
        )
        .await
    }

    /// An order that was carried out before is refused by the VMM and still answered as before.
    async fn reached(
        &mut self,
        goal: VmmState,
        result: Result<v1::VmmStatus, CallError>,
    ) -> Result<Reply, Failure> {
        self.look().await;
        match result {
            Err(_) if self.sees(goal) => Ok(Reply::Answer(Answer::Done)),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(Reply::Answer(Answer::Done)),
        }
    }

    /// Whether the process is gone, or goes at once. Its end is taken in as an event afterwards.
    async fn has_ended(&self) -> bool {
        let exit = super::body::exit_of(self.body.as_ref());
        tokio::time::timeout(EXIT_MAX, exit).await.is_ok()
    }

    async fn shut_down(&mut self, command: &Command) -> Result<Reply, Failure> {
        let mut client = self.client()?;
        let recall = self.recall(&command.stamped);
        let call = client.shutdown(v1::ShutdownRequest {});
        match bounded("shutdown", self.node.allow(SHORT_MAX), recall, call).await {
            // A guest that is quick ends its VMM before the answer is out: that was the order.
            Err(CallError::Lost { .. }) if self.has_ended().await => {}
            other => drop(other?),
        }
        Ok(Reply::Answer(Answer::Done))
    }
}

/// Storage that does not answer must not hold up the agent: its calls run on threads of their own,
/// and are waited for only so long.
const STORAGE_MAX: Duration = Duration::from_secs(15);

/// Does something on the shared storage.
pub(super) async fn on_storage<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, Failure> {
    within(STORAGE_MAX, path, work).await
}

async fn within<T: Send + 'static>(
    at_most: Duration,
    path: &Path,
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::time::timeout(at_most, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result.map_err(|error| Failure::precondition(error.to_string())),
        Ok(Err(error)) => Err(Failure::internal(format!("`{}`: {error}", path.display()))),
        Err(_) => Err(Failure::unknown(Status::deadline_exceeded(format!(
            "the storage `{}` has not answered for {} s; check its mount on this node",
            path.display(),
            at_most.as_secs()
        )))),
    }
}

/// The storage is there, it is the cluster's, and the directories are in it.
pub(super) async fn ensure_storage(storage: &Path, cluster: ClusterId) -> Result<(), Failure> {
    let root = storage.to_owned();
    ensured(STORAGE_MAX, storage, move || storage::require_dirs(&root, cluster)).await
}

/// Nothing has been asked of a VMM yet, so even silence of the storage leaves nothing open.
async fn ensured(
    at_most: Duration,
    storage: &Path,
    work: impl FnOnce() -> Result<(), StorageError> + Send + 'static,
) -> Result<(), Failure> {
    within(at_most, storage, work)
        .await
        .map_err(|failure| Failure::failed(definite(failure.status)))
}

/// An error of a save, with the kind that its cause deserves.
fn save_failure(vm: String, error: CallError) -> Failure {
    let CallError::Refused(status) = error else { return error.into() };
    let full = status.code() == Code::ResourceExhausted
        || status.message().contains("No space left")
        || status.message().contains("quota exceeded");
    let code = match (full, status.code()) {
        (true, _) => Code::ResourceExhausted,
        (false, code @ (Code::FailedPrecondition | Code::InvalidArgument)) => code,
        (false, _) => Code::Internal,
    };
    Failure::failed(Status::new(code, format!("save VM {vm}: {}", status.message())))
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_storage_has_its_own_kind() {
        let enospc = Status::internal("write x: No space left on device (os error 28)");
        let failure = save_failure("v".into(), CallError::Refused(enospc));
        assert_eq!(failure.status.code(), Code::ResourceExhausted);
        assert_eq!(failure.outcome(), Outcome::Failed);
        let other = save_failure("v".into(), CallError::Refused(Status::unknown("checksum")));
        assert_eq!(other.status.code(), Code::Internal);
    }

    #[tokio::test]
    async fn hung_storage_before_a_prepare_or_a_save_leaves_nothing_open() {
        let (hangs, answer) = std::sync::mpsc::channel::<()>();
        let work = move || {
            let _ = answer.recv_timeout(Duration::from_secs(60));
            Ok(())
        };
        let failure = ensured(Duration::from_millis(1), Path::new("/s"), work).await.unwrap_err();
        assert_eq!(failure.status.code(), Code::Internal, "another node is to be tried");
        assert_eq!(failure.outcome(), Outcome::Failed);
        drop(hangs);
    }

    #[test]
    fn a_lost_save_is_unknown_whatever_its_code_was() {
        let lost = CallError::Lost { what: "save", detail: "h2: enhance your calm".into() };
        let failure = save_failure("v".into(), lost);
        assert_eq!(failure.status.code(), Code::DeadlineExceeded);
        assert_eq!(failure.outcome(), Outcome::Unknown);
    }

    #[test]
    fn a_timeout_is_unknown_and_never_a_failure() {
        let timeout = CallError::Timeout { what: "start", after: Duration::from_millis(5) };
        let failure = Failure::from(timeout);
        assert_eq!(failure.status.code(), Code::DeadlineExceeded);
        assert_eq!(failure.outcome(), Outcome::Unknown);
        assert!(failure.status.message().contains("outcome unknown"));
    }
}
