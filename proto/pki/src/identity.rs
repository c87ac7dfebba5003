//! Who the holder of a certificate is, and how the certificate says so.
//!
//! The URI SAN is `bellwether://<cluster-uuid>/<role>/<id>/<name>`. Exactly one such URI must be
//! there: with two, the reader's choice would decide who the peer is.

use std::fmt;
use std::str::FromStr;

use bellwether_types::{ClusterId, MemberRole};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The scheme of the identity's URI.
const SCHEME: &str = "bellwether://";
/// A name is also a DNS label and a common name.
const NAME_LEN_MAX: usize = 63;
/// The name in the certificates of all controllers.
const ANY_CONTROLLER: &str = "controller.bellwether.internal";

/// What a certificate's holder may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A member of the Raft group.
    Controller,
    /// Runs VMs on one host.
    Agent,
    /// A person or a tool that administers the cluster.
    Admin,
}

impl Role {
    /// The role as certificates, tokens and the wire write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Agent => "agent",
            Self::Admin => "admin",
        }
    }
}

impl From<MemberRole> for Role {
    fn from(role: MemberRole) -> Self {
        match role {
            MemberRole::Controller => Self::Controller,
            MemberRole::Agent => Self::Agent,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "controller" => Ok(Self::Controller),
            "agent" => Ok(Self::Agent),
            "admin" => Ok(Self::Admin),
            other => Err(IdentityError::Role(shorten(other))),
        }
    }
}

/// Who the holder of a certificate is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The cluster whose CA issued the certificate.
    pub cluster: ClusterId,
    /// What the holder may do.
    pub role: Role,
    /// The number of the node; 0 for administrators, who are no nodes.
    pub id: u64,
    /// The name of the host or the administrator.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.role, self.name)
    }
}

/// Why a text is not an identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("`{0}` is not a role; give controller, agent or admin")]
    Role(String),
    #[error(
        "`{0}` is not a name: give 1 to 63 letters, digits and hyphens, starting with a letter or digit"
    )]
    Name(String),
    #[error("`{0}` is not `bellwether://<cluster>/<role>/<id>/<name>`")]
    Uri(String),
    #[error("a {role} has the number {id}; administrators have 0, and nodes have 1 or more")]
    Number { role: Role, id: u64 },
}

impl Identity {
    /// Checks that the parts fit each other and can be written into a certificate.
    pub fn validate(&self) -> Result<(), IdentityError> {
        check_name(&self.name)?;
        if (self.role == Role::Admin) != (self.id == 0) {
            return Err(IdentityError::Number { role: self.role, id: self.id });
        }
        Ok(())
    }

    /// The URI that the certificate carries.
    pub fn uri(&self) -> String {
        format!("{SCHEME}{}/{}/{}/{}", self.cluster, self.role, self.id, self.name)
    }

    /// Reads the URI of a certificate; only the one spelling that [`Identity::uri`] writes is taken.
    pub fn from_uri(uri: &str) -> Result<Self, IdentityError> {
        let bad = || IdentityError::Uri(shorten(uri));
        let rest = uri.strip_prefix(SCHEME).ok_or_else(bad)?;
        let parts: Vec<&str> = rest.splitn(5, '/').collect();
        let [cluster, role, id, name] = parts[..] else {
            return Err(bad());
        };
        let identity = Self {
            cluster: cluster.parse().map_err(|_| bad())?,
            role: role.parse()?,
            id: id.parse().map_err(|_| bad())?,
            name: name.to_owned(),
        };
        identity.validate()?;
        // Another spelling of the same thing (+1, an upper-case UUID) was not written by our CA.
        if identity.uri() != uri {
            return Err(bad());
        }
        Ok(identity)
    }

    /// The DNS names by which clients may verify this holder as a server.
    pub(crate) fn dns_names(&self) -> Vec<String> {
        match self.role {
            Role::Controller => {
                vec![ANY_CONTROLLER.to_owned(), ServerIdentity::Controller(self.id).dns_name()]
            }
            Role::Agent => vec![ServerIdentity::Agent(self.id).dns_name()],
            Role::Admin => vec![],
        }
    }
}

