//! Nodes: lists, drains, and a person's word that one is down.

use bellwether_core::command::Change;
use bellwether_proto::v1;
use tonic::Status;

use super::AdminApi;
use crate::api::{commit, view};

impl AdminApi {
    pub(super) async fn nodes(&self) -> Result<v1::ListNodesReply, Status> {
        self.confirm().await?;
        let state = self.controller.state();
        let times = self.times();
        let observed = self.controller.observed();
        let nodes = state.nodes.values().map(|node| view::node(&state, &observed, times, node));
        Ok(v1::ListNodesReply { nodes: nodes.collect() })
    }

    pub(super) async fn node(&self, name: &str) -> Result<v1::NodeReply, Status> {
        self.confirm().await?;
        let node = self.find_node(name)?;
        let state = self.controller.state();
        let tasks = state.active_tasks().filter(|task| task.source == Some(node.id));
        let tasks = tasks.map(|task| task.id.0).collect();
        let node = view::node(&state, &self.controller.observed(), self.times(), &node);
        Ok(v1::NodeReply { node: Some(node), tasks })
    }

    fn times(&self) -> (u64, u64) {
        (self.controller.clock.now_ms(), self.controller.timing.suspect_after_ms)
    }

    pub(super) async fn cordon(&self, name: &str, cordoned: bool) -> Result<v1::NodeReply, Status> {
        let node = self.find_node(name)?.id;
        commit(&self.controller, Change::Cordon { node, cordoned }).await?;
        self.node(name).await
    }

    pub(super) async fn confirm_down(
        &self,
        request: v1::NodeRequest,
        who: String,
    ) -> Result<v1::NodeReply, Status> {
        let node = self.find_node(&request.node)?;
        if request.confirm != node.name {
            return Err(Status::invalid_argument(format!(
                "type the node's name, {}, to assert that it is down; `{}` was typed",
                node.name, request.confirm
            )));
        }
        commit(&self.controller, Change::ConfirmDown { node: node.id, who }).await?;
        self.node(&node.name).await
    }
}
