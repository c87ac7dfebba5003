//! All simulated hosts: the real join, the real renewal of an agent with its registration and its
//! reports, the real port with TLS; and a service that has no VMM behind it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bellwether_agent::board::Board;
use bellwether_agent::capacity::Capacity;
use bellwether_agent::config::AgentConfig;
use bellwether_agent::desk::Desk;
use bellwether_agent::fencing::Fencing;
use bellwether_agent::launch::Launcher;
use bellwether_agent::node::Node;
use bellwether_agent::renewal::Renewal;
use bellwether_agent::runtime_dir::RuntimeDir;
use bellwether_agent::terms::Terms;
use bellwether_cluster_tests::admin::Admin;
use bellwether_member::{JoinOptions, MemberConfig, MemberRole, Ports};
use bellwether_pki::{
    AGENT_PORT_ROLES, IdentityFiles, RequireRole, ServeLimits, client_config, serve_tls,
    server_config,
};
use bellwether_proto::v1::agent_server::AgentServer;
use bellwether_types::{BootId, NodeId};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use uuid::Uuid;

use super::claims::Claims;
use super::orders::Host;

/// Each simulated host has this for VMs, far more than they take.
const CAPACITY: Capacity = Capacity { memory_mib: 1_024 * 1_024, vcpus: 4_096 };
/// The port of the first simulated host; all have one address.
const FIRST_PORT: u16 = 10_000;
/// So many join at the same time.
const JOINS: usize = 16;
const TOKEN_TTL_S: u64 = 3_600;

/// The simulated hosts of one cluster. Dropping it ends all of them.
pub struct Fleet {
    pub claims: Arc<Claims>,
    agents: Vec<Agent>,
}

struct Agent {
    node: Arc<Node>,
    dark: Arc<AtomicBool>,
    /// The renewal; the port stays open, for a host without power refuses no connection.
    renewal: JoinSet<()>,
    /// Held for as long as the agent lives.
    _port: JoinSet<()>,
}

/// A host that has joined and does not run yet.
struct Joined {
    data_dir: PathBuf,
    member: MemberConfig,
}

impl Fleet {
    /// Lets so many hosts join, each with a token of its own, and starts all of them.
    pub async fn join(admin: &Admin, dir: &Path, address: IpAddr, count: usize) -> Result<Self> {
        let joined = stream::iter(0..count)
            .map(|index| join(admin, dir, address, index))
            .buffered(JOINS)
            .try_collect::<Vec<Joined>>();
        let claims = Arc::new(Claims::default());
        let mut agents = Vec::new();
        for joined in joined.await? {
            agents.push(Agent::start(joined, &claims).await?);
        }
        Ok(Self { claims, agents })
    }

    /// How many renewals all agents have asked for.
    pub fn renewals(&self) -> u64 {
        self.agents.iter().map(|agent| agent.node.desk.newest_request()).sum()
    }

    /// Every tenth host loses power, at least one. Returns how many hosts, and how many VMs ran there.
    pub fn cut_power_of_a_tenth(&mut self) -> (usize, usize) {
        let mut lost: Vec<NodeId> = Vec::new();
        for agent in self.agents.iter_mut().step_by(10) {
            agent.dark.store(true, Ordering::Relaxed);
            agent.renewal.abort_all();
            lost.push(agent.node.id);
        }
        (lost.len(), self.claims.lose(&lost))
    }
}

async fn join(admin: &Admin, dir: &Path, address: IpAddr, index: usize) -> Result<Joined> {
    let name = format!("host-{index:04}");
    let token = admin.join_token("agent", TOKEN_TTL_S).await.context("ask for a token")?;
    let data_dir = dir.join(&name);
    let ports = Ports { agent: FIRST_PORT + u16::try_from(index)?, ..Ports::default() };
    let role = MemberRole::Agent;
    let options =
        JoinOptions { token, data_dir: data_dir.clone(), name: name.clone(), role, address, ports };
    let member = bellwether_member::join(options).await.with_context(|| format!("join {name}"))?;
    Ok(Joined { data_dir, member })
}

impl Agent {
    async fn start(joined: Joined, claims: &Arc<Claims>) -> Result<Self> {
        let Joined { data_dir, member } = joined;
        let files = IdentityFiles::load(&data_dir)?;
        let node = Arc::new(make_node(&member, &data_dir.join("run"))?);
        let dark = Arc::new(AtomicBool::new(false));
        let host = Host { node: Arc::clone(&node), claims: Arc::clone(claims), dark: dark.clone() };
        let mut port = JoinSet::new();
        port.spawn(serve(host, &member, &files).await?);
        let tls = client_config(&files)?;
        let config = AgentConfig::default();
        let renewal = Renewal::new(Arc::clone(&node), config, member, data_dir, CAPACITY, tls);
        let mut renewals = JoinSet::new();
        renewals.spawn(renewal.run());
        Ok(Self { node, dark, renewal: renewals, _port: port })
    }
}

/// The agent's port, as an agent opens it.
async fn serve(
    host: Host,
    member: &MemberConfig,
    files: &IdentityFiles,
) -> Result<impl Future<Output = ()> + use<>> {
    let address = member.agent_addr();
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    let tls = server_config(files, AGENT_PORT_ROLES)?;
    let roles = RequireRole::any_of(AGENT_PORT_ROLES);
    let server = Server::builder()
        .add_service(InterceptedService::new(AgentServer::new(host), roles))
        .serve_with_incoming(serve_tls(listener, tls, ServeLimits::default()));
    Ok(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "a simulated host's port has closed");
        }
    })
}

fn make_node(member: &MemberConfig, runtime_dir: &Path) -> Result<Node> {
    let boot_id = BootId::from_uuid(Uuid::new_v4());
    let runtime = Arc::new(RuntimeDir::open(runtime_dir)?);
    let terms = Terms::open(Arc::clone(&runtime), member.cluster_id)?;
    Ok(Node {
        id: member.id,
        name: member.name.clone(),
        cluster: member.cluster_id,
        boot_id,
        runtime,
        terms,
        // Nobody launches a VMM here.
        launcher: Launcher::new(PathBuf::new()),
        desk: Desk::new(boot_id),
        fencing: Fencing::new(runtime_dir),
        board: Board::default(),
        status_interval: Duration::from_secs(1),
        patience: 1,
    })
}