/// Whom a client means to talk to. The address is not part of it: hosts may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ServerIdentity {
    /// Any controller of the cluster.
    AnyController,
    /// The controller with this number.
    Controller(u64),
    /// The agent of the node with this number.
    Agent(u64),
}

impl ServerIdentity {
    /// The name that the server's certificate must carry.
    pub fn dns_name(self) -> String {
        match self {
            Self::AnyController => ANY_CONTROLLER.to_owned(),
            Self::Controller(id) => format!("controller-{id}.bellwether.internal"),
            Self::Agent(id) => format!("agent-{id}.bellwether.internal"),
        }
    }
}

/// Why a peer's certificate does not say who the peer is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("the peer showed no certificate")]
    NoCertificate,
    #[error("the peer's certificate cannot be parsed")]
    Malformed,
    #[error("the peer's certificate carries {0} URIs; one `bellwether://` URI is wanted")]
    UriCount(usize),
    #[error("the peer's certificate names no member: {0}")]
    Identity(#[from] IdentityError),
    #[error("the peer belongs to cluster {theirs}; this is cluster {ours}")]
    OtherCluster { theirs: ClusterId, ours: ClusterId },
    #[error("the certificate was issued by another CA")]
    OtherCa,
    #[error("the key of the request is not the key of the connection's certificate")]
    OtherKey,
}

/// Reads who the peer is from a chain that TLS has verified already, and checks the cluster.
///
/// The chain's signatures are not checked here: never give it an unverified chain.
pub fn peer_identity(
    chain: &[CertificateDer<'_>],
    cluster: ClusterId,
) -> Result<Identity, PeerError> {
    let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
    let identity = Identity::from_uri(&only_uri(leaf)?)?;
    if identity.cluster != cluster {
        return Err(PeerError::OtherCluster { theirs: identity.cluster, ours: cluster });
    }
    Ok(identity)
}

/// The URI that marks the CA of a cluster.
pub(crate) fn ca_uri(cluster: ClusterId, name: &str) -> String {
    format!("{SCHEME}{cluster}/ca/{name}")
}

/// Reads the cluster and its name from a CA's certificate.
pub(crate) fn ca_identity(
    certificate: &CertificateDer<'_>,
) -> Result<(ClusterId, String), PeerError> {
    let uri = only_uri(certificate)?;
    let bad = || PeerError::Identity(IdentityError::Uri(shorten(&uri)));
    let rest = uri.strip_prefix(SCHEME).ok_or_else(bad)?;
    let (cluster, name) = rest.split_once("/ca/").ok_or_else(bad)?;
    check_name(name)?;
    Ok((cluster.parse().map_err(|_| bad())?, name.to_owned()))
}

/// The certificate's SubjectPublicKeyInfo, in DER.
pub(crate) fn spki_of(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, PeerError> {
    Ok(parse(certificate)?.public_key().raw.to_vec())
}

/// Parses a certificate and refuses anything that follows it.
pub(crate) fn parse<'a>(
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, PeerError> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        _ => Err(PeerError::Malformed),
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), IdentityError> {
    let fits = name.len() <= NAME_LEN_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if fits { Ok(()) } else { Err(IdentityError::Name(shorten(name))) }
}

fn only_uri(certificate: &CertificateDer<'_>) -> Result<String, PeerError> {
    let parsed = parse(certificate)?;
    let Some(names) = parsed.subject_alternative_name().map_err(|_| PeerError::Malformed)? else {
        return Err(PeerError::UriCount(0));
    };
    let uris: Vec<&str> = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [uri] => Ok(uri.to_owned()),
        _ => Err(PeerError::UriCount(uris.len())),
    }
}

/// A stranger's text goes into messages and logs: cut, and with nothing that moves a cursor.
fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(80).flat_map(char::escape_default).collect();
    if text.chars().nth(80).is_some() {
        short.push('…');
    }
    short
}
