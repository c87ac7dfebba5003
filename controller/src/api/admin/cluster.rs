//! The cluster as a whole, and leave to join it.

use std::net::SocketAddr;

use bellwether_core::command::Change;
use bellwether_core::{Member, Node};
use bellwether_member::not_started;
use bellwether_pki::JoinToken;
use bellwether_proto::v1;
use bellwether_types::{MemberRole, VmState};
use tonic::Status;

use super::AdminApi;
use crate::api::{commit, view};

/// The longest life of a join token: a week.
const TOKEN_TTL_S_MAX: u64 = 7 * 24 * 3_600;

impl AdminApi {
    /// An answer of the leader is worth something only if it still leads.
    pub(super) async fn confirm(&self) -> Result<(), Status> {
        let confirmed = self.controller.raft.confirm_leadership().await;
        confirmed.map(drop).map_err(|error| not_started(error.to_string()))
    }

    pub(super) async fn cluster_status(&self) -> Result<v1::ClusterStatus, Status> {
        self.confirm().await?;
        let controller = &self.controller;
        let state = controller.state();
        let status = controller.raft.status();
        let running = {
            let observed = controller.observed();
            let seen = state.vms.values().map(|vm| view::seen_state(&state, &observed, vm).0);
            seen.filter(|seen| *seen == VmState::Running).count()
        };
        let leader = status.leader.as_ref().map_or(0, |(id, _)| *id);
        let member = |member: &Member| v1::ControllerStatus {
            member: Some(view::member(member)),
            leader: member.id == leader,
            voter: status.voters.contains_key(&member.id),
            matched: match member.id == status.node_id {
                true => status.last_log.unwrap_or(0),
                false => status.replicated.get(&member.id).copied().flatten().unwrap_or(0),
            },
        };
        Ok(v1::ClusterStatus {
            cluster_id: controller.member.cluster_id.to_string(),
            name: controller.member.cluster_name.clone(),
            storage: controller.member.storage.display().to_string(),
            leader,
            term: status.term,
            last_applied: status.last_applied.unwrap_or(0),
            controllers: state.controllers.values().map(member).collect(),
            nodes_online: state.nodes.values().filter(|node| node.is_online()).count() as u64,
            nodes_total: state.nodes.len() as u64,
            vms_running: running as u64,
            vms_total: state.vms.len() as u64,
            settings: Some(state.settings.into()),
        })
    }

    pub(super) async fn join_token(
        &self,
        request: v1::CreateJoinTokenRequest,
    ) -> Result<v1::CreateJoinTokenReply, Status> {
        let Some(role) = MemberRole::from_word(&request.role) else {
            return Err(Status::invalid_argument(format!(
                "`{}` is not a role that can join; give controller or agent",
                request.role
            )));
        };
        if request.ttl_s == 0 || request.ttl_s > TOKEN_TTL_S_MAX {
            return Err(Status::invalid_argument(format!(
                "a token lives 1 to {TOKEN_TTL_S_MAX} seconds, not {}",
                request.ttl_s
            )));
        }
        let ports = self.join_ports();
        if ports.is_empty() {
            return Err(not_started("the cluster is just being made"));
        }
        let token = JoinToken::generate(role.into(), self.controller.files.ca_pin(), ports)
            .map_err(|error| Status::internal(format!("make a token: {error}")))?;
        let text = token.to_text().map_err(|error| Status::internal(error.to_string()))?;
        let expires_at = self.controller.clock.now_ms() + request.ttl_s * 1_000;
        let hash = *token.secret_hash().as_bytes();
        commit(&self.controller, Change::CreateToken { hash, role, expires_at }).await?;
        Ok(v1::CreateJoinTokenReply { token: text.to_string(), expires_at_ms: expires_at })
    }

    /// Where a newcomer can ask: this controller, which leads, first.
    fn join_ports(&self) -> Vec<SocketAddr> {
        let state = self.controller.state();
        let own = self.controller.member.id.0;
        let mut members: Vec<&Member> = state.controllers.values().collect();
        members.sort_by_key(|member| (member.id != own, member.id));
        let addr = |member: &&Member| {
            let ip = member.address.parse().ok()?;
            Some(SocketAddr::new(ip, member.ports.join))
        };
        members.iter().filter_map(addr).collect()
    }

    pub(super) fn find_node(&self, name: &str) -> Result<Node, Status> {
        let state = self.controller.state();
        state.find_node(name).cloned().ok_or_else(|| {
            Status::not_found(format!("there is no node `{name}`; see `bell node list`"))
        })
    }
}
