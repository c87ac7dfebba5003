//! The cluster's certificate authority.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bellwether_types::ClusterId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
    SubjectPublicKeyInfo,
};
use ring::digest::{SHA256, digest};
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use crate::csr::{CsrError, VerifiedCsr, parse_key};
use crate::disk::{self, CA_CERT, CA_KEY};
use crate::files::FilesError;
use crate::identity::{
    Identity, IdentityError, PeerError, Role, ca_identity, ca_uri, check_name, parse, spki_of,
};

/// Ten years: a cluster outlives its first administrators, and there is no CA rotation yet.
const CA_DAYS: u64 = 3650;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Why a CA cannot be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("{operation}: {source}")]
    Make { operation: &'static str, source: rcgen::Error },
    #[error("this is not the certificate of a Bellwether CA: {0}")]
    NotCa(#[source] PeerError),
    #[error("the CA certificate is not signed by its own key")]
    NotSelfSigned,
    #[error("the CA's key does not belong to its certificate")]
    KeyMismatch,
    #[error("the CA's key: {0}")]
    Key(#[source] CsrError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the CA of cluster {ours} cannot issue for cluster {theirs}")]
    OtherCluster { ours: ClusterId, theirs: ClusterId },
    #[error("the time is out of the range of certificates")]
    Time,
    #[error("the system gave no random bytes")]
    Random,
}

/// From when until when a certificate is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Validity {
    /// Good for so many days from `now`, and for one day before it: a host whose clock is slow by
    /// hours must still be able to join and to find its time server.
    pub fn days(now: SystemTime, days: u64) -> Self {
        let length = DAY.saturating_mul(u32::try_from(days).unwrap_or(u32::MAX));
        Self {
            not_before: now.checked_sub(DAY).unwrap_or(UNIX_EPOCH),
            not_after: now.checked_add(length).unwrap_or(now),
        }
    }
}

/// SHA-256 of the SubjectPublicKeyInfo of a CA: what a join token pins.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CaPin([u8; 32]);

/// Why a text is not a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a CA pin has 64 hexadecimal digits")]
pub struct PinParseError;

impl CaPin {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The pin of a CA's certificate. Only the key counts, so that a renewed CA keeps its pin.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, PeerError> {
        Ok(Self(sha256(&spki_of(certificate)?)))
    }
}

impl fmt::Display for CaPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for CaPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for CaPin {
    type Err = PinParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_hex(text).map(Self).ok_or(PinParseError)
    }
}

/// A certificate that the CA has just signed.
#[derive(Clone, Debug)]
pub struct IssuedCertificate {
    der: CertificateDer<'static>,
    pem: String,
}

impl IssuedCertificate {
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    pub fn pem(&self) -> &str {
        &self.pem
    }
}

/// The certificate authority of one cluster, with its private key.
pub struct Ca {
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
    cluster: ClusterId,
    name: String,
    pin: CaPin,
    not_after: SystemTime,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Ca");
        out.field("cluster", &self.cluster).field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl Ca {
    /// Makes the CA of a new cluster, good for ten years from now.
    pub fn create(cluster: ClusterId, name: &str) -> Result<Self, CaError> {
        Self::create_at(cluster, name, SystemTime::now())
    }

    /// Like [`Ca::create`], at another time.
    pub fn create_at(cluster: ClusterId, name: &str, now: SystemTime) -> Result<Self, CaError> {
        check_name(name)?;
        let key =
            KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make("make the CA's key"))?;
        let mut params = named_params(name)?;
        // Two clusters of one name must have two subjects, or a certificate of the other one would
        // be refused for its signature rather than for its issuer.
        params.distinguished_name.push(DnType::OrganizationalUnitName, cluster.to_string());
        set_validity(&mut params, Validity::days(now, CA_DAYS))?;
        params.subject_alt_names = vec![SanType::URI(ia5(ca_uri(cluster, name))?)];
        // Path length 0: what the CA signs can never sign further certificates.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(make("sign the CA's certificate"))?;
        Self::from_pem(&certificate.pem(), &key.serialize_pem())
    }

