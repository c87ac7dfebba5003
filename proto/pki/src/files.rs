//! The identity of one process on disk.
//!
//! ```text
//! ca.pem       the cluster's CA
//! ca-key.pem   its key (0600), on controllers only
//! key.pem      the key of this process (0600)
//! cert.pem     the certificate for it, always written last
//! ```
//!
//! As `cert.pem` comes last, a directory without it is one whose set-up was interrupted: it is
//! refused when read and may be written again. A renewal keeps the key and so replaces one file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bellwether_types::ClusterId;
use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use crate::ca::{Ca, CaError, CaPin, check_ca, not_after, not_before, verify_issued};
use crate::csr::{CsrError, key_der, parse_key};
use crate::disk::{self, CA_CERT, CA_KEY, CERT, KEY};
use crate::identity::{Identity, PeerError, Role, parse, peer_identity, spki_of};

/// What is wrong with which file, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("{operation} `{}`: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("`{}` is missing: the identity was never set up or its set-up was interrupted; run the \
             command that makes it (`bell cluster init` or a join with a new token) again", path.display())]
    Missing { path: PathBuf },
    #[error("`{}` may be read by others (mode {mode:04o}): treat the key as leaked if others use \
             this machine; otherwise run `chmod 600 {}`", path.display(), path.display())]
    Permissions { path: PathBuf, mode: u32 },
    #[error("`{}` is too long for a certificate or a key", path.display())]
    TooLong { path: PathBuf },
    #[error("`{}` exists and belongs to another identity: remove the directory if that one is \
             no longer wanted", path.display())]
    AlreadyThere { path: PathBuf },
    #[error("`{}`: {source}; restore it from a backup or join again", path.display())]
    Certificate { path: PathBuf, source: PeerError },
    #[error("`{}`: {source}; restore it from a backup or join again", path.display())]
    Key { path: PathBuf, source: CsrError },
    #[error("`{}`: {source}; restore `ca.pem` and `ca-key.pem` from one controller", path.display())]
    Ca { path: PathBuf, source: CaError },
    #[error("`{}` does not belong to `{}`: restore both from one backup or join again", key.display(), certificate.display())]
    KeyMismatch { key: PathBuf, certificate: PathBuf },
    #[error("`{}` was issued by another CA than `{}`: restore both from one backup or join again", certificate.display(), ca.display())]
    OtherCa { certificate: PathBuf, ca: PathBuf },
    #[error("`{}` expired at {not_after}: join again with a new token (`bell cluster join-token`)", path.display())]
    Expired { path: PathBuf, not_after: String },
    #[error("`{}` is only valid from {not_before}: is this machine's clock right?", path.display())]
    NotYetValid { path: PathBuf, not_before: String },
    #[error("`{}` is the key of another CA than `{}`: restore both from one controller", key.display(), ca.display())]
    OtherCaKey { key: PathBuf, ca: PathBuf },
    #[error(
        "the CA's certificate has the pin {actual}; the join token says {expected}: the token is of another cluster"
    )]
    Pin { expected: CaPin, actual: CaPin },
    #[error("`{}` holds the certificate of {there}; the new one is of {new}", path.display())]
    OtherIdentity { path: PathBuf, there: String, new: String },
}

impl FilesError {
    pub(crate) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { operation, path: path.to_owned(), source }
    }
}

/// A checked identity: the CA's certificate, the own certificate and its key, and on controllers
/// the CA itself.
pub struct IdentityFiles {
    ca_certificate: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: KeyPair,
    identity: Identity,
    cluster_name: String,
    pin: CaPin,
    ca: Option<Ca>,
}

impl fmt::Debug for IdentityFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("IdentityFiles");
        out.field("identity", &self.identity).field("pin", &self.pin).finish_non_exhaustive()
    }
}

/// The texts of the files, before any of them is believed.
struct Texts<'a> {
    ca: &'a str,
    certificate: &'a str,
    key: &'a str,
    ca_key: Option<&'a str>,
}

impl IdentityFiles {
    /// Reads and checks the identity in a directory.
    pub fn load(dir: &Path) -> Result<Self, FilesError> {
        Self::load_at(dir, SystemTime::now())
    }

