//! A running agent, put together.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bellwether_member::{MemberConfig, MemberRole};
use bellwether_pki::{
    AGENT_PORT_ROLES, IdentityFiles, RequireRole, Role, ServeLimits, client_config, serve_tls,
    server_config,
};
use bellwether_proto::v1::agent_server::AgentServer;
use bellwether_types::{BootId, NodeId};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;

use crate::board::Board;
use crate::capacity;
use crate::config::AgentConfig;
use crate::desk::Desk;
use crate::fencing::Fencing;
use crate::heartbeat::Watch;
use crate::launch::Launcher;
use crate::node::Node;
use crate::registry::Registry;
use crate::renewal::Renewal;
use crate::runtime_dir::RuntimeDir;
use crate::service::AgentService;
use crate::terms::Terms;

/// A controller that is gone without a word is noticed within these.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs the agent of a data directory until it is told to end. The VMs go on afterwards.
pub async fn run(data_dir: &Path, config: AgentConfig) -> anyhow::Result<()> {
    let (member, files) = load_member(data_dir)?;
    let node = Arc::new(make_node(&member, &config)?);
    let capacity = capacity::capacity(&config).context("read the size of this host")?;
    // Before anything is served or told: what is answered must include what was left here.
    let registry = Registry::adopt(Arc::clone(&node)).await.context("take up this node's VMs")?;
    let address = member.agent_addr();
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    tracing::info!(
        node_id = %node.id,
        %address,
        boot_id = %node.boot_id,
        vmm = %node.launcher.vmm.display(),
        "the agent runs"
    );
    let tls = server_config(&files, AGENT_PORT_ROLES).context("set up TLS")?;
    let service = InterceptedService::new(
        AgentServer::new(AgentService::new(Arc::clone(&registry))),
        RequireRole::any_of(AGENT_PORT_ROLES),
    );
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .add_service(service)
        .serve_with_incoming(serve_tls(listener, tls, ServeLimits::default()));
    let client_tls = client_config(&files).context("set up TLS")?;
    let handover_after = Duration::from_millis(config.handover_after_ms);
    let handover_after = Some(handover_after).filter(|after| !after.is_zero());
    let watch = Watch::new(Arc::clone(&node), registry, handover_after);
    let renewal = Renewal::new(node, config, member, data_dir.into(), capacity, client_tls);
    tokio::select! {
        served = server => served.context("serve the agent's port"),
        () = renewal.run() => anyhow::bail!("the renewal has ended"),
        () = watch.run() => anyhow::bail!("the heartbeat has ended"),
        signal = told_to_end() => {
            let name = signal?;
            tracing::info!(signal = name, "ending; the VMs go on");
            Ok(())
        }
    }
}

fn load_member(data_dir: &Path) -> anyhow::Result<(MemberConfig, IdentityFiles)> {
    let member = MemberConfig::load(data_dir)
        .context("this is no node's data directory; run `bellwether-agent join` first")?;
    if member.role != MemberRole::Agent {
        anyhow::bail!("`{}` belongs to a controller; an agent needs its own", data_dir.display());
    }
    let files = IdentityFiles::load(data_dir)?;
    let identity = files.identity();
    if (identity.role, NodeId(identity.id)) != (Role::Agent, member.id) {
        anyhow::bail!("the certificate in `{}` is of {identity}; join again", data_dir.display());
    }
    Ok((member, files))
}

fn make_node(member: &MemberConfig, config: &AgentConfig) -> anyhow::Result<Node> {
    let boot_id: BootId = config.boot_id()?;
    let runtime = Arc::new(RuntimeDir::open(&config.runtime_dir)?);
    let terms = Terms::open(Arc::clone(&runtime), member.cluster_id)?;
    let launcher = Launcher::new(config.find_vmm()?);
    let fencing = Fencing::new(&config.runtime_dir);
    Ok(Node {
        id: member.id,
        name: member.name.clone(),
        cluster: member.cluster_id,
        boot_id,
        runtime,
        terms,
        launcher,
        desk: Desk::new(boot_id),
        fencing,
        board: Board::default(),
        status_interval: Duration::from_millis(config.status_interval_ms),
        patience: config.patience,
    })
}

async fn told_to_end() -> anyhow::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}