    /// Takes a CA from its two PEM texts, as the join reply carries them to a controller.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, CaError> {
        let certificate = disk::one_certificate(certificate_pem).map_err(CaError::NotCa)?;
        let (cluster, name) = check_ca(&certificate)?;
        let key = parse_key(key_pem).map_err(CaError::Key)?;
        if spki_of(&certificate).map_err(CaError::NotCa)?
            != rcgen::PublicKeyData::subject_public_key_info(&key)
        {
            return Err(CaError::KeyMismatch);
        }
        let pin = CaPin::of(&certificate).map_err(CaError::NotCa)?;
        let not_after = not_after(&certificate).map_err(CaError::NotCa)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(make("read the CA's certificate"))?;
        let certificate_pem = disk::certificate_to_pem(&certificate);
        Ok(Self { certificate, certificate_pem, issuer, cluster, name, pin, not_after })
    }

    /// Reads `ca.pem` and `ca-key.pem` of a directory.
    pub fn load(dir: &Path) -> Result<Self, FilesError> {
        let certificate = disk::read_text(dir, CA_CERT)?;
        let key = disk::read_secret(dir, CA_KEY)?;
        Self::from_pem(&certificate, &key)
            .map_err(|source| FilesError::Ca { path: dir.join(CA_KEY), source })
    }

    /// Writes `ca-key.pem` (0600) and then `ca.pem`, each whole or not at all.
    ///
    /// A directory that holds another CA is left alone: overwriting its key would end that cluster.
    pub fn save(&self, dir: &Path) -> Result<(), FilesError> {
        disk::ensure_dir(dir)?;
        disk::refuse_other(dir, CA_CERT, self.certificate_pem())?;
        disk::write_secret(dir, CA_KEY, &self.key_pem())?;
        disk::write_public(dir, CA_CERT, self.certificate_pem())
    }

    /// Signs a certificate that says `identity` for the key of a request.
    pub fn issue(
        &self,
        identity: &Identity,
        request: &VerifiedCsr,
        validity: Validity,
    ) -> Result<IssuedCertificate, CaError> {
        identity.validate()?;
        if identity.cluster != self.cluster {
            return Err(CaError::OtherCluster { ours: self.cluster, theirs: identity.cluster });
        }
        let params = self.leaf_params(identity, validity)?;
        let key = SubjectPublicKeyInfo::from_der(request.spki()).map_err(make("read the key"))?;
        let signed = params.signed_by(&key, &self.issuer).map_err(make("sign a certificate"))?;
        Ok(IssuedCertificate { der: signed.der().clone(), pem: signed.pem() })
    }

    /// Signs a new certificate for the identity and the key of one that this CA issued before.
    pub fn renew(
        &self,
        certificate_pem: &str,
        validity: Validity,
    ) -> Result<IssuedCertificate, CaError> {
        let old = disk::one_certificate(certificate_pem).map_err(CaError::NotCa)?;
        verify_issued(&old, &self.certificate).map_err(CaError::NotCa)?;
        let identity = crate::identity::peer_identity(std::slice::from_ref(&old), self.cluster)
            .map_err(CaError::NotCa)?;
        let key = VerifiedCsr::of_certificate(&old).map_err(CaError::NotCa)?;
        self.issue(&identity, &key, validity)
    }

    fn leaf_params(
        &self,
        identity: &Identity,
        validity: Validity,
    ) -> Result<CertificateParams, CaError> {
        let mut params = named_params(&identity.name)?;
        // A certificate that outlives its CA would fail without its own date saying why.
        let not_after = validity.not_after.min(self.not_after);
        set_validity(&mut params, Validity { not_after, ..validity })?;
        params.subject_alt_names.push(SanType::URI(ia5(identity.uri())?));
        for name in identity.dns_names() {
            params.subject_alt_names.push(SanType::DnsName(ia5(name)?));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if identity.role != Role::Admin {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        Ok(params)
    }

    /// The cluster that this CA belongs to.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The name of the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What join tokens pin.
    pub fn pin(&self) -> CaPin {
        self.pin
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The private key. It goes to controllers that join, over TLS, and to `ca-key.pem`.
    pub fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.issuer.key().serialize_pem())
    }
}

/// Checks that a certificate is a Bellwether CA's, and reads the cluster's identity and name.
pub(crate) fn check_ca(certificate: &CertificateDer<'_>) -> Result<(ClusterId, String), CaError> {
    let parsed = parse(certificate).map_err(CaError::NotCa)?;
    if !parsed.is_ca() {
        return Err(CaError::NotCa(PeerError::Malformed));
    }
    parsed.verify_signature(None).map_err(|_| CaError::NotSelfSigned)?;
    ca_identity(certificate).map_err(CaError::NotCa)
}

/// Checks that the key of `ca` signed `certificate`.
pub(crate) fn verify_issued(
    certificate: &CertificateDer<'_>,
    ca: &CertificateDer<'_>,
) -> Result<(), PeerError> {
    let ca = parse(ca)?;
    let signed = parse(certificate)?.verify_signature(Some(ca.public_key()));
    signed.map_err(|_| PeerError::OtherCa)
}

/// When a certificate ends.
pub(crate) fn not_after(certificate: &CertificateDer<'_>) -> Result<SystemTime, PeerError> {
    Ok(system_time(parse(certificate)?.validity().not_after.timestamp()))
}

/// When a certificate begins.
pub(crate) fn not_before(certificate: &CertificateDer<'_>) -> Result<SystemTime, PeerError> {
    Ok(system_time(parse(certificate)?.validity().not_before.timestamp()))
}

fn system_time(seconds: i64) -> SystemTime {
    let since = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
}

fn named_params(common_name: &str) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Bellwether");
    params.distinguished_name.push(DnType::CommonName, common_name);
    // By default rcgen derives the number from the key, and a renewed certificate would repeat it.
    let mut serial = [0u8; 16];
    crate::token::fill_random(&mut serial).map_err(|_| CaError::Random)?;
    serial[0] = (serial[0] & 0x7f) | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn set_validity(params: &mut CertificateParams, validity: Validity) -> Result<(), CaError> {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_err(|_| CaError::Time);
    // Whole seconds below the year 9999 keep the addition in range.
    let clip = |d: Duration| Duration::from_secs(d.as_secs().min(253_000_000_000));
    params.not_before = epoch + clip(since(validity.not_before)?);
    params.not_after = epoch + clip(since(validity.not_after)?);
    Ok(())
}

fn ia5(text: String) -> Result<rcgen::string::Ia5String, CaError> {
    text.try_into().map_err(make("write a name into a certificate"))
}

fn make(operation: &'static str) -> impl FnOnce(rcgen::Error) -> CaError {
    move |source| CaError::Make { operation, source }
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

pub(crate) fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

pub(crate) fn parse_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}
