//! TLS configurations of the ports and of their clients. TLS 1.3 only, ALPN `h2` only.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use bellwether_types::ClusterId;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::CertificateDer;

use crate::ca::CaPin;
use crate::csr::KeyAndCsr;
use crate::files::IdentityFiles;
use crate::identity::Role;
use crate::verify::{AnyKeyVerifier, PinVerifier, RoleVerifier};

/// The Raft port serves the other controllers.
pub const RAFT_PORT_ROLES: &[Role] = &[Role::Controller];
/// The agent's port takes commands of controllers.
pub const AGENT_PORT_ROLES: &[Role] = &[Role::Controller];
/// The API port serves all; [`crate::RequireRole`] divides its services.
pub const API_PORT_ROLES: &[Role] = &[Role::Admin, Role::Agent, Role::Controller];

/// Why a TLS configuration cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("an administrator's certificate cannot serve: use a controller's or an agent's")]
    AdminServes,
    #[error("the join port is served by controllers; the certificate says {0}")]
    JoinRole(Role),
    #[error("build the TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("build the verifier of client certificates: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Makes ring the process's provider. Call it first in every `main`; more calls do no harm.
pub fn install_crypto_provider() {
    // An error says that a provider is installed already, which is what is wanted.
    let _ = ring::default_provider().install_default();
}

/// A server's configuration, and whether the identities that its clients claim are proven.
///
/// The two belong together: on the join port anybody may write any identity into a self-signed
/// certificate, and a connection there must never show one.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    proven: Option<ClusterId>,
}

impl ServerTls {
    /// The configuration for rustls.
    pub fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// The cluster whose CA vouches for the clients; none on the join port.
    pub fn proven_cluster(&self) -> Option<ClusterId> {
        self.proven
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("proven", &self.proven).finish_non_exhaustive()
    }
}

/// A value that can be replaced while it is in use, so that a renewed certificate needs no restart.
/// New connections take the new value; those that stand keep what they were made with.
pub struct Reloadable<T> {
    current: Arc<RwLock<T>>,
}

impl<T: Clone> Reloadable<T> {
    pub fn new(value: T) -> Self {
        Self { current: Arc::new(RwLock::new(value)) }
    }

    /// What new connections use.
    pub fn current(&self) -> T {
        // Nothing can panic while the lock is held, so that a poisoned one still holds good data.
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the value for all clones of this.
    pub fn replace(&self, value: T) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = value;
    }
}

impl<T> Clone for Reloadable<T> {
    fn clone(&self) -> Self {
        Self { current: Arc::clone(&self.current) }
    }
}

impl<T: Clone> From<T> for Reloadable<T> {
    fn from(value: T) -> Self {
        Self::new(value)
    }
}

/// The configuration of a port that serves members of the cluster with one of these roles.
pub fn server_config(files: &IdentityFiles, allowed: &[Role]) -> Result<ServerTls, TlsError> {
    if files.role() == Role::Admin {
        return Err(TlsError::AdminServes);
    }
    let roots = Arc::new(roots_of(files)?);
    let chain = WebPkiClientVerifier::builder_with_provider(roots, provider()).build()?;
    let verifier = RoleVerifier { chain, cluster: files.cluster(), allowed: allowed.into() };
    let config = build_server(files, vec![files.certificate().clone()], Arc::new(verifier))?;
    Ok(ServerTls { config: Arc::new(config), proven: Some(files.cluster()) })
}

/// The configuration of the join port: any client certificate, and the own chain with the CA in it,
/// by which the newcomer checks the pin.
pub fn join_server_config(files: &IdentityFiles) -> Result<ServerTls, TlsError> {
    if files.role() != Role::Controller {
        return Err(TlsError::JoinRole(files.role()));
    }
    let chain = vec![files.certificate().clone(), files.ca_certificate().clone()];
    let config = build_server(files, chain, Arc::new(AnyKeyVerifier { provider: provider() }))?;
    Ok(ServerTls { config: Arc::new(config), proven: None })
}

/// The configuration of a member that connects to another member.
pub fn client_config(files: &IdentityFiles) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots_of(files)?);
    let config =
        builder.with_client_auth_cert(vec![files.certificate().clone()], files.key_der())?;
    Ok(Arc::new(harden_client(config)))
}

/// The configuration of a newcomer that knows nothing but the pin of its token.
pub fn join_client_config(pin: CaPin, key: &KeyAndCsr) -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = PinVerifier { provider: provider(), pin };
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(vec![key.self_signed()], key.key_der())?;
    Ok(Arc::new(harden_client(config)))
}

fn build_server(
    files: &IdentityFiles,
    chain: Vec<CertificateDer<'static>>,
    verifier: Arc<dyn ClientCertVerifier>,
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, files.key_der())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session skips the verifier: an expired certificate would live on in its tickets.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

fn harden_client(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    config
}

fn roots_of(files: &IdentityFiles) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(files.ca_certificate().clone())?;
    Ok(roots)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}
