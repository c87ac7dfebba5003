//! Registration and renewal: one task that keeps in touch with the controllers.
//!
//! ```text
//!                  ok                       ok, lease/3 later or at a change of state
//!   unregistered -------> registered ------------------------------------------------+
//!        ^                   |   ^                                                   |
//!        |  register = true  |   +---------------------------------------------------+
//!        +-------------------+       an error: the next controller, after all of them a pause
//! ```
//!
//! The lease's stamp is taken before the request is sent. A controller that does not lead forwards
//! to the leader, so that any of them will do.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bellwether_agent_core::{LeaseAnswer, Pulse, Rotation};
use bellwether_failpoint::hold;
use bellwether_member::{KnownController, MemberConfig, Ports};
use bellwether_pki::{ServerIdentity, connect_channel, refusal_by_peer};
use bellwether_proto::v1;
use bellwether_proto::v1::nodes_client::NodesClient;
use bellwether_types::{Epoch, NodeId, VmId};
use rustls::ClientConfig;
use tonic::Status;
use tonic::transport::Channel;

use crate::capacity::Capacity;
use crate::config::AgentConfig;
use crate::node::Node;
use crate::wire;

/// How long one controller may take before the next is asked: a sixth of the lease, within these
/// bounds. Together with the pause before it, another sixth, that leaves the next controller time to
/// answer before the silence of half a lease after which this node would be called unknown, so that
/// one dead controller makes no healthy node suspect. Forwarding to the leader and its quorum check
/// are two round trips; an election takes longer, and then another one may know more.
const ANSWER_MIN: Duration = Duration::from_millis(500);
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Before registering again when told to, so that a controller which never stops telling so is not
/// asked without end.
const REGISTER_PAUSE: Duration = Duration::from_millis(50);

/// Keeps in touch with the controllers.
pub struct Renewal {
    pub node: Arc<Node>,
    pub config: AgentConfig,
    pub member: MemberConfig,
    pub data_dir: PathBuf,
    pub capacity: Capacity,
    tls: Arc<ClientConfig>,
    rotation: Rotation<KnownController>,
    client: Option<NodesClient<Channel>>,
    lease_ms: u64,
    /// The boot of this node that the cluster knows: a registration has to name it.
    replaces: String,
    in_touch: bool,
}

impl Renewal {
    pub fn new(
        node: Arc<Node>,
        config: AgentConfig,
        member: MemberConfig,
        data_dir: PathBuf,
        capacity: Capacity,
        tls: Arc<ClientConfig>,
    ) -> Self {
        let rotation = Rotation::new(member.controllers.clone());
        Self {
            node,
            config,
            member,
            data_dir,
            capacity,
            tls,
            rotation,
            client: None,
            lease_ms: 0,
            replaces: String::new(),
            in_touch: false,
        }
    }

    /// Runs for as long as the agent.
    pub async fn run(mut self) {
        let mut registered = false;
        loop {
            // A test that holds it cuts this node off from the controllers.
            hold(&format!("agent.renew.{}", self.node.name)).await;
            let answer = match registered {
                false => self.register().await,
                true => self.renew().await.map(|register_again| !register_again),
            };
            let pause = match answer {
                Ok(still) => {
                    self.succeeded();
                    let before = std::mem::replace(&mut registered, still);
                    self.pause_after(before, still)
                }
                Err(status) => self.failed(&status),
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.node.board.changed() => {}
            }
        }
    }

    /// A fresh registration is followed by a renewal at once: the first lease.
    fn pause_after(&self, was_registered: bool, is_registered: bool) -> Duration {
        match (was_registered, is_registered) {
            (false, true) => Duration::ZERO,
            (_, false) => REGISTER_PAUSE,
            (true, true) => self.config.renew_interval(self.lease_ms),
        }
    }

    fn succeeded(&mut self) {
        self.rotation.succeeded();
        if !std::mem::replace(&mut self.in_touch, true) {
            let controller = self.rotation.current().map(|controller| controller.api_addr());
            tracing::info!(node_id = %self.node.id, ?controller, "in touch with the controllers");
        }
    }

    fn failed(&mut self, status: &Status) -> Duration {
        let controller = self.rotation.current().map(|controller| controller.api_addr());
        let reason = refusal_by_peer(status).unwrap_or_else(|| status.message().to_owned());
        if std::mem::replace(&mut self.in_touch, false) {
            tracing::warn!(node_id = %self.node.id, ?controller, reason, "lost touch");
        } else {
            tracing::debug!(node_id = %self.node.id, ?controller, reason, "no answer");
        }
        self.client = None;
        self.rotation.failed()
    }

