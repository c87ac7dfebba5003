//! The services of the API port and the join port.

mod admin;
mod console;
mod join;
mod nodes;
mod view;

use std::sync::Arc;

use bellwether_core::command::Change;
use bellwether_core::{Outcome, Rejection, RejectionKind};
use bellwether_member::not_started;
use bellwether_pki::{RequireRole, Role};
use bellwether_proto::v1::admin_server::AdminServer;
use bellwether_proto::v1::join_server::JoinServer;
use bellwether_proto::v1::nodes_server::NodesServer;
use bellwether_raft::ProposeError;
use tonic::Status;
use tonic::service::interceptor::InterceptedService;

use crate::controller::Controller;

type Guarded<S> = InterceptedService<S, RequireRole>;

pub fn admin_server(controller: &Arc<Controller>) -> Guarded<AdminServer<admin::AdminApi>> {
    let service = admin::AdminApi::new(Arc::clone(controller));
    AdminServer::with_interceptor(service, RequireRole::any_of(&[Role::Admin]))
}

pub fn nodes_server(controller: &Arc<Controller>) -> Guarded<NodesServer<nodes::NodesApi>> {
    let service = nodes::NodesApi::new(Arc::clone(controller));
    NodesServer::with_interceptor(service, RequireRole::any_of(&[Role::Agent]))
}

pub fn join_server(controller: &Arc<Controller>) -> JoinServer<join::JoinApi> {
    JoinServer::new(join::JoinApi::new(Arc::clone(controller)))
}

/// Commits a change and turns what cannot be answered into a status.
async fn commit(controller: &Controller, change: Change) -> Result<Outcome, Status> {
    match controller.propose(change).await {
        Ok(Outcome::Rejected(rejection)) => Err(rejected(&rejection)),
        Ok(outcome) => Ok(outcome),
        Err(error) => Err(not_proposed(&error)),
    }
}

fn rejected(rejection: &Rejection) -> Status {
    let text = rejection.text.clone();
    match rejection.kind {
        RejectionKind::NotFound => Status::not_found(text),
        RejectionKind::AlreadyExists => Status::already_exists(text),
        RejectionKind::Conflict => Status::failed_precondition(text),
        RejectionKind::Invalid => Status::invalid_argument(text),
        RejectionKind::Denied => Status::permission_denied(text),
    }
}

fn not_proposed(error: &ProposeError) -> Status {
    match error {
        ProposeError::NotLeader { .. } => not_started("the leader has just changed"),
        ProposeError::OutcomeUnknown { .. } | ProposeError::Fatal(_) => {
            Status::unknown(format!("{error}; look before asking again"))
        }
        ProposeError::TooLarge { .. } | ProposeError::Encode(_) => {
            Status::invalid_argument(error.to_string())
        }
    }
}
