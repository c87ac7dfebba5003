//! Birth and death of a VMM: prepare, release, giving up, adoption.

use bellwether_agent_core::{Answer, Incarnation, Outcome, SealedState};
use bellwether_types::Arbiter;

use super::owner::{Body, Failure, Owner, definite};
use crate::kernel::{MS, Nanos, ProcId, SECOND};
use crate::oracle::Fact;
use crate::vmm;
use crate::wire::{Code, Order, OrderReply, Status, VmmCall};
use crate::world::Record;

const CREATE_MAX: Nanos = 20 * SECOND;
const STOP_GRACE: Nanos = 2 * SECOND;
const REAP_MAX: Nanos = 10 * SECOND;

impl Owner {
    /// Creates the whole VMM. Whatever fails, it is killed again, so that the outcome is known.
    pub(super) async fn prepare(&mut self, order: &Order) -> Result<OrderReply, Failure> {
        self.demolish().await?;
        self.ensure_storage().await?;
        let arbiter = self.machine.current().map_or(Arbiter::Storage, |current| current.arbiter);
        if let Err(failure) = self.build(order, arbiter).await {
            self.demolish().await?;
            return Err(Failure { status: definite(failure.status), unknown: false });
        }
        Ok(OrderReply::Answer(Answer::Prepared { prepare_us: 0 }))
    }

    async fn build(&mut self, order: &Order, arbiter: Arbiter) -> Result<(), Failure> {
        let (agent, vm, epoch) = (self.agent.clone(), self.vm, order.stamped.epoch);
        let record = Record {
            home: epoch,
            epoch,
            arbiter,
            process: None,
            loaded: None,
            loading: None,
            may_have_run: false,
            claiming: None,
            claimed_from: None,
            sealed: None,
        };
        if agent.world.runtime(agent.node, |runtime| runtime.full) {
            return Err(Failure::failed(Code::Internal, "the runtime directory refuses writes"));
        }
        agent.remove_home(vm, epoch);
        agent.world.runtime(agent.node, |runtime| {
            runtime.incarnations.insert((vm, epoch), record.clone());
        });
        let body = self.body.insert(Body { record, process: None, loaded_file: None });
        agent.add_page(vm, epoch);
        // A later agent finds the process by its socket, even if the record could not be written.
        let (node, boot) = (agent.node, agent.boot);
        let fact = Fact {
            vm,
            node,
            boot,
            epoch,
            home: epoch,
            leased: arbiter == Arbiter::Lease,
            open: false,
            busy: false,
            paused: false,
        };
        let process = vmm::start(&agent.world, fact);
        body.process = Some(process);
        body.record.process = Some(process);
        let record = body.record.clone();
        agent.world.runtime(agent.node, |runtime| {
            runtime.incarnations.insert((vm, epoch), record);
        });
        let create = VmmCall::Create { arbiter };
        let recall = self.recall(order);
        self.call(create, CREATE_MAX, recall).await.map(drop).map_err(Failure::from)
    }

    /// Removes what is left of an incarnation that never ran a guest or has ended.
    pub(super) async fn demolish(&mut self) -> Result<(), Failure> {
        let Some(body) = &mut self.body else { return Ok(()) };
        if let Some(process) = body.process {
            self.reap(process, 0).await?;
        }
        self.clean_up();
        Ok(())
    }

    /// Stops the VMM, with violence if it takes long, and answers when it is reaped.
    pub(super) async fn release(&mut self) -> Result<OrderReply, Failure> {
        if self.body.is_none() {
            return Ok(self.answer(Answer::Released { reason: "none".to_owned() }));
        }
        let reason = self.end_process().await?;
        self.clean_up();
        Ok(self.answer(Answer::Released { reason }))
    }

    /// Stops the VMM and reaps it; says how it ended.
    pub(super) async fn end_process(&mut self) -> Result<String, Failure> {
        let host = self.agent.host();
        let deadline = self.agent.world.kernel.boottime(host) + STOP_GRACE;
        let _confirmed = self.call(VmmCall::Stop, STOP_GRACE, None).await;
        if let Some(process) = self.body.as_ref().and_then(|body| body.process) {
            let grace = deadline.saturating_sub(self.agent.world.kernel.boottime(host));
            self.reap(process, grace).await?;
        }
        if let Some(body) = &mut self.body {
            body.process = None;
        }
        Ok(self.exit_reason())
    }

