//! What administrators ask. Each request is checked, committed as a command, and answered with
//! what stands afterwards; the work itself is done by tasks.

mod cluster;
mod forecast;
mod nodes;
mod rules;
mod tasks;
mod validate;
mod vms;

use std::pin::Pin;
use std::sync::Arc;

use bellwether_proto::v1;
use bellwether_proto::v1::admin_server::Admin;
use futures::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::controller::Controller;

type Answer<T> = Result<Response<T>, Status>;
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

pub struct AdminApi {
    controller: Arc<Controller>,
}

impl AdminApi {
    pub fn new(controller: Arc<Controller>) -> Self {
        Self { controller }
    }
}

/// The name of who asks, for the log of tasks and events.
fn who<T>(request: &Request<T>) -> Result<String, Status> {
    Ok(bellwether_pki::caller(request)?.name.clone())
}

#[tonic::async_trait]
impl Admin for AdminApi {
    async fn get_cluster_status(
        &self,
        _request: Request<v1::ClusterStatusRequest>,
    ) -> Answer<v1::ClusterStatus> {
        self.cluster_status().await.map(Response::new)
    }

    async fn create_join_token(
        &self,
        request: Request<v1::CreateJoinTokenRequest>,
    ) -> Answer<v1::CreateJoinTokenReply> {
        self.join_token(request.into_inner()).await.map(Response::new)
    }

    async fn set_cluster(
        &self,
        request: Request<v1::SetClusterRequest>,
    ) -> Answer<v1::ClusterStatus> {
        self.change_cluster(request.into_inner()).await.map(Response::new)
    }

    async fn list_nodes(
        &self,
        _request: Request<v1::ListNodesRequest>,
    ) -> Answer<v1::ListNodesReply> {
        self.nodes().await.map(Response::new)
    }

    async fn get_node(&self, request: Request<v1::NodeRequest>) -> Answer<v1::NodeReply> {
        self.node(&request.into_inner().node).await.map(Response::new)
    }

    async fn drain_node(&self, request: Request<v1::NodeRequest>) -> Answer<v1::NodeReply> {
        self.cordon(&request.into_inner().node, true).await.map(Response::new)
    }

    async fn resume_node(&self, request: Request<v1::NodeRequest>) -> Answer<v1::NodeReply> {
        self.cordon(&request.into_inner().node, false).await.map(Response::new)
    }

    async fn confirm_node_down(&self, request: Request<v1::NodeRequest>) -> Answer<v1::NodeReply> {
        let who = who(&request)?;
        self.confirm_down(request.into_inner(), who).await.map(Response::new)
    }

    async fn unquarantine_node(&self, request: Request<v1::NodeRequest>) -> Answer<v1::NodeReply> {
        let who = who(&request)?;
        self.unquarantine(&request.into_inner().node, who).await.map(Response::new)
    }

    async fn set_vm(&self, request: Request<v1::SetVmRequest>) -> Answer<v1::VmReply> {
        self.change_vm(request.into_inner()).await.map(Response::new)
    }

    async fn create_vm(&self, request: Request<v1::CreateVmRequest>) -> Answer<v1::VmReply> {
        let who = who(&request)?;
        self.create(request.into_inner(), who).await.map(Response::new)
    }

    async fn list_vms(&self, _request: Request<v1::ListVmsRequest>) -> Answer<v1::ListVmsReply> {
        self.vms().await.map(Response::new)
    }

    async fn get_vm(&self, request: Request<v1::VmRequest>) -> Answer<v1::VmReply> {
        self.vm(&request.into_inner().vm).await.map(Response::new)
    }

    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Answer<v1::VmReply> {
        let who = who(&request)?;
        let message = request.into_inner();
        self.begin(bellwether_core::TaskKind::Start, &message.vm, &message.node, who).await
    }

    async fn shutdown_vm(&self, request: Request<v1::StopVmRequest>) -> Answer<v1::VmReply> {
        let who = who(&request)?;
        self.begin(bellwether_core::TaskKind::Shutdown, &request.into_inner().vm, "", who).await
    }

