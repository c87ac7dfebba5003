//! How a host becomes a member. The token is used up in the replicated log before a certificate is
//! signed, so that it can never admit two.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bellwether_core::Outcome;
use bellwether_core::command::Change;
use bellwether_member::{CERTIFICATE_DAYS, check_name, not_started};
use bellwether_pki::{ConnectInfo, Identity, JoinSecret, Validity, VerifiedCsr};
use bellwether_proto::v1;
use bellwether_proto::v1::join_server::Join;
use bellwether_types::{MemberRole, Ports};
use tonic::{Request, Response, Status};

use super::{commit, view};
use crate::controller::Controller;

/// How long a newcomer's request waits for this controller to lead, if an election is on.
const ELECTION_PATIENCE: Duration = Duration::from_secs(5);

pub struct JoinApi {
    controller: Arc<Controller>,
}

impl JoinApi {
    pub fn new(controller: Arc<Controller>) -> Self {
        Self { controller }
    }

    /// The newcomer's certificate pins no controller, so its request is not passed on: it is told
    /// to ask the next endpoint of its token.
    async fn require_leader(&self) -> Result<(), Status> {
        let mut watch = self.controller.raft.watch_status();
        let known = watch.wait_for(|status| status.leader.is_some());
        match tokio::time::timeout(ELECTION_PATIENCE, known).await {
            Ok(Ok(status)) if status.is_leader() => Ok(()),
            _ => Err(not_started("this controller does not lead")),
        }
    }

    fn sign(&self, identity: &Identity, csr: &VerifiedCsr) -> Result<String, Status> {
        let ca = self.controller.files.ca().ok_or_else(|| {
            Status::internal("this controller does not hold the CA's key; restore ca-key.pem")
        })?;
        let validity = Validity::days(SystemTime::now(), CERTIFICATE_DAYS);
        let issued = ca.issue(identity, csr, validity);
        let issued = issued.map_err(|error| Status::internal(format!("sign: {error}")))?;
        Ok(issued.pem().to_owned())
    }
}

#[tonic::async_trait]
impl Join for JoinApi {
    async fn join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::JoinReply>, Status> {
        let peer = request.extensions().get::<ConnectInfo>().cloned();
        let message = request.into_inner();
        let csr = VerifiedCsr::parse(&message.certificate_request)
            .map_err(|error| Status::invalid_argument(format!("certificate request: {error}")))?;
        let peer = peer.ok_or_else(|| Status::unauthenticated("the connection has no key"))?;
        csr.check_peer(&peer).map_err(|error| Status::unauthenticated(error.to_string()))?;
        let secret = JoinSecret::from_wire(&message.secret)
            .map_err(|_| Status::permission_denied("the join token is not one of this cluster"))?;
        let role = member_role(&message.role)?;
        self.require_leader().await?;
        // Looked up before anything is written: strangers must not fill the log.
        let hash = *secret.hash().as_bytes();
        if !self.controller.state().tokens.contains_key(&hash) {
            return Err(Status::permission_denied(
                "the join token is not one of this cluster; make a new one with \
                 `bell cluster join-token`",
            ));
        }
        check_name(&message.name).map_err(Status::invalid_argument)?;
        let change = Change::RedeemToken {
            hash,
            role,
            name: message.name.clone(),
            address: address(&message.address)?,
            ports: ports(message.ports)?,
        };
        let Outcome::Member(id) = commit(&self.controller, change).await? else {
            return Err(Status::internal("the token was redeemed and gave no member"));
        };
        self.welcome(role, id, message.name, &csr).map(Response::new)
    }
}

impl JoinApi {
    fn welcome(
        &self,
        role: MemberRole,
        id: u64,
        name: String,
        csr: &VerifiedCsr,
    ) -> Result<v1::JoinReply, Status> {
        let member = &self.controller.member;
        let identity = Identity { cluster: member.cluster_id, role: role.into(), id, name };
        let certificate = self.sign(&identity, csr)?;
        let state = self.controller.state();
        // Every controller signs for later newcomers, so each of them holds the CA's key.
        let ca_key = match (role, self.controller.files.ca()) {
            (MemberRole::Controller, Some(ca)) => ca.key_pem().to_string(),
            _ => String::new(),
        };
        Ok(v1::JoinReply {
            cluster_id: member.cluster_id.to_string(),
            cluster_name: member.cluster_name.clone(),
            id,
            certificate,
            ca_certificate: self.controller.files.ca_pem(),
            ca_key,
            controllers: state.controllers.values().map(view::member).collect(),
            storage: state
                .cluster
                .as_ref()
                .map_or(&member.storage, |cluster| &cluster.storage)
                .display()
                .to_string(),
        })
    }
}

fn member_role(word: &str) -> Result<MemberRole, Status> {
    MemberRole::from_word(word)
        .ok_or_else(|| Status::invalid_argument(format!("`{word}` is not controller or agent")))
}

fn address(text: &str) -> Result<String, Status> {
    match text.parse::<std::net::IpAddr>() {
        Ok(ip) => Ok(ip.to_string()),
        Err(_) => Err(Status::invalid_argument(format!("`{text}` is not an IP address"))),
    }
}

fn ports(ports: Option<v1::Ports>) -> Result<Ports, Status> {
    let ports = ports.ok_or_else(|| Status::invalid_argument("the field `ports` is missing"))?;
    Ok(Ports::try_from(ports)?)
}
