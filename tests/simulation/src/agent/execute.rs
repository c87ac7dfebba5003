//! The orders about a VMM that exists.

use bellwether_agent_core::{Action, ActivateTimings, Answer, Phase, SaveTimings, SealedState};
use bellwether_types::{Arbiter, Epoch, StateFileRef};

use super::owner::{Failure, Owner, VmmError};
use crate::kernel::{MS, Nanos, SECOND};
use crate::storage::IoError;
use crate::wire::{Code, Details, Order, OrderReply, VmmCall, VmmReply, claim_path};

const LOAD_MAX: Nanos = 60 * SECOND;
const START_MAX: Nanos = 30 * SECOND;
const SAVE_MAX: Nanos = 1_800 * SECOND;
const PRE_COPY_MAX: Nanos = 60 * SECOND;
const SHORT_MAX: Nanos = 10 * SECOND;
const LOCK_MAX: Nanos = 10 * SECOND;
const EXIT_MAX: Nanos = 2 * SECOND;
const GRANT_MAX: Nanos = 3 * SECOND;
const STORAGE_MAX: Nanos = 15 * SECOND;

impl Owner {
    /// Carries out an admitted action.
    pub(super) async fn execute(
        &mut self,
        action: Action,
        order: &Order,
    ) -> Result<OrderReply, Failure> {
        // Persist before send.
        if !self.save_record() && action.needs_record() {
            let text = "the record cannot be written; the VMM was not asked for anything";
            return Err(Failure::failed(Code::Unavailable, text));
        }
        match (action, &order.details) {
            (Action::Answer(answer), _) => Ok(self.answer(answer)),
            (Action::Prepare { .. }, _) => self.prepare(order).await,
            (Action::Release, _) => self.release().await,
            (Action::GiveUp(why), _) => self.give_up(order, why).await,
            (Action::Lock, Details::TakeOver { wait_ms }) => self.lock(order, *wait_ms).await,
            (Action::Load, Details::LoadState { file }) => self.load(order, file).await,
            (Action::Start, Details::Activate { wait_ms }) => self.activate(order, *wait_ms).await,
            (Action::PreCopy, _) => self.pre_copy(order).await,
            // Nothing depends on what was loaded ahead, or on an abort: admission is all there is.
            (Action::LoadAhead | Action::EndPreCopy, _) => Ok(self.answer(Answer::Done)),
            (Action::Save, _) => self.save(order).await,
            (Action::ClaimBack, Details::ClaimBack { file }) => self.claim_back(order, file).await,
            (Action::HandOver, _) => self.hand_over(order).await,
            (Action::Pause, _) => self.simple(order, VmmCall::Pause).await,
            (Action::Resume, _) => self.simple(order, VmmCall::Resume).await,
            (Action::Shutdown, _) => self.shut_down(order).await,
            (Action::RemoveState, Details::RemoveState { purge }) => {
                self.remove_state(order, *purge).await
            }
            (action, _) => {
                Err(Failure::failed(Code::Internal, format!("{action:?} without its details")))
            }
        }
    }

    /// The socket is there as long as the process is.
    fn connection(&self) -> Result<(), Failure> {
        match self.body.as_ref().and_then(|body| body.process) {
            Some(_) => Ok(()),
            None => Err(Failure::failed(Code::Unavailable, "its VMM cannot be reached; ask again")),
        }
    }