    /// Like [`IdentityFiles::load`], at another time.
    pub fn load_at(dir: &Path, now: SystemTime) -> Result<Self, FilesError> {
        // First the file that is written last, so that an interrupted set-up is called by its name.
        let certificate = disk::read_text(dir, CERT)?;
        let ca = disk::read_text(dir, CA_CERT)?;
        let key = disk::read_secret(dir, KEY)?;
        let ca_key = match disk::exists(dir, CA_KEY) {
            true => Some(disk::read_secret(dir, CA_KEY)?),
            false => None,
        };
        let ca_key = ca_key.as_ref().map(|text| text.as_str());
        Self::check(dir, Texts { ca: &ca, certificate: &certificate, key: &key, ca_key }, now)
    }

    /// Takes the texts of a join reply (or of a fresh CA), with the same checks as for files.
    /// Errors name the files that the texts would become.
    pub fn from_pem(
        ca_pem: &str,
        certificate_pem: &str,
        key_pem: &str,
        ca_key_pem: Option<&str>,
    ) -> Result<Self, FilesError> {
        let texts =
            Texts { ca: ca_pem, certificate: certificate_pem, key: key_pem, ca_key: ca_key_pem };
        Self::check(Path::new(""), texts, SystemTime::now())
    }

    fn check(dir: &Path, texts: Texts<'_>, now: SystemTime) -> Result<Self, FilesError> {
        let path = |name: &str| dir.join(name);
        let ca_certificate = disk::one_certificate(texts.ca)
            .map_err(|source| FilesError::Certificate { path: path(CA_CERT), source })?;
        let (cluster, cluster_name) = check_ca(&ca_certificate)
            .map_err(|source| FilesError::Ca { path: path(CA_CERT), source })?;
        let (certificate, identity) =
            check_certificate(dir, texts.certificate, &ca_certificate, cluster)?;
        check_times(&path(CERT), &certificate, now)?;
        check_times(&path(CA_CERT), &ca_certificate, now)?;
        let key = check_key(dir, texts.key, &certificate)?;
        let ca = texts.ca_key.map(|text| check_ca_key(dir, texts.ca, text)).transpose()?;
        let pin = CaPin::of(&ca_certificate)
            .map_err(|source| FilesError::Certificate { path: path(CA_CERT), source })?;
        Ok(Self { ca_certificate, certificate, key, identity, cluster_name, pin, ca })
    }

    /// Writes the identity into a directory that holds none. `cert.pem` comes last.
    pub fn save(&self, dir: &Path) -> Result<(), FilesError> {
        disk::ensure_dir(dir)?;
        disk::refuse_other(dir, CERT, &self.certificate_pem())?;
        disk::refuse_other(dir, CA_CERT, &self.ca_pem())?;
        match &self.ca {
            Some(ca) => ca.save(dir)?,
            None => disk::write_public(dir, CA_CERT, &self.ca_pem())?,
        }
        disk::write_secret(dir, KEY, &self.key_pem())?;
        disk::write_public(dir, CERT, &self.certificate_pem())
    }

    /// Replaces `cert.pem` by a newer certificate for the same key and the same identity.
    pub fn renew(dir: &Path, certificate_pem: &str) -> Result<Self, FilesError> {
        let ca = disk::read_text(dir, CA_CERT)?;
        let key = disk::read_secret(dir, KEY)?;
        let new = Self::from_pem(&ca, certificate_pem, &key, None)?;
        let there = disk::read_text(dir, CERT)?;
        let there = disk::one_certificate(&there)
            .and_then(|old| peer_identity(&[old], new.cluster()))
            .map_err(|source| FilesError::Certificate { path: dir.join(CERT), source })?;
        if there != new.identity {
            return Err(FilesError::OtherIdentity {
                path: dir.join(CERT),
                there: there.to_string(),
                new: new.identity.to_string(),
            });
        }
        disk::write_public(dir, CERT, &new.certificate_pem())?;
        Self::load(dir)
    }

