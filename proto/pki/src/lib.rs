//! Certificates, roles and TLS configuration of a cluster.
//!
//! A cluster has one certificate authority ([`Ca`]). Each certificate says in its URI SAN who its
//! holder is ([`Identity`]): the cluster, the role, the number and the name. Nothing listens
//! without mutual TLS, and each port knows the roles it serves:
//!
//! ```text
//! port    client certificates           refused where
//! raft    controller                    in the handshake (RAFT_PORT_ROLES)
//! agent   controller                    in the handshake (AGENT_PORT_ROLES)
//! api     admin, agent, controller      in the handshake; per service by RequireRole
//! join    any self-signed certificate   nothing but possession of its key is proven
//! ```
//!
//! Certificates are not revoked here: a member that was removed still has a valid certificate
//! until it expires, so a handler compares [`Identity::id`] with the replicated membership.
#![forbid(unsafe_code)]

mod ca;
mod channel;
mod csr;
mod disk;
mod files;
mod identity;
mod require_role;
mod serve;
mod tls;
mod token;
mod verify;

pub use ca::{Ca, CaError, CaPin, IssuedCertificate, PinParseError, Validity};
pub use channel::{ChannelTimes, connect_channel, connect_channel_with, refusal_by_peer};
pub use csr::{CsrError, KeyAndCsr, VerifiedCsr};
pub use files::{FilesError, IdentityFiles};
pub use identity::{Identity, IdentityError, PeerError, Role, ServerIdentity, peer_identity};
pub use require_role::{RequireRole, RequireRoleService, caller};
pub use serve::{ConnectInfo, ServeLimits, TlsConnection, TlsIncoming, serve_tls};
pub use tls::{
    AGENT_PORT_ROLES, API_PORT_ROLES, RAFT_PORT_ROLES, Reloadable, ServerTls, TlsError,
    client_config, install_crypto_provider, join_client_config, join_server_config, server_config,
};
pub use token::{JoinSecret, JoinToken, SecretHash, TokenError};