    fn client(&mut self) -> Result<NodesClient<Channel>, Status> {
        if self.client.is_none() {
            let controller = self.rotation.current().ok_or_else(|| {
                Status::failed_precondition("member.toml names no controller; join again")
            })?;
            let tls = Arc::clone(&self.tls);
            let server = ServerIdentity::AnyController;
            let channel = connect_channel(controller.api_addr(), tls, server);
            self.client = Some(NodesClient::new(channel));
        }
        self.client.clone().ok_or_else(|| Status::internal("no client"))
    }

    fn answer_max(&self) -> Duration {
        match self.lease_ms {
            0 => self.node.allow(ANSWER_MAX),
            lease_ms => {
                Duration::from_millis(lease_ms / 6).clamp(ANSWER_MIN, self.node.allow(ANSWER_MAX))
            }
        }
    }

    fn observations(&self) -> Vec<v1::VmObservation> {
        let all = self.node.board.all();
        all.iter().map(|(vm, observation)| wire::observation(*vm, observation)).collect()
    }

    /// Registers; false when the cluster knows a boot that has to be named.
    async fn register(&mut self) -> Result<bool, Status> {
        let mut client = self.client()?;
        let request = v1::RegisterRequest {
            boot_id: self.node.boot_id.to_string(),
            address: self.member.address.to_string(),
            agent_port: self.member.ports.agent.into(),
            memory_mib: self.capacity.memory_mib,
            vcpus: self.capacity.vcpus,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vms: self.observations(),
            replaces: self.replaces.clone(),
        };
        let reply = answered(self.answer_max(), client.register(request)).await?;
        if !reply.known_boot_id.is_empty() {
            self.replaces = reply.known_boot_id;
            return Ok(false);
        }
        self.lease_ms = reply.lease_ms;
        self.node.desk.registered(reply.lease_ms, &reply.storage);
        tracing::info!(
            node_id = %self.node.id,
            boot_id = %self.node.boot_id,
            lease_ms = reply.lease_ms,
            storage = reply.storage,
            "registered"
        );
        Ok(true)
    }

    /// Renews the lease; true when the controller wants a registration.
    async fn renew(&mut self) -> Result<bool, Status> {
        let mut client = self.client()?;
        let vms = self.observations();
        let stamped = self.node.desk.request();
        let request = v1::RenewRequest {
            boot_id: stamped.boot_id.to_string(),
            nonce: stamped.nonce,
            vms,
            watchdog: Some(self.node.fencing.promise()),
        };
        let reply = answered(self.answer_max(), client.renew(request)).await?;
        if let Err(error) = self.node.terms.hear(reply.term) {
            tracing::error!(node_id = %self.node.id, %error, "cannot remember the leader's term");
        }
        if reply.register {
            return Ok(true);
        }
        self.lease_ms = reply.lease_ms;
        let answer = self.node.desk.answer(reply.nonce, reply.lease_ms, grants(&reply.grants));
        if answer == LeaseAnswer::NotAsked {
            return Err(Status::internal("the controller answered another request"));
        }
        if matches!(answer, LeaseAnswer::Granted { .. }) {
            self.node.fencing.granted(reply.term, stamped.stamp);
        }
        self.node.desk.hear_pulse(Pulse { term: reply.term, ms: reply.pulse_ms });
        self.learn(&reply.controllers);
        Ok(false)
    }

    /// Remembers the controllers, also for the next start of this agent.
    fn learn(&mut self, members: &[v1::Member]) {
        let controllers: Vec<_> = members.iter().filter_map(known_controller).collect();
        // A list that cannot be read in full is not a list of all.
        if controllers.len() != members.len() || controllers.is_empty() {
            return;
        }
        if controllers == self.member.controllers {
            return;
        }
        let before = self.rotation.current().cloned();
        self.rotation.learn(controllers.clone());
        if before.as_ref() != self.rotation.current() {
            self.client = None;
        }
        self.member.controllers = controllers;
        if let Err(error) = self.member.save(&self.data_dir) {
            tracing::warn!(node_id = %self.node.id, %error, "cannot remember the controllers");
        }
    }
}

async fn answered<T>(
    at_most: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(at_most, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("no answer in time")),
    }
}

fn grants(grants: &[v1::Grant]) -> HashMap<VmId, Epoch> {
    let read = |grant: &v1::Grant| Some((wire::vm_id(&grant.vm_id).ok()?, Epoch(grant.epoch)));
    grants.iter().filter_map(read).collect()
}

fn known_controller(member: &v1::Member) -> Option<KnownController> {
    let ports = member.ports?;
    let port = |port: u32| u16::try_from(port).ok();
    Some(KnownController {
        id: NodeId(member.id),
        name: member.name.clone(),
        address: member.address.parse::<IpAddr>().ok()?,
        ports: Ports {
            api: port(ports.api)?,
            raft: port(ports.raft)?,
            join: port(ports.join)?,
            agent: port(ports.agent)?,
        },
    })
}
