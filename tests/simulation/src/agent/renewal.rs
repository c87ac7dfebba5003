//! Registration and renewal: one task that keeps in touch with the controllers.

use std::collections::BTreeMap;
use std::time::Duration;

use bellwether_agent_core::{LeaseAnswer, Observation, Pulse, Rotation};
use bellwether_core::command::Registration;
use bellwether_core::observe::VmReport;
use bellwether_types::{BootId, VmId};

use super::This;
use crate::kernel::{MS, Nanos, SECOND};
use crate::net::Address;
use crate::sync::first;
use crate::wire::{Api, ApiCall, ApiReply, Request, Response};

/// How long one controller may take before the next is asked.
const ANSWER_MIN: Nanos = 500 * MS;
const ANSWER_MAX: Nanos = 2 * SECOND;
/// Before registering again when told to.
const REGISTER_PAUSE: Nanos = 50 * MS;

/// Runs for as long as the agent.
pub async fn run(agent: This) {
    let controllers = (1..=agent.world.cluster.controllers).collect();
    let mut renewal =
        Renewal { agent, rotation: Rotation::new(controllers), lease_ms: 0, replaces: None };
    let mut registered = false;
    loop {
        let seen = renewal.agent.hurry.version();
        let answer = match registered {
            false => renewal.register().await,
            true => renewal.renew().await.map(|again| !again),
        };
        let pause = match answer {
            Some(still) => {
                renewal.rotation.succeeded();
                let before = std::mem::replace(&mut registered, still);
                renewal.pause_after(before, still)
            }
            None => nanos(renewal.rotation.failed()),
        };
        let hurry = renewal.agent.hurry.changed_since(seen);
        first(renewal.agent.world.sleep(renewal.agent.host(), pause), hurry).await;
    }
}

fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(SECOND)
}

struct Renewal {
    agent: This,
    rotation: Rotation<u64>,
    lease_ms: u64,
    replaces: Option<BootId>,
}

impl Renewal {
    fn pause_after(&self, was_registered: bool, is_registered: bool) -> Nanos {
        match (was_registered, is_registered) {
            (false, true) => 0,
            (_, false) => REGISTER_PAUSE,
            (true, true) => (self.lease_ms / 6).max(10) * MS,
        }
    }

    fn reports(&self) -> Vec<VmReport> {
        let board = self.agent.board.borrow();
        let report = |(vm, seen): (&VmId, &Observation)| VmReport {
            vm: *vm,
            epoch: seen.epoch,
            state: seen.state,
            reason: seen.reason.clone(),
            memory_loaded_bytes: seen.memory_loaded_bytes,
            memory_total_bytes: seen.memory_total_bytes,
        };
        board.iter().map(report).collect()
    }

    async fn ask(&self, call: ApiCall) -> Option<ApiReply> {
        let controller = *self.rotation.current()?;
        let at_most = match self.lease_ms {
            0 => ANSWER_MAX,
            lease_ms => (lease_ms / 6 * MS).clamp(ANSWER_MIN, ANSWER_MAX),
        };
        let request = Request::Api(Box::new(Api { forwarded: false, operation: None, call }));
        let net = self.agent.world.net.clone();
        let to = Address::Controller(controller);
        match net.call(self.agent.host(), to, request, at_most).await {
            Ok(Response::Api(reply)) => Some(reply),
            _ => None,
        }
    }

    async fn register(&mut self) -> Option<bool> {
        let agent = &self.agent;
        let size = agent.world.cluster.size_of(agent.node.0);
        let registration = Registration {
            node: agent.node,
            name: format!("n{}", agent.node),
            boot_id: agent.boot,
            address: "127.0.0.1".into(),
            agent_port: 7410,
            memory_mib: size.memory_mib,
            vcpus: size.vcpus,
            version: "0".into(),
            replaces: self.replaces,
        };
        let vms = self.reports();
        match self.ask(ApiCall::Register { registration, vms }).await? {
            ApiReply::Registered { lease_ms } => {
                self.lease_ms = lease_ms;
                let now = self.agent.stamp();
                let mut desk = self.agent.desk.borrow_mut();
                desk.lease_ms = lease_ms;
                desk.last_contact = Some(now);
                desk.heard_at = self.agent.world.kernel.now();
                desk.knows_storage = true;
                Some(true)
            }
            ApiReply::Known { boot_id } => {
                self.replaces = Some(boot_id);
                Some(false)
            }
            _ => None,
        }
    }

    /// Renews the lease; true when the controller wants a registration.
    async fn renew(&mut self) -> Option<bool> {
        let vms = self.reports();
        let sent_at = self.agent.world.kernel.now();
        let stamped = self.agent.request();
        self.agent.world.leases_sent.borrow_mut().insert((self.agent.boot, stamped.nonce), sent_at);
        let (node, boot_id) = (self.agent.node, stamped.boot_id);
        let watchdog = self.agent.promise();
        let told = watchdog.clone();
        let call = ApiCall::Renew { node, boot_id, nonce: stamped.nonce, vms, watchdog };
        let ApiReply::Renewed { nonce, lease_ms, term, pulse_ms, grants, register } =
            self.ask(call).await?
        else {
            return None;
        };
        // A term that cannot be written counts nevertheless.
        let _logged = self.agent.hear(term).await;
        if register {
            return Some(true);
        }
        self.lease_ms = lease_ms;
        let grants: BTreeMap<_, _> = grants.into_iter().collect();
        let answer = self.agent.answered(nonce, lease_ms, grants);
        if let LeaseAnswer::Granted { deadline_ns } = answer {
            self.check_deadline(nonce, lease_ms, deadline_ns);
            self.agent.world.oracle.borrow_mut().granted(node, boot_id, &told);
            self.agent.world.granted.borrow_mut().insert(boot_id, sent_at);
            self.agent.grant_fencer(term, stamped.stamp);
        }
        if answer == LeaseAnswer::NotAsked {
            return None;
        }
        let pulse = Some(Pulse { term, ms: pulse_ms });
        let mut desk = self.agent.desk.borrow_mut();
        desk.pulse = desk.pulse.max(pulse);
        Some(false)
    }

    /// The lease ends no later than its length after the request that was answered was sent.
    fn check_deadline(&self, nonce: u64, lease_ms: u64, deadline_ns: u64) {
        let world = &self.agent.world;
        let sent = world.leases_sent.borrow().get(&(self.agent.boot, nonce)).copied();
        let left = deadline_ns.saturating_sub(world.kernel.boottime(self.agent.host()));
        // Ten percent is the drift that the formulas of protocol 1 allow.
        let ends = world.kernel.now() + left;
        let latest = sent.unwrap_or(0) + lease_ms * MS / 10 * 11;
        if left > 0 && ends > latest {
            let node = self.agent.node;
            let text = format!("6: the lease of node {node} ends {} ms late", (ends - latest) / MS);
            world.oracle.borrow_mut().fail(text);
        }
    }
}
