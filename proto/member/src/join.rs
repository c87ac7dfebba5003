//! Joining with a token.
//!
//! ```text
//!  for each endpoint of the token
//!    connect, pinning the CA -- no connection ----------> next endpoint
//!    Join ---- the controller cannot serve now ---------> next endpoint
//!          --- the connection breaks, no answer in time -> next endpoint, but remember it
//!          --- refused -> the reason (or "unknown", if an earlier attempt may have used the token)
//!          --- granted -> check everything, write all, rename into place
//! ```
//!
//! Asking again after an unknown outcome is harmless: the token admits one member, so the cluster
//! refuses the second request if the first was carried out.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bellwether_pki::{
    IdentityFiles, JoinToken, KeyAndCsr, Role, ServerIdentity, connect_channel, join_client_config,
};
use bellwether_proto::v1;
use bellwether_proto::v1::join_client::JoinClient;
use bellwether_types::NodeId;
use tonic::{Code, Status};

use crate::config::check_place;
use crate::files::{StagedDir, check_data_dir_free};
use crate::init::absolute;
use crate::{CallFailure, KnownController, MemberConfig, MemberError, MemberRole, Ports};

/// How long one controller may take to answer. Joining commits to the replicated log, and an
/// election may be under way, so this is several election times.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// What a newcomer says about itself.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// The text from `bell cluster join-token`.
    pub token: String,
    /// Empty or not there yet.
    pub data_dir: PathBuf,
    pub name: String,
    pub role: MemberRole,
    /// Where the others reach this host.
    pub address: IpAddr,
    pub ports: Ports,
}

/// Becomes a member: everything is written at once or nothing is.
pub async fn join(options: JoinOptions) -> Result<MemberConfig, MemberError> {
    let data_dir = absolute(&options.data_dir)?;
    check_data_dir_free(&data_dir)?;
    check_place(&options.name, options.address, &options.ports)?;
    let token = read_token(&options)?;
    // Made before the token is spent: a directory that cannot be written must not cost one.
    let staged = StagedDir::new(&data_dir)?;
    let key = KeyAndCsr::generate(&options.name).map_err(MemberError::pki("make a key"))?;
    let (endpoint, reply) = ask_in_turn(&token, &key, &options).await?;
    let config = accept(staged.path(), &token, &key, &options, reply)
        .map_err(|reason| MemberError::BadReply { endpoint, reason })?;
    config.save(staged.path())?;
    staged.publish()?;
    Ok(config)
}

fn read_token(options: &JoinOptions) -> Result<JoinToken, MemberError> {
    let bad = |reason| MemberError::BadToken { reason };
    let token: JoinToken = options.token.parse().map_err(|error| bad(format!("{error}")))?;
    if token.role != Role::from(options.role) {
        let (theirs, ours) = (token.role, options.role);
        return Err(bad(format!(
            "it was made for the role {theirs}, and this host joins as {ours}"
        )));
    }
    Ok(token)
}

/// What became of one attempt that did not succeed.
enum Attempt {
    /// Nothing was carried out; another controller may do it.
    Elsewhere(String),
    /// Whoever answers there is not of our cluster.
    Stranger(String),
    /// It may have been carried out.
    Unknown(String),
    /// The cluster has decided against it.
    Declined(Status),
}

async fn ask_in_turn(
    token: &JoinToken,
    key: &KeyAndCsr,
    options: &JoinOptions,
) -> Result<(SocketAddr, v1::JoinReply), MemberError> {
    let tls = join_client_config(token.ca_pin, key).map_err(MemberError::pki("set up TLS"))?;
    let (mut failed, mut stranger, mut unknown) = (Vec::new(), None, None);
    for &endpoint in &token.endpoints {
        let channel = connect_channel(endpoint, Arc::clone(&tls), ServerIdentity::AnyController);
        match ask(JoinClient::new(channel), request(token, key, options)).await {
            Ok(reply) => return Ok((endpoint, reply)),
            Err(Attempt::Elsewhere(reason)) => failed.push((endpoint, reason)),
            Err(Attempt::Stranger(detail)) => {
                stranger = stranger.or(Some(MemberError::WrongCluster { endpoint, detail }));
            }
            Err(Attempt::Unknown(reason)) => {
                unknown = unknown.or(Some(MemberError::OutcomeUnknown { endpoint, reason }));
            }
            Err(Attempt::Declined(status)) => {
                let (code, message) = (status.code(), status.message().to_owned());
                return Err(unknown.unwrap_or(MemberError::Declined { endpoint, code, message }));
            }
        }
    }
    Err(unknown.or(stranger).unwrap_or(MemberError::Unreachable { attempts: failed }))
}

