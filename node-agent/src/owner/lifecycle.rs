//! Birth and death of a VMM: prepare, release, adoption.

use std::time::Duration;

use bellwether_agent_core::{Answer, Outcome, Phase};
use bellwether_proto::v1;
use bellwether_types::Arbiter;
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};

use super::execute::definite;
use super::{Body, Command, Details, Failure, Owner, Reply, ensure_storage};
use crate::process::Process;
use crate::vmm::{Vmm, bounded};

/// Creating KVM objects and devices takes tens of milliseconds.
const CREATE_MAX: Duration = Duration::from_secs(20);
/// What a VMM gets to drain its I/O and go by itself.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// How long a killed process may take to disappear. One that waits for dead storage in the kernel
/// takes longer; then the release has no answer yet.
const REAP_MAX: Duration = Duration::from_secs(10);

impl Owner {
    /// Creates the whole VMM. Whatever fails, it is killed again, so that the outcome is known.
    pub(super) async fn prepare(&mut self, command: &Command) -> Result<Reply, Failure> {
        let Details::Prepare { spec, storage } = &command.details else {
            return Err(Failure::internal("a prepare without its specification"));
        };
        let begun = Instant::now();
        self.demolish().await?;
        ensure_storage(storage, self.node.cluster).await?;
        let epoch = command.stamped.epoch;
        let arbiter = self.machine.current().map_or(Arbiter::Storage, |current| current.arbiter);
        let request = v1::CreateRequest {
            vm_id: self.vm.to_string(),
            spec: Some(spec.as_ref().clone()),
            claim_path: bellwether_claim::claim_path(storage, self.vm).display().to_string(),
            node_id: self.node.id.0,
            boot_id: self.node.boot_id.to_string(),
            arbiter: arbiter.as_str().to_owned(),
            lease_path: self.node.runtime.home(self.vm, epoch).lease_page().display().to_string(),
            serial_path: String::new(),
        };
        if let Err(failure) = self.build(command, arbiter, request).await {
            // If even that fails, the process is still there, and the outcome is unknown.
            self.demolish().await?;
            return Err(Failure::failed(definite(failure.status)));
        }
        let prepare_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(Reply::Answer(Answer::Prepared { prepare_us }))
    }

    async fn build(
        &mut self,
        command: &Command,
        arbiter: Arbiter,
        request: v1::CreateRequest,
    ) -> Result<(), Failure> {
        let epoch = command.stamped.epoch;
        let home = self.node.runtime.home(self.vm, epoch);
        let body = Body::create(home.clone(), self.vm, self.node.boot_id, epoch, arbiter)
            .map_err(|error| Failure::internal(error.to_string()))?;
        let body = self.body.insert(body);
        self.node
            .desk
            .add_page(self.vm, &home.lease_page())
            .map_err(|error| Failure::internal(format!("create the lease page: {error}")))?;
        let vmm = &self.node.launcher.vmm;
        let cannot = |error: std::io::Error| {
            Failure::internal(format!("start the VMM `{}`: {error}", vmm.display()))
        };
        let pid = self.node.launcher.spawn(&home).map_err(cannot)?;
        let process = Process::open(pid).map_err(cannot)?;
        tracing::info!(vm_id = %self.vm, %epoch, pid, "started a VMM");
        body.started(process).map_err(|error| Failure::internal(error.to_string()))?;
        let process = body.process().ok_or_else(|| Failure::internal("no process"))?;
        let vmm = Vmm::connect(&home.socket(), process).await.map_err(Failure::from)?;
        body.set_vmm(vmm.clone());
        let recall = self.recall(&command.stamped);
        let mut client = vmm.client();
        bounded("create", self.node.allow(CREATE_MAX), recall, client.create(request)).await?;
        Ok(())
    }

    /// Removes what is left of an incarnation that never ran a guest or has ended.
    pub(super) async fn demolish(&mut self) -> Result<(), Failure> {
        let Some(body) = &mut self.body else { return Ok(()) };
        if let Some(process) = body.process() {
            reap(process, Duration::ZERO).await?;
        }
        body.forget_process();
        self.clean_up();
        Ok(())
    }

    /// Stops the VMM, with violence if it takes long, and answers when it is reaped.
    pub(super) async fn release(&mut self) -> Result<Reply, Failure> {
        if self.body.is_none() {
            return Ok(Reply::Answer(Answer::Released { reason: "none".to_owned() }));
        }
        let reason = self.end_process().await?;
        self.clean_up();
        Ok(Reply::Answer(Answer::Released { reason }))
    }

