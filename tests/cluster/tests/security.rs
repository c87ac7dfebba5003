//! Who may come in: join tokens are good once and for a time, and each port takes its roles only.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bellwether_cluster_tests::node::join_with;
use bellwether_cluster_tests::{Cases, Cluster, Options, wait_for};
use bellwether_pki::{
    IdentityFiles, JoinSecret, JoinToken, ServerIdentity, client_config, connect_channel,
};
use bellwether_proto::v1;
use tonic::transport::Channel;
use tonic::{Code, Status};

const SOON: Duration = Duration::from_secs(30);
/// One call to one port.
const ANSWER: Duration = Duration::from_secs(5);

#[tokio::test]
async fn strangers_and_wrong_roles_stay_outside() -> Result<()> {
    let cluster = Cluster::start(Options::patient(1)).await?;
    let mut cases = Cases::new();
    cases.run("a used token", used_token(&cluster)).await;
    cases.run("an expired token", expired_token(&cluster)).await;
    cases.run("forged tokens", forged_tokens(&cluster)).await;
    cases.run("a token for the other role", other_role(&cluster)).await;
    cases.run("an agent on the administration service", agent_administers(&cluster)).await;
    cases.run("an administrator among the nodes", admin_among_nodes(&cluster)).await;
    cases.run("wrong roles on the Raft port", raft_port(&cluster)).await;
    cases.run("wrong roles on the agent's port", agent_port(&cluster)).await;
    cases.run("no certificate at all", plain_text(&cluster)).await;
    cases.finish()?;
    cluster.finish()
}

/// Where a newcomer that must not get in would keep its files.
fn newcomer(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.root().join(format!("newcomer-{name}"))
}

async fn join(cluster: &Cluster, token: &str, name: &str) -> Result<()> {
    let address = cluster.nodes()[0].address;
    join_with(&cluster.binaries().agent, token, &newcomer(cluster, name), name, address).await
}

async fn must_not_join(cluster: &Cluster, token: &str, name: &str, words: &[&str]) -> Result<()> {
    let Err(error) = join(cluster, token, name).await else { bail!("{name} was let in") };
    let text = format!("{error:#}").to_lowercase();
    for word in words {
        ensure!(text.contains(word), "{name} is not told `{word}`: {text}");
    }
    ensure!(!newcomer(cluster, name).exists(), "{name} was refused and has a data directory");
    let nodes = cluster.admin().nodes().await?;
    ensure!(nodes.iter().all(|node| node.name != name), "{name} was refused and is a node");
    Ok(())
}

async fn used_token(cluster: &Cluster) -> Result<()> {
    let token = cluster.join_token("agent").await?;
    join(cluster, &token, "first").await.context("the first use")?;
    must_not_join(cluster, &token, "second", &["token", "used", "first"]).await
}

async fn expired_token(cluster: &Cluster) -> Result<()> {
    let token = cluster.admin().join_token("agent", 1).await?;
    let started = std::time::Instant::now();
    wait_for("the token to expire", SOON, async || {
        Ok((started.elapsed() > Duration::from_millis(1_200)).then_some(()))
    })
    .await?;
    must_not_join(cluster, &token, "late", &["token", "expired"]).await
}

async fn forged_tokens(cluster: &Cluster) -> Result<()> {
    let token = cluster.join_token("agent").await?;
    let mut forged: JoinToken = token.parse()?;
    forged.secret = JoinSecret::generate()?;
    must_not_join(cluster, &forged.to_text()?, "guesser", &["token"]).await?;
    // Another CA's pin: the newcomer itself refuses to talk to this cluster.
    let mut other: JoinToken = token.parse()?;
    other.ca_pin = bellwether_pki::CaPin::from_bytes([7; 32]);
    must_not_join(cluster, &other.to_text()?, "lured", &[]).await?;
    let damaged = token.replacen('A', "B", 1);
    let damaged = if damaged == token { token.replacen('a', "b", 1) } else { damaged };
    must_not_join(cluster, &damaged, "slip", &["token", "damaged"]).await?;
    join(cluster, &token, "honest").await.context("the token itself is still good")
}

async fn other_role(cluster: &Cluster) -> Result<()> {
    let token = cluster.join_token("controller").await?;
    must_not_join(cluster, &token, "climber", &["controller", "agent"]).await
}