    /// Whether a directory holds a finished identity (which may still be expired or damaged).
    pub fn exist(dir: &Path) -> bool {
        disk::exists(dir, CERT)
    }

    /// Refuses an identity of another CA than the one that the join token pins.
    pub fn require_pin(&self, expected: CaPin) -> Result<(), FilesError> {
        if self.pin == expected {
            return Ok(());
        }
        Err(FilesError::Pin { expected, actual: self.pin })
    }

    /// Who this process is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The role of this process.
    pub fn role(&self) -> Role {
        self.identity.role
    }

    /// The cluster of this process.
    pub fn cluster(&self) -> ClusterId {
        self.identity.cluster
    }

    /// The name of the cluster.
    pub fn cluster_name(&self) -> &str {
        &self.cluster_name
    }

    /// The pin of the CA, for join tokens.
    pub fn ca_pin(&self) -> CaPin {
        self.pin
    }

    /// The CA, where this process may issue certificates.
    pub fn ca(&self) -> Option<&Ca> {
        self.ca.as_ref()
    }

    /// When the certificate ends.
    pub fn expires_at(&self) -> Result<SystemTime, PeerError> {
        not_after(&self.certificate)
    }

    pub fn ca_pem(&self) -> String {
        disk::certificate_to_pem(&self.ca_certificate)
    }

    pub fn certificate_pem(&self) -> String {
        disk::certificate_to_pem(&self.certificate)
    }

    /// The private key, for the file and nothing else.
    pub(crate) fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.key.serialize_pem())
    }

    pub(crate) fn key_der(&self) -> PrivateKeyDer<'static> {
        key_der(&self.key)
    }

    pub fn ca_certificate(&self) -> &CertificateDer<'static> {
        &self.ca_certificate
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }
}

fn check_certificate(
    dir: &Path,
    text: &str,
    ca: &CertificateDer<'_>,
    cluster: ClusterId,
) -> Result<(CertificateDer<'static>, Identity), FilesError> {
    let bad = |source| FilesError::Certificate { path: dir.join(CERT), source };
    let certificate = disk::one_certificate(text).map_err(bad)?;
    verify_issued(&certificate, ca).map_err(|source| match source {
        PeerError::OtherCa => {
            FilesError::OtherCa { certificate: dir.join(CERT), ca: dir.join(CA_CERT) }
        }
        other => bad(other),
    })?;
    let identity = peer_identity(std::slice::from_ref(&certificate), cluster).map_err(bad)?;
    Ok((certificate, identity))
}

fn check_times(
    path: &Path,
    certificate: &CertificateDer<'_>,
    now: SystemTime,
) -> Result<(), FilesError> {
    let bad = |source| FilesError::Certificate { path: path.to_owned(), source };
    let parsed = parse(certificate).map_err(bad)?;
    if now < not_before(certificate).map_err(bad)? {
        let not_before = parsed.validity().not_before.to_string();
        return Err(FilesError::NotYetValid { path: path.to_owned(), not_before });
    }
    if now > not_after(certificate).map_err(bad)? {
        let not_after = parsed.validity().not_after.to_string();
        return Err(FilesError::Expired { path: path.to_owned(), not_after });
    }
    Ok(())
}

fn check_key(
    dir: &Path,
    text: &str,
    certificate: &CertificateDer<'_>,
) -> Result<KeyPair, FilesError> {
    let key = parse_key(text).map_err(|source| FilesError::Key { path: dir.join(KEY), source })?;
    let spki = spki_of(certificate)
        .map_err(|source| FilesError::Certificate { path: dir.join(CERT), source })?;
    if key.subject_public_key_info() != spki {
        return Err(FilesError::KeyMismatch { key: dir.join(KEY), certificate: dir.join(CERT) });
    }
    Ok(key)
}

fn check_ca_key(dir: &Path, ca: &str, key: &str) -> Result<Ca, FilesError> {
    Ca::from_pem(ca, key).map_err(|source| match source {
        CaError::KeyMismatch => {
            FilesError::OtherCaKey { key: dir.join(CA_KEY), ca: dir.join(CA_CERT) }
        }
        source => FilesError::Ca { path: dir.join(CA_KEY), source },
    })
}
