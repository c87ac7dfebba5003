//! The service: each call becomes a command to the driver, but for status and console.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bellwether_memory::AheadStats;
use bellwether_proto::v1::vmm_server::Vmm;
use bellwether_proto::v1::{
    AbortPreCopyRequest, ConsoleInput, ConsoleOutput, CreateRequest, HandOverRequest,
    LoadAheadReply, LoadAheadRequest, LoadReply, LoadRequest, LockRequest, PauseRequest,
    PreCopyProgress, PreCopyRequest, ResumeRequest, SaveReply, SaveRequest, ShutdownRequest,
    StartReply, StartRequest, StatusRequest, StopReply, StopRequest, VmmStatus,
};
use bellwether_types::{Epoch, StateFileRef};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{console, convert, pre_copy};
use crate::clock;
use crate::devices::serial::Serial;
use crate::driver::{Command, Handle, Reply};

/// Nobody waits longer than this for locks; a longer wait is a mistake of units.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(3600);

pub struct Service {
    handle: Handle,
}

impl Service {
    pub fn new(handle: Handle) -> Self {
        Self { handle }
    }

    /// Sends a command and waits for its answer.
    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Status> {
        let ended = || Status::unavailable("the VMM is ending");
        let (reply, answer) = Reply::new();
        self.handle.commands.send(command(reply)).map_err(|_| ended())?;
        Ok(answer.await.map_err(|_| ended())??)
    }

    fn status(&self) -> VmmStatus {
        convert::to_status(&self.handle.board.view())
    }

    /// A command without a result of its own is answered with the status after it.
    async fn ask_status(
        &self,
        command: impl FnOnce(Reply<()>) -> Command,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(command).await?;
        Ok(Response::new(self.status()))
    }

    fn serial(&self) -> Result<Arc<Serial>, Status> {
        let view = self.handle.board.view();
        let machine = view.machine.as_ref();
        let serial = machine.map(|machine| Arc::clone(&machine.serial));
        serial.ok_or_else(|| Status::failed_precondition("no machine has been created"))
    }
}

fn wait(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds).min(LOCK_WAIT_MAX)
}

#[tonic::async_trait]
impl Vmm for Service {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<VmmStatus>, Status> {
        Ok(Response::new(Service::status(self)))
    }

    async fn create(&self, request: Request<CreateRequest>) -> Result<Response<VmmStatus>, Status> {
        let config = Box::new(convert::to_config(request.into_inner())?);
        self.ask_status(|reply| Command::Create(config, reply)).await
    }

    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<VmmStatus>, Status> {
        let LockRequest { epoch, wait_ms } = request.into_inner();
        self.ask_status(|reply| Command::Lock { epoch, wait: wait(wait_ms), reply }).await
    }

    async fn load(&self, request: Request<LoadRequest>) -> Result<Response<LoadReply>, Status> {
        let file = request.into_inner().file;
        let file = file.ok_or_else(|| Status::invalid_argument("the field `file` is missing"))?;
        let file = StateFileRef::try_from(file)?;
        let load_us = self.ask(|reply| Command::Load { file, reply }).await?;
        Ok(Response::new(LoadReply { status: Some(Service::status(self)), load_us }))
    }

    async fn load_ahead(
        &self,
        request: Request<LoadAheadRequest>,
    ) -> Result<Response<LoadAheadReply>, Status> {
        let LoadAheadRequest { path, epoch, generation, pieces } = request.into_inner();
        let pieces = pre_copy::to_pieces(pieces)?;
        let (path, epoch) = (PathBuf::from(path), Epoch(epoch));
        let begun = clock::boottime_ns();
        let command = |reply| Command::LoadAhead { path, epoch, generation, pieces, reply };
        let AheadStats { bytes: loaded_bytes, left_out } = self.ask(command).await?;
        let load_us = clock::us_since(begun);
        Ok(Response::new(LoadAheadReply { loaded_bytes, left_out, load_us }))
    }

    async fn start(&self, request: Request<StartRequest>) -> Result<Response<StartReply>, Status> {
        let StartRequest { epoch, lock_wait_ms, consume_state_file: consume } =
            request.into_inner();
        let wait = wait(lock_wait_ms);
        let activated = self.ask(|reply| Command::Start { epoch, wait, consume, reply }).await?;
        let timings = Some(convert::to_activated(activated));
        Ok(Response::new(StartReply { status: Some(Service::status(self)), timings }))
    }

    async fn pause(&self, _: Request<PauseRequest>) -> Result<Response<VmmStatus>, Status> {
        self.ask_status(Command::Pause).await
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Result<Response<VmmStatus>, Status> {
        self.ask_status(Command::Resume).await
    }

    async fn hand_over(&self, _: Request<HandOverRequest>) -> Result<Response<VmmStatus>, Status> {
        self.ask_status(Command::HandOver).await
    }

    async fn save(&self, request: Request<SaveRequest>) -> Result<Response<SaveReply>, Status> {
        let SaveRequest { directory, generation } = request.into_inner();
        if directory.is_empty() {
            return Err(Status::invalid_argument("the field `directory` is missing"));
        }
        let directory = PathBuf::from(directory);
        let sealed = self.ask(|reply| Command::Save { directory, generation, reply }).await?;
        let timings = Some(convert::to_timings(&sealed));
        Ok(Response::new(SaveReply { file: Some((&sealed.file).into()), timings }))
    }

    async fn stop(&self, _: Request<StopRequest>) -> Result<Response<StopReply>, Status> {
        self.handle.cancel.store(true, Ordering::SeqCst);
        let reason = self.ask(Command::Stop).await?;
        Ok(Response::new(StopReply { reason }))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Result<Response<VmmStatus>, Status> {
        self.ask_status(Command::Shutdown).await
    }

    type PreCopyStream = ReceiverStream<Result<PreCopyProgress, Status>>;

    async fn pre_copy(
        &self,
        request: Request<PreCopyRequest>,
    ) -> Result<Response<Self::PreCopyStream>, Status> {
        let request = request.into_inner();
        let with_pieces = request.tell_pieces;
        let options = pre_copy::to_options(request)?;
        let watched = self.ask(|reply| Command::PreCopy(options, reply)).await?;
        let (to, output) = mpsc::channel(pre_copy::QUEUE);
        // Ends with its stream.
        tokio::spawn(pre_copy::send_progress(watched, with_pieces, to));
        Ok(Response::new(ReceiverStream::new(output)))
    }

    async fn abort_pre_copy(
        &self,
        _: Request<AbortPreCopyRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask_status(Command::AbortPreCopy).await
    }

    type ConsoleStream = ReceiverStream<Result<ConsoleOutput, Status>>;

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let serial = self.serial()?;
        let (to, output) = mpsc::channel(console::QUEUE);
        // Both end with their stream.
        tokio::spawn(console::take_input(Arc::clone(&serial), request.into_inner()));
        tokio::spawn(console::send_output(serial, to));
        Ok(Response::new(ReceiverStream::new(output)))
    }
}