fn identity(cluster: &Cluster, who: &str) -> Result<IdentityFiles> {
    let node = &cluster.nodes()[0];
    let dir = match who {
        "agent" => node.agent_dir(),
        "controller" => node.controller_dir(),
        _ => return cluster.admin_identity(),
    };
    IdentityFiles::load(&dir).with_context(|| format!("load {}", dir.display()))
}

fn channel(
    cluster: &Cluster,
    who: &str,
    to: SocketAddr,
    server: ServerIdentity,
) -> Result<Channel> {
    let tls = client_config(&identity(cluster, who)?)?;
    Ok(connect_channel(to, tls, server))
}

/// A call that must not be answered, however that shows.
async fn must_be_refused<T>(
    what: &str,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<Status> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(Err(status)) => Ok(status),
        Ok(Ok(_)) => bail!("{what} was answered"),
        Err(_) => bail!("{what} was neither answered nor refused"),
    }
}

async fn agent_administers(cluster: &Cluster) -> Result<()> {
    let api = cluster.nodes()[0].api();
    let channel = channel(cluster, "agent", api, ServerIdentity::AnyController)?;
    let mut client = v1::admin_client::AdminClient::new(channel);
    let calls = [
        must_be_refused("status", client.clone().get_cluster_status(v1::ClusterStatusRequest {}))
            .await?,
        must_be_refused("join token", {
            let request = v1::CreateJoinTokenRequest { role: "controller".into(), ttl_s: 60 };
            client.create_join_token(request)
        })
        .await?,
    ];
    for status in calls {
        ensure!(status.code() == Code::PermissionDenied, "the answer is {status}");
        ensure!(status.message().contains("agent"), "it does not say who was refused: {status}");
    }
    Ok(())
}

async fn admin_among_nodes(cluster: &Cluster) -> Result<()> {
    let api = cluster.nodes()[0].api();
    let channel = channel(cluster, "admin", api, ServerIdentity::AnyController)?;
    let mut client = v1::nodes_client::NodesClient::new(channel);
    let status = must_be_refused("renew", client.renew(v1::RenewRequest::default())).await?;
    ensure!(status.code() == Code::PermissionDenied, "the answer is {status}");
    Ok(())
}

async fn raft_port(cluster: &Cluster) -> Result<()> {
    let raft = cluster.nodes()[0].raft();
    for who in ["agent", "admin"] {
        let channel = channel(cluster, who, raft, ServerIdentity::AnyController)?;
        let mut client = v1::raft_client::RaftClient::new(channel);
        let vote = client.vote(v1::RaftEnvelope::default());
        let status = must_be_refused(&format!("{who}'s vote"), vote).await?;
        ensure!(
            status.code() != Code::InvalidArgument,
            "{who} came as far as the message: {status}"
        );
        let refusal = bellwether_pki::refusal_by_peer(&status).unwrap_or_default();
        ensure!(refusal.contains("role"), "{who} was not refused in the handshake: {status:?}");
    }
    Ok(())
}

async fn agent_port(cluster: &Cluster) -> Result<()> {
    let port = cluster.nodes()[0].agent_port();
    for who in ["agent", "admin"] {
        let channel = channel(cluster, who, port, ServerIdentity::Agent(1))?;
        let mut client = v1::agent_client::AgentClient::new(channel);
        let release = client.release(v1::ReleaseRequest::default());
        let status = must_be_refused(&format!("{who}'s order"), release).await?;
        let refusal = bellwether_pki::refusal_by_peer(&status).unwrap_or_default();
        ensure!(refusal.contains("role"), "{who} was not refused in the handshake: {status:?}");
    }
    Ok(())
}

/// HTTP/2 without TLS on every port.
async fn plain_text(cluster: &Cluster) -> Result<()> {
    let node = &cluster.nodes()[0];
    for port in [node.api(), node.raft(), node.join_port(), node.agent_port()] {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{port}"))?;
        let channel = endpoint.connect_lazy();
        let mut client = v1::admin_client::AdminClient::new(channel);
        let call = client.get_cluster_status(v1::ClusterStatusRequest {});
        must_be_refused(&format!("plain text on {port}"), call).await?;
    }
    Ok(())
}
