//! Start-up: Raft, then the three ports, then whatever leadership brings.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use bellwether_core::Member;
use bellwether_core::command::Change;
use bellwether_member::{MemberConfig, MemberRole, open_member};
use bellwether_pki::{
    API_PORT_ROLES, IdentityFiles, RAFT_PORT_ROLES, ServeLimits, ServerTls, join_server_config,
    serve_tls, server_config,
};
use bellwether_raft::{ControllerNode, RaftConfig, RaftHandle};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::transport::Server;

use crate::config::ControllerConfig;
use crate::controller::{Controller, Settings};
use crate::forward::ForwardLayer;
use crate::links::Links;
use crate::{api, lead};

/// Runs a controller until it is told to stop or cannot go on.
pub async fn run(data_dir: &Path) -> anyhow::Result<()> {
    let (member, files) = open_member(data_dir)?;
    anyhow::ensure!(
        member.role == MemberRole::Controller,
        "{} is the data directory of an agent; start it with bellwether-agent",
        data_dir.display()
    );
    let config = ControllerConfig::load(data_dir)?;
    let ports = Listeners::bind(&member).await?;
    let raft = start_raft(data_dir, &member, &config, &files).await?;
    let links = Links::new(&files)?;
    let settings = Settings {
        timing: config.timing.clone(),
        watchdog: config.watchdog_timing(),
        power_dir: data_dir.join(lead::power::DIRECTORY),
    };
    let controller = Arc::new(Controller::new(member, files, settings, raft, links));

    let mut tasks = JoinSet::new();
    ports.serve(&controller, &mut tasks)?;
    bootstrap(&controller).await?;
    tasks.spawn(lead::run(Arc::clone(&controller)));
    let member = &controller.member;
    tracing::info!(node_id = member.id.0, name = member.name, api = %member.api_addr(), "serving");

    let ended = tokio::select! {
        signal = stop_signal() => signal.map(|name| tracing::info!(signal = name, "stopping")),
        reason = controller.raft.stopped() => Err(anyhow::anyhow!("raft has stopped: {reason}")),
        Some(done) = tasks.join_next() => done.context("a part of the controller panicked")?,
    };
    if ended.is_ok() {
        hand_over(&controller.raft).await;
    }
    tasks.abort_all();
    controller.raft.shutdown().await.context("stop raft")?;
    ended
}

/// A leader that stops in order lets the one lead that has the most of the log, so that nobody has
/// to wait for an election. Whether it works or not, the leader stops.
async fn hand_over(raft: &RaftHandle) {
    let status = raft.status();
    if !status.is_leader() {
        return;
    }
    let others = status.replicated.iter().filter(|(id, _)| status.voters.contains_key(id));
    let next = others.filter(|(id, _)| **id != status.node_id).max_by_key(|(id, at)| (**at, **id));
    let Some((to, _)) = next else { return };
    match raft.transfer_leadership(*to).await {
        Ok(()) => tracing::info!(to, "another controller leads"),
        Err(error) => tracing::warn!(%error, "stopping as the leader"),
    }
}

async fn start_raft(
    data_dir: &Path,
    member: &MemberConfig,
    config: &ControllerConfig,
    files: &IdentityFiles,
) -> anyhow::Result<RaftHandle> {
    let mut raft_config = RaftConfig::new(member.id.0, data_dir);
    raft_config.cluster_name = member.cluster_id.to_string();
    raft_config.timers = config.raft.timers();
    let links = Arc::new(Links::new(files)?);
    let connect = move |id: u64, node: ControllerNode| {
        let channel = links.raft(id, &node);
        async move { channel }
    };
    RaftHandle::start(raft_config, connect).await.context("start raft")
}

/// The first controller of a new cluster makes itself the only voter, once.
async fn bootstrap(controller: &Controller) -> anyhow::Result<()> {
    let member = &controller.member;
    if !member.bootstrap {
        return Ok(());
    }
    if !controller.raft.is_initialized().await? {
        controller.raft.initialize_single(controller_node(&first_member(member))).await?;
    }
    // Only the first leadership finds no cluster in the state; nobody else can lead before that.
    let alone = controller.raft.status().voters.len() <= 1;
    if alone && controller.state().cluster.is_none() {
        let change = Change::InitCluster {
            id: member.cluster_id,
            name: member.cluster_name.clone(),
            storage: member.storage.clone(),
            first: first_member(member),
        };
        controller.propose(change).await.context("write the cluster into its own log")?;
    }
    Ok(())
}

fn first_member(member: &MemberConfig) -> Member {
    Member {
        id: member.id.0,
        name: member.name.clone(),
        address: member.address.to_string(),
        ports: member.ports,
    }
}

/// A controller as Raft's membership names it.
pub fn controller_node(member: &Member) -> ControllerNode {
    ControllerNode {
        name: member.name.clone(),
        address: member.address.clone(),
        api_port: member.ports.api,
        raft_port: member.ports.raft,
        join_port: member.ports.join,
    }
}

/// The three ports, bound before anything else happens, so that a taken port is found at once.
struct Listeners {
    api: TcpListener,
    raft: TcpListener,
    join: TcpListener,
}

impl Listeners {
    async fn bind(member: &MemberConfig) -> anyhow::Result<Self> {
        Ok(Self {
            api: bind(member.api_addr(), "api").await?,
            raft: bind(member.raft_addr(), "raft").await?,
            join: bind(member.join_addr(), "join").await?,
        })
    }

    fn serve(
        self,
        controller: &Arc<Controller>,
        tasks: &mut JoinSet<anyhow::Result<()>>,
    ) -> anyhow::Result<()> {
        let files = &controller.files;
        let raft = Server::builder().add_service(controller.raft.service().into_server());
        serve_port(tasks, self.raft, server_config(files, RAFT_PORT_ROLES)?, raft);
        let api = Server::builder()
            .layer(ForwardLayer::new(Arc::clone(controller)))
            .add_service(api::admin_server(controller))
            .add_service(api::nodes_server(controller));
        let incoming = serve_tls(self.api, server_config(files, API_PORT_ROLES)?, limits());
        tasks.spawn(async move { Ok(api.serve_with_incoming(incoming).await?) });
        let join = Server::builder().add_service(api::join_server(controller));
        serve_port(tasks, self.join, join_server_config(files)?, join);
        Ok(())
    }
}

fn limits() -> ServeLimits {
    ServeLimits::default()
}

fn serve_port(
    tasks: &mut JoinSet<anyhow::Result<()>>,
    listener: TcpListener,
    tls: ServerTls,
    router: tonic::transport::server::Router,
) {
    let incoming = serve_tls(listener, tls, limits());
    tasks.spawn(async move { Ok(router.serve_with_incoming(incoming).await?) });
}

async fn bind(addr: SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr).await.with_context(|| {
        format!(
            "listen on the {what} port {addr}: is another controller running with this address?"
        )
    })
}

async fn stop_signal() -> anyhow::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
    }
}