    async fn stop_vm(&self, request: Request<v1::StopVmRequest>) -> Answer<v1::VmReply> {
        let who = who(&request)?;
        self.begin(bellwether_core::TaskKind::Stop, &request.into_inner().vm, "", who).await
    }

    async fn pause_vm(&self, request: Request<v1::VmRequest>) -> Answer<v1::VmReply> {
        self.set_paused(&request.into_inner().vm, true).await.map(Response::new)
    }

    async fn resume_vm(&self, request: Request<v1::VmRequest>) -> Answer<v1::VmReply> {
        self.set_paused(&request.into_inner().vm, false).await.map(Response::new)
    }

    async fn migrate_vm(&self, request: Request<v1::MigrateVmRequest>) -> Answer<v1::VmReply> {
        let who = who(&request)?;
        let message = request.into_inner();
        self.begin(bellwether_core::TaskKind::Migrate, &message.vm, &message.node, who).await
    }

    async fn save_vm(&self, request: Request<v1::VmRequest>) -> Answer<v1::VmReply> {
        let who = who(&request)?;
        self.begin(bellwether_core::TaskKind::Save, &request.into_inner().vm, "", who).await
    }

    async fn restore_vm(&self, request: Request<v1::StartVmRequest>) -> Answer<v1::VmReply> {
        let who = who(&request)?;
        let message = request.into_inner();
        self.begin(bellwether_core::TaskKind::Restore, &message.vm, &message.node, who).await
    }

    async fn delete_vm(&self, request: Request<v1::VmRequest>) -> Answer<v1::DeleteVmReply> {
        let who = who(&request)?;
        self.delete(&request.into_inner().vm, who).await.map(Response::new)
    }

    async fn list_tasks(
        &self,
        request: Request<v1::ListTasksRequest>,
    ) -> Answer<v1::ListTasksReply> {
        self.confirm().await?;
        Ok(Response::new(self.tasks(request.into_inner().all)))
    }

    async fn get_task(&self, request: Request<v1::TaskRequest>) -> Answer<v1::Task> {
        self.confirm().await?;
        self.task(request.into_inner().id).map(Response::new)
    }

    type WatchTaskStream = BoxStream<v1::Task>;

    async fn watch_task(&self, request: Request<v1::TaskRequest>) -> Answer<Self::WatchTaskStream> {
        self.confirm().await?;
        self.watch(request.into_inner().id).map(Response::new)
    }

    type ValidateClusterStream = BoxStream<v1::Finding>;

    async fn validate_cluster(
        &self,
        _request: Request<v1::ValidateClusterRequest>,
    ) -> Answer<Self::ValidateClusterStream> {
        self.confirm().await?;
        Ok(Response::new(self.validation()))
    }

    async fn what_if(&self, request: Request<v1::WhatIfRequest>) -> Answer<v1::Forecast> {
        self.forecast(request.into_inner()).await.map(Response::new)
    }

    async fn explain_vm(&self, request: Request<v1::VmRequest>) -> Answer<v1::VmExplanation> {
        self.confirm().await?;
        self.vm_explanation(&request.into_inner().vm).map(Response::new)
    }

    async fn explain_task(&self, request: Request<v1::TaskRequest>) -> Answer<v1::TaskExplanation> {
        self.confirm().await?;
        self.task_explanation(request.into_inner().id).map(Response::new)
    }

    type ListEventsStream = BoxStream<v1::Event>;

    async fn list_events(
        &self,
        request: Request<v1::EventsRequest>,
    ) -> Answer<Self::ListEventsStream> {
        self.confirm().await?;
        Ok(Response::new(self.events(request.into_inner())))
    }

    type ConsoleStream = BoxStream<v1::ConsoleOutputFrame>;

    async fn console(
        &self,
        request: Request<Streaming<v1::ConsoleInputFrame>>,
    ) -> Answer<Self::ConsoleStream> {
        let stream = super::console::attach(&self.controller, request.into_inner()).await?;
        Ok(Response::new(stream))
    }
}