    /// Stops the VMM, kills it if it does not stop, and reaps it. Tells how it ended.
    pub(super) async fn end_process(&mut self) -> Result<String, Failure> {
        let Some(body) = &mut self.body else { return Ok("none".to_owned()) };
        let stop_grace = self.node.allow(STOP_GRACE);
        let deadline = Instant::now() + stop_grace;
        if let Some(vmm) = body.vmm() {
            let mut client = vmm.client();
            let stop = client.stop(v1::StopRequest {});
            if let Err(error) = bounded("stop", stop_grace, None, stop).await {
                tracing::debug!(vm_id = %self.vm, %error, "the VMM did not confirm its stop");
            }
        }
        if let Some(process) = body.process() {
            // Without a connection there is nothing that could make it stop by itself.
            let grace = match body.vmm() {
                Some(_) => deadline.saturating_duration_since(Instant::now()),
                None => Duration::ZERO,
            };
            reap(process, grace).await?;
        }
        let reason = body.exit_reason();
        body.forget_process();
        Ok(reason)
    }

    /// After a start that failed: the guest has not run, if that is proven, and now it never will.
    /// This lets the controller start it elsewhere at once. None if nothing is proven.
    pub(super) async fn maybe_give_up(
        &mut self,
        command: &Command,
        failure: &Failure,
    ) -> Option<Status> {
        let starts =
            matches!(command.details, Details::Activate { .. } | Details::ClaimBack { .. });
        // What may be asked again with success is not given up.
        let passes = failure.unknown || failure.status.code() == Code::Unavailable;
        if !starts || passes || !self.machine.give_up(&command.stamped) {
            return None;
        }
        match self.give_up(command, failure.status.message()).await {
            Ok(_) => None,
            Err(failure) => Some(failure.status),
        }
    }

    /// Releases an incarnation whose guest never ran, and says so.
    pub(super) async fn give_up(&mut self, command: &Command, why: &str) -> Result<Reply, Failure> {
        let failure = match self.save_floor() {
            Ok(()) => self.release().await.err(),
            Err(status) => Some(Failure::unknown(status)),
        };
        if let Some(failure) = failure {
            return Err(failure);
        }
        self.machine.complete(&command.stamped, &Outcome::Done(Answer::GivenUp));
        self.save_floor().map_err(Failure::unknown)?;
        let epoch = command.stamped.epoch;
        Err(Failure::failed(Status::aborted(format!(
            "{why}; the guest has not run under epoch {epoch} and will not; its VMM is released"
        ))))
    }

    /// The process is gone: its page and directory go too.
    pub(super) fn clean_up(&mut self) {
        self.node.desk.drop_page(self.vm);
        self.sight = None;
        self.silence = 0;
        if let Some(body) = self.body.take()
            && let Err(error) = body.home().remove()
        {
            tracing::warn!(vm_id = %self.vm, %error, "cannot remove the incarnation's directory");
        }
    }

    /// Takes up an incarnation that an earlier agent left, before any order is served.
    pub async fn adopt(&mut self, body: Body) {
        let alive = body.process().is_some();
        let epoch = body.record().epoch;
        let wanted = self.machine.adopt(body.incarnation());
        let lease_page = body.home().lease_page();
        self.body = Some(body);
        if alive && let Err(error) = self.node.desk.add_page(self.vm, &lease_page) {
            tracing::error!(vm_id = %self.vm, %error, "cannot take up the lease page");
        }
        if !wanted {
            self.finish_release().await;
        } else if alive {
            self.look().await;
        }
        // Before the node registers: a registration without this VM would say that it is gone.
        self.publish();
        let phase = self.machine.current().map(|current| current.phase);
        tracing::info!(vm_id = %self.vm, %epoch, alive, phase = phase.map(Phase::as_str), "adopted");
    }

    /// The process is gone, and the floor was durable before: how it ended can be told later.
    pub(super) fn complete_release(&mut self, reason: &str) {
        self.machine.finish_release(reason);
        if let Err(status) = self.save_floor() {
            tracing::error!(vm_id = %self.vm, reason = status.message(), "not saved");
        }
    }

    /// The agent died within a release: the floor says that this incarnation has to go.
    async fn finish_release(&mut self) {
        match self.release().await {
            Ok(Reply::Answer(Answer::Released { reason })) => self.complete_release(&reason),
            Ok(_) => {}
            Err(failure) => {
                let reason = failure.status.message();
                tracing::error!(vm_id = %self.vm, reason, "a released VMM is still there");
            }
        }
    }
}

/// Waits for a process for as long as it is allowed to go by itself, then kills it, and answers
/// when it is gone.
pub async fn reap(process: &Process, grace: Duration) -> Result<(), Failure> {
    let unwaitable = |error: std::io::Error| {
        Failure::unknown(Status::unavailable(format!("wait for the VMM: {error}; ask again")))
    };
    if let Ok(ended) = timeout_at(Instant::now() + grace, process.exited()).await {
        return ended.map_err(unwaitable);
    }
    process.kill().map_err(|error| Failure::internal(format!("kill the VMM: {error}")))?;
    match timeout_at(Instant::now() + REAP_MAX, process.exited()).await {
        Ok(ended) => ended.map_err(unwaitable),
        Err(_) => Err(Failure::unknown(Status::deadline_exceeded(format!(
            "the VMM (process {}) was killed but has not ended within {} s, perhaps because it \
             waits for its storage; outcome unknown, ask again",
            process.pid(),
            REAP_MAX.as_secs()
        )))),
    }
}
