//! The administration service, asked through whichever controller answers.

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bellwether_pki::{IdentityFiles, ServerIdentity, client_config, connect_channel};
use bellwether_proto::v1;
use bellwether_proto::v1::admin_client::AdminClient;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::wait::wait_for;

/// One question to one controller.
const ANSWER: Duration = Duration::from_secs(5);
/// An election, and a restart of what was killed before it.
const PATIENCE: Duration = Duration::from_secs(30);

pub type Client = AdminClient<Channel>;

/// The controllers of a cluster, as an administrator sees them.
#[derive(Clone, Debug)]
pub struct Admin {
    clients: Vec<Client>,
}

impl Admin {
    pub fn new(identity_dir: &Path, endpoints: &[SocketAddr]) -> Result<Self> {
        let files = IdentityFiles::load(identity_dir)
            .with_context(|| format!("read the identity in {}", identity_dir.display()))?;
        let tls = client_config(&files)?;
        let connect = |endpoint: &SocketAddr| {
            AdminClient::new(connect_channel(*endpoint, tls.clone(), ServerIdentity::AnyController))
        };
        Ok(Self { clients: endpoints.iter().map(connect).collect() })
    }

    /// Knows no controller yet.
    pub fn none() -> Self {
        Self { clients: Vec::new() }
    }

    /// The client of one controller, counted from 1.
    pub fn of(&self, node: usize) -> Client {
        self.clients[node - 1].clone()
    }

    /// Asks one controller after the other until one answers. Only for what may be asked twice.
    pub async fn ask<T, F>(&self, question: impl Fn(Client) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let started = Instant::now();
        loop {
            for client in &self.clients {
                match tokio::time::timeout(ANSWER, question(client.clone())).await {
                    Ok(Ok(reply)) => return Ok(reply.into_inner()),
                    Ok(Err(status)) if !is_passing(&status) => return Err(status),
                    Ok(Err(status)) if started.elapsed() > PATIENCE => return Err(status),
                    Err(_) if started.elapsed() > PATIENCE => {
                        return Err(Status::deadline_exceeded("no controller answers"));
                    }
                    _ => {}
                }
            }
            // The controllers answer "not now" at once; asking again needs a pace.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn vm(&self, name: &str) -> Result<v1::Vm> {
        let reply =
            self.ask(async |mut c| c.get_vm(v1::VmRequest { vm: name.into() }).await).await?;
        reply.vm.context("the reply has no VM")
    }

    pub async fn nodes(&self) -> Result<Vec<v1::Node>> {
        Ok(self.ask(async |mut c| c.list_nodes(v1::ListNodesRequest {}).await).await?.nodes)
    }

    pub async fn node(&self, name: &str) -> Result<v1::Node> {
        let found = self.nodes().await?.into_iter().find(|node| node.name == name);
        found.with_context(|| format!("there is no node {name}"))
    }

    pub async fn status(&self) -> Result<v1::ClusterStatus> {
        Ok(self.ask(async |mut c| c.get_cluster_status(v1::ClusterStatusRequest {}).await).await?)
    }

    pub async fn task(&self, id: u64) -> Result<v1::Task> {
        Ok(self.ask(async |mut c| c.get_task(v1::TaskRequest { id }).await).await?)
    }

    pub async fn create_vm(&self, spec: &v1::VmSpec, start: bool) -> Result<v1::VmReply, Status> {
        let request = v1::CreateVmRequest {
            spec: Some(spec.clone()),
            start,
            ..v1::CreateVmRequest::default()
        };
        self.ask(async |mut c| c.create_vm(request.clone()).await).await
    }

    pub async fn migrate(&self, vm: &str, node: &str) -> Result<u64, Status> {
        let request = v1::MigrateVmRequest { vm: vm.into(), node: node.into() };
        Ok(self.ask(async |mut c| c.migrate_vm(request.clone()).await).await?.task)
    }

    pub async fn start(&self, vm: &str, node: &str) -> Result<u64, Status> {
        let request = v1::StartVmRequest { vm: vm.into(), node: node.into() };
        Ok(self.ask(async |mut c| c.start_vm(request.clone()).await).await?.task)
    }

    pub async fn restore(&self, vm: &str, node: &str) -> Result<u64, Status> {
        let request = v1::StartVmRequest { vm: vm.into(), node: node.into() };
        Ok(self.ask(async |mut c| c.restore_vm(request.clone()).await).await?.task)
    }

    pub async fn save(&self, vm: &str) -> Result<u64, Status> {
        let request = v1::VmRequest { vm: vm.into() };
        Ok(self.ask(async |mut c| c.save_vm(request.clone()).await).await?.task)
    }

    pub async fn stop(&self, vm: &str) -> Result<u64, Status> {
        let request = v1::StopVmRequest { vm: vm.into() };
        Ok(self.ask(async |mut c| c.stop_vm(request.clone()).await).await?.task)
    }

    pub async fn delete(&self, vm: &str) -> Result<(), Status> {
        let request = v1::VmRequest { vm: vm.into() };
        self.ask(async |mut c| c.delete_vm(request.clone()).await).await.map(|_| ())
    }

    pub async fn join_token(&self, role: &str, ttl_s: u64) -> Result<String, Status> {
        let request = v1::CreateJoinTokenRequest { role: role.into(), ttl_s };
        Ok(self.ask(async |mut c| c.create_join_token(request.clone()).await).await?.token)
    }

    /// Waits until a task has ended, well or not.
    pub async fn task_ended(&self, id: u64, timeout: Duration) -> Result<v1::Task> {
        let what = format!("task {id} to end");
        wait_for(&what, timeout, async || {
            let task = self.task(id).await?;
            match task.outcome.as_str() {
                "running" => Err(anyhow!("it is at {}: {:?}", task.step, task.log.last())),
                _ => Ok(Some(task)),
            }
        })
        .await
    }

    /// Waits until a task is done; its failure is an error.
    pub async fn task_done(&self, id: u64, timeout: Duration) -> Result<v1::Task> {
        let task = self.task_ended(id, timeout).await?;
        match task.outcome.as_str() {
            "done" => Ok(task),
            outcome => bail!("task {id} ({}) {outcome}: {}", task.kind, task.error),
        }
    }

    /// Waits until a VM is in a state and no task works on it.
    pub async fn settled(&self, vm: &str, states: &[&str], timeout: Duration) -> Result<v1::Vm> {
        let what = format!("VM {vm} to be {}", states.join(" or "));
        wait_for(&what, timeout, async || {
            let now = self.vm(vm).await?;
            match now.task == 0 && states.contains(&now.state.as_str()) {
                true => Ok(Some(now)),
                false => Err(anyhow!(
                    "it is {} on `{}`, task {}, {} {}",
                    now.state,
                    now.node,
                    now.task,
                    now.reason,
                    now.pending
                )),
            }
        })
        .await
    }

    pub async fn node_is(&self, name: &str, phase: &str, timeout: Duration) -> Result<v1::Node> {
        let what = format!("node {name} to be {phase}");
        wait_for(&what, timeout, async || {
            let node = self.node(name).await?;
            match node.phase == phase {
                true => Ok(Some(node)),
                false => Err(anyhow!("it is {}: {}", node.phase, node.reason)),
            }
        })
        .await
    }
}

/// Whether asking again, or asking another controller, can help.
fn is_passing(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled)
        || (status.code() == Code::Unknown && status.message().contains("transport"))
}