fn request(token: &JoinToken, key: &KeyAndCsr, options: &JoinOptions) -> v1::JoinRequest {
    v1::JoinRequest {
        secret: token.secret.to_wire().to_string(),
        certificate_request: key.csr_pem().to_owned(),
        name: options.name.clone(),
        role: options.role.as_str().to_owned(),
        address: options.address.to_string(),
        ports: Some(options.ports.into()),
    }
}

async fn ask(
    mut client: JoinClient<tonic::transport::Channel>,
    request: v1::JoinRequest,
) -> Result<v1::JoinReply, Attempt> {
    match tokio::time::timeout(ANSWER_TIMEOUT, client.join(request)).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(classify(status)),
        Err(_) => Err(Attempt::Unknown(format!("none within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
}

fn classify(status: Status) -> Attempt {
    match CallFailure::of(&status) {
        CallFailure::NotConnected(reason) | CallFailure::NotStarted(reason) => {
            Attempt::Elsewhere(reason)
        }
        CallFailure::ServerRefused(reason) | CallFailure::ClientRefused(reason) => {
            Attempt::Stranger(reason)
        }
        CallFailure::Lost(reason) => Attempt::Unknown(reason),
        CallFailure::Answered => match status.code() {
            Code::Unavailable => Attempt::Elsewhere(status.message().to_owned()),
            Code::DeadlineExceeded | Code::Unknown | Code::Cancelled => {
                Attempt::Unknown(status.message().to_owned())
            }
            _ => Attempt::Declined(status),
        },
    }
}

/// Checks the reply against the token and our own key, and writes the identity.
fn accept(
    dir: &Path,
    token: &JoinToken,
    key: &KeyAndCsr,
    options: &JoinOptions,
    reply: v1::JoinReply,
) -> Result<MemberConfig, String> {
    let ca_key = match (options.role, reply.ca_key.is_empty()) {
        (MemberRole::Controller, false) => Some(reply.ca_key.as_str()),
        (MemberRole::Agent, true) => None,
        (MemberRole::Controller, true) => return Err("it lacks the CA's key".into()),
        // Writing it down would make every host able to issue certificates.
        (MemberRole::Agent, false) => {
            return Err("it carries the CA's key, which is not for agents".into());
        }
    };
    let files =
        IdentityFiles::from_pem(&reply.ca_certificate, &reply.certificate, &key.key_pem(), ca_key)
            .map_err(|error| error.to_string())?;
    files.require_pin(token.ca_pin).map_err(|error| error.to_string())?;
    let config = config_of(options, &reply)?;
    let given = files.identity();
    let expected = (Role::from(options.role), config.id.0, config.cluster_id);
    if (given.role, given.id, given.cluster) != expected || given.name != options.name {
        return Err(format!("its certificate is of {given} with number {}", given.id));
    }
    files.save(dir).map_err(|error| error.to_string())?;
    Ok(config)
}

fn config_of(options: &JoinOptions, reply: &v1::JoinReply) -> Result<MemberConfig, String> {
    let known = reply.controllers.iter().cloned().map(KnownController::try_from);
    let config = MemberConfig {
        cluster_id: reply
            .cluster_id
            .parse()
            .map_err(|_| format!("`{}` is not a cluster's id", reply.cluster_id))?,
        cluster_name: reply.cluster_name.clone(),
        id: NodeId(reply.id),
        name: options.name.clone(),
        role: options.role,
        address: options.address,
        storage: PathBuf::from(&reply.storage),
        bootstrap: false,
        ports: options.ports,
        controllers: known.collect::<Result<_, _>>().map_err(|error| error.to_string())?,
    };
    match config.problem() {
        Some(reason) => Err(reason),
        None => Ok(config),
    }
}