    /// Waits for a process for as long as it may go by itself, then kills it.
    async fn reap(&self, process: ProcId, grace: Nanos) -> Result<(), Failure> {
        if self.wait_exit(process, grace.max(MS)).await {
            return Ok(());
        }
        self.agent.world.end_vmm(process, None);
        match self.wait_exit(process, REAP_MAX).await {
            true => Ok(()),
            false => Err(Failure::unknown(
                Code::DeadlineExceeded,
                "the VMM was killed but has not ended, perhaps because it waits for its storage; \
                 outcome unknown, ask again",
            )),
        }
    }

    /// After a start that failed: the guest has not run, if that is proven, and now it never will.
    pub(super) async fn maybe_give_up(
        &mut self,
        order: &Order,
        failure: &Failure,
    ) -> Option<Status> {
        // What may be asked again with success is not given up.
        let passes = failure.unknown || failure.status.code == Code::Unavailable;
        if !Self::starts(order) || passes || !self.machine.give_up(&order.stamped) {
            return None;
        }
        match self.give_up(order, &failure.status.message).await {
            Ok(_) => None,
            Err(failure) => Some(failure.status),
        }
    }

    /// Releases an incarnation whose guest never ran, and says so.
    pub(super) async fn give_up(
        &mut self,
        order: &Order,
        why: &str,
    ) -> Result<OrderReply, Failure> {
        self.agent.world.hit("agent", "given up");
        let unknown = |status| Failure { status, unknown: true };
        self.save_floor().await.map_err(unknown)?;
        self.release().await?;
        self.machine.complete(&order.stamped, &Outcome::Done(Answer::GivenUp));
        self.save_floor().await.map_err(unknown)?;
        let epoch = order.stamped.epoch;
        Err(Failure::failed(
            Code::Aborted,
            format!("{why}; the guest has not run under epoch {epoch} and will not"),
        ))
    }

    /// The process is gone: its page and directory go too.
    pub(super) fn clean_up(&mut self) {
        self.agent.drop_page(self.vm);
        self.sight = None;
        self.silence = 0;
        if let Some(body) = self.body.take() {
            self.agent.remove_home(self.vm, body.record.home);
        }
    }

    /// Takes up an incarnation that an earlier agent left, before any order is served.
    pub async fn adopt(&mut self, record: Record) {
        let process = record.process.filter(|process| !self.agent.world.has_ended(*process));
        let home = record.home;
        self.body = Some(Body { record: record.clone(), process, loaded_file: None });
        let found = self.incarnation(&record, process.is_some());
        let wanted = self.machine.adopt(found);
        if process.is_some() {
            self.agent.add_page(self.vm, home);
        }
        if !wanted {
            self.finish_release().await;
        } else if process.is_some() {
            self.look().await;
        }
        // Before the node registers: a registration without this VM would say that it is gone.
        self.publish();
    }

    fn incarnation(&self, record: &Record, lives: bool) -> Incarnation {
        let mut found = Incarnation::preparing(record.epoch, record.arbiter);
        found.loaded = record.loaded;
        found.loading = record.loading;
        found.may_have_run = record.may_have_run;
        found.claiming = record.claiming;
        found.claimed_from = record.claimed_from;
        found.sealed = record.sealed.clone().map(SealedState::told_again);
        found.uncertain = true;
        if !lives {
            found.end(&self.exit_reason());
        }
        found
    }

    /// The process is gone, and the floor was durable before: how it ended can be told later.
    pub(super) async fn complete_release(&mut self, reason: &str) {
        self.machine.finish_release(reason);
        let _written_later = self.save_floor().await;
    }

    /// The agent died within a release: the floor says that this incarnation has to go.
    async fn finish_release(&mut self) {
        if let Ok(OrderReply::Released { reason, .. }) = self.release().await {
            self.complete_release(&reason).await;
        }
    }
}