    async fn lock(&mut self, order: &Order, wait_ms: u64) -> Result<OrderReply, Failure> {
        self.connection()?;
        let call = VmmCall::Lock { epoch: order.stamped.epoch, wait_ms };
        match self.call(call, LOCK_MAX + wait_ms * MS, self.recall(order)).await {
            Ok(VmmReply::Status(sight)) => {
                Ok(OrderReply::Answer(Answer::TakenOver { handover: sight.handover }))
            }
            Ok(_) => {
                Err(Failure::unknown(Code::Internal, "the VMM's answer to lock has no status"))
            }
            Err(VmmError::Refused(status))
                if matches!(status.code, Code::FailedPrecondition | Code::Aborted) =>
            {
                Ok(OrderReply::NotHeld { holder: status.message })
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn load(&mut self, order: &Order, file: &StateFileRef) -> Result<OrderReply, Failure> {
        self.connection()?;
        if let Some(body) = &mut self.body {
            body.loaded_file = Some(file.path.display().to_string());
        }
        self.call(VmmCall::Load { file: file.clone() }, LOAD_MAX, self.recall(order)).await?;
        Ok(OrderReply::Answer(Answer::Loaded { load_us: 0 }))
    }

    async fn activate(&mut self, order: &Order, wait_ms: u64) -> Result<OrderReply, Failure> {
        self.show_page(order.stamped.epoch).await?;
        let consume = self.machine.current().is_some_and(|current| current.loaded.is_some());
        self.start(order, wait_ms, consume).await?;
        Ok(OrderReply::Answer(Answer::Activated(ActivateTimings::default())))
    }

    async fn claim_back(
        &mut self,
        order: &Order,
        file: &StateFileRef,
    ) -> Result<OrderReply, Failure> {
        self.show_page(order.stamped.epoch).await?;
        self.start(order, 0, true).await?;
        // The guest has gone on, so the file must never be restored.
        let path = file.path.display().to_string();
        let _takes_up_space = self.agent.world.storage.remove_state(self.agent.host(), path).await;
        Ok(OrderReply::Answer(Answer::ClaimedBack(ActivateTimings::default())))
    }

    /// The page comes before the start, because the VMM looks at it before its first instruction.
    async fn show_page(&self, epoch: Epoch) -> Result<(), Failure> {
        let arbiter = self.machine.current().map_or(Arbiter::Lease, |current| current.arbiter);
        if arbiter == Arbiter::Storage {
            self.agent.show_epoch(self.vm, epoch);
            return Ok(());
        }
        self.agent.hurry.notify();
        match self.agent.granted(self.vm, epoch, GRANT_MAX).await {
            true => Ok(()),
            false => {
                Err(Failure::failed(Code::Unavailable, "no controller has granted it; ask again"))
            }
        }
    }

    async fn start(&self, order: &Order, wait_ms: u64, consume: bool) -> Result<(), Failure> {
        self.connection()?;
        let call = VmmCall::Start { epoch: order.stamped.epoch, wait_ms, consume };
        self.call(call, START_MAX + wait_ms * MS, self.recall(order)).await?;
        Ok(())
    }

    /// The storage is there. Nothing has been asked of a VMM yet, so even silence leaves nothing open.
    pub(super) async fn ensure_storage(&self) -> Result<(), Failure> {
        let (world, host) = (&self.agent.world, self.agent.host());
        let looking = world.storage.look(host);
        match crate::sync::within(&world.kernel, host, STORAGE_MAX, looking).await {
            Some(Ok(())) => Ok(()),
            _ => Err(Failure::failed(Code::Internal, "the storage does not answer")),
        }
    }

    async fn save(&mut self, order: &Order) -> Result<OrderReply, Failure> {
        self.ensure_storage().await?;
        self.connection()?;
        let call = VmmCall::Save { generation: order.stamped.task };
        match self.call(call, SAVE_MAX, self.recall(order)).await? {
            VmmReply::Saved { file } => {
                let sealed = SealedState { file, timings: SaveTimings::default() };
                Ok(OrderReply::Answer(Answer::Sealed(sealed)))
            }
            _ => Err(Failure::unknown(Code::Internal, "the VMM's answer to save has no file")),
        }
    }

    /// Records it in the claim, and ends the VMM, whose locks go with it. What was sealed is still
    /// told to whoever asks.
    async fn hand_over(&mut self, order: &Order) -> Result<OrderReply, Failure> {
        self.connection()?;
        self.call(VmmCall::HandOver, STORAGE_MAX, self.recall(order)).await?;
        let reason = self.end_process().await?;
        self.machine.ended(&reason);
        Ok(self.answer(Answer::Done))
    }

    /// The product's owner hands out the connection and goes on; here it waits, for as long as no
    /// release recalls it.
    async fn pre_copy(&mut self, order: &Order) -> Result<OrderReply, Failure> {
        self.ensure_storage().await?;
        self.connection()?;
        self.call(VmmCall::PreCopy, PRE_COPY_MAX, self.recall(order)).await?;
        Ok(self.answer(Answer::Done))
    }

    /// An order that was carried out before is refused by the VMM and still answered as before.
    async fn simple(&mut self, order: &Order, call: VmmCall) -> Result<OrderReply, Failure> {
        self.connection()?;
        self.call(call, SHORT_MAX, self.recall(order)).await?;
        self.look().await;
        Ok(OrderReply::Answer(Answer::Done))
    }

    async fn shut_down(&mut self, order: &Order) -> Result<OrderReply, Failure> {
        self.connection()?;
        let process = self.body.as_ref().and_then(|body| body.process);
        match self.call(VmmCall::Shutdown, SHORT_MAX, self.recall(order)).await {
            Err(VmmError::Open) => match process {
                // A guest that is quick ends its VMM before the answer is out.
                Some(process) if self.wait_exit(process, EXIT_MAX).await => {}
                _ => return Err(VmmError::Open.into()),
            },
            other => drop(other?),
        }
        Ok(OrderReply::Answer(Answer::Done))
    }

    /// State files that a VMM on this node may still read or write.
    fn files_in_use(&self) -> Vec<String> {
        let Some(current) = self.machine.current().filter(|current| current.is_live()) else {
            return Vec::new();
        };
        let sealed = current.sealed.as_ref().map(|it| it.file.path.display().to_string());
        let loaded_all = self.sight.as_ref().is_some_and(|sight| {
            current.phase == Phase::Active && sight.memory_loaded_bytes == sight.memory_total_bytes
        });
        let loaded = self.body.as_ref().and_then(|body| body.loaded_file.clone());
        sealed.into_iter().chain(loaded.filter(|_| !loaded_all)).collect()
    }

    /// Removes old state files; `purge` also removes the claim of a VM that is being deleted.
    async fn remove_state(&self, order: &Order, purge: bool) -> Result<OrderReply, Failure> {
        let removing = self.remove_files(order.stamped.epoch, purge);
        let kernel = &self.agent.world.kernel;
        match crate::sync::within(kernel, self.agent.host(), STORAGE_MAX, removing).await {
            Some(Ok(())) => Ok(OrderReply::Removed),
            Some(Err(error)) => {
                Err(Failure::failed(Code::FailedPrecondition, format!("{error:?}")))
            }
            None => Err(Failure::unknown(Code::DeadlineExceeded, "the storage does not answer")),
        }
    }

    async fn remove_files(&self, up_to: Epoch, purge: bool) -> Result<(), IoError> {
        let (storage, host) = (&self.agent.world.storage, self.agent.host());
        let in_use = self.files_in_use();
        for (path, epoch) in storage.list_states(host, self.vm).await? {
            if epoch <= up_to && !in_use.contains(&path) {
                storage.remove_state(host, path).await?;
            }
        }
        // A claim that somebody holds is left alone.
        let claim = claim_path(self.vm);
        let held = storage.server(|server| server.is_locked(&claim));
        match purge && !held {
            true => storage.remove_claim(host, claim).await,
            false => Ok(()),
        }
    }
}
