//! Keys of members, and the requests by which the CA learns their public halves.

use std::fmt;

use rcgen::{
    CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData,
    SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use zeroize::Zeroizing;

use crate::identity::{IdentityError, PeerError, check_name, parse, spki_of};
use crate::serve::ConnectInfo;

/// No request that we make is larger than a fraction of this.
const CSR_LEN_MAX: usize = 16 * 1024;

/// Why a request for a certificate cannot be made or is refused.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    #[error("the certificate request is not a PEM `CERTIFICATE REQUEST`")]
    NotPem,
    #[error("the certificate request has {0} bytes; at most {CSR_LEN_MAX} are taken")]
    TooLong(usize),
    #[error("the certificate request cannot be parsed")]
    Malformed,
    #[error("the certificate request is not signed by its own key")]
    Signature,
    #[error("the certificate request's key is not ECDSA P-256")]
    Algorithm,
    #[error(transparent)]
    Name(#[from] IdentityError),
    #[error("make a key: {0}")]
    Make(#[source] rcgen::Error),
    #[error("the key is not a PEM PKCS#8 ECDSA P-256 key: {0}")]
    Key(#[source] rcgen::Error),
}

/// A new private key with the request for its certificate and a self-signed certificate.
///
/// The self-signed certificate speaks on the join port, before the cluster has given one.
pub struct KeyAndCsr {
    key: KeyPair,
    csr_pem: String,
    self_signed: CertificateDer<'static>,
}

impl KeyAndCsr {
    /// Makes an ECDSA P-256 key for a host or administrator of this name.
    pub fn generate(name: &str) -> Result<Self, CsrError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CsrError::Make)?;
        Self::for_key(key, name)
    }

    /// Takes up a key that was generated earlier, so that an interrupted join goes on with it.
    pub fn from_key_pem(key_pem: &str, name: &str) -> Result<Self, CsrError> {
        Self::for_key(parse_key(key_pem)?, name)
    }

    fn for_key(key: KeyPair, name: &str) -> Result<Self, CsrError> {
        check_name(name)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let csr = params.serialize_request(&key).map_err(CsrError::Make)?;
        let csr_pem = csr.pem().map_err(CsrError::Make)?;
        let self_signed = params.self_signed(&key).map_err(CsrError::Make)?.der().clone();
        Ok(Self { key, csr_pem, self_signed })
    }

    /// The request, for the wire.
    pub fn csr_pem(&self) -> &str {
        &self.csr_pem
    }

    /// The private key, for `key.pem` and nothing else.
    pub fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.key.serialize_pem())
    }

    /// The public key as SubjectPublicKeyInfo, in DER.
    pub fn spki(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    pub(crate) fn self_signed(&self) -> CertificateDer<'static> {
        self.self_signed.clone()
    }

    pub(crate) fn key_der(&self) -> PrivateKeyDer<'static> {
        key_der(&self.key)
    }
}

impl fmt::Debug for KeyAndCsr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyAndCsr").finish_non_exhaustive()
    }
}

/// A request whose sender has proven to hold its key. Only such a one can be issued for.
///
/// Names and extensions of the request are dropped here: the CA decides what a certificate says.
#[derive(Clone)]
pub struct VerifiedCsr {
    spki: Vec<u8>,
}

impl VerifiedCsr {
    /// Parses a request and verifies its signature by its own key.
    pub fn parse(pem: &str) -> Result<Self, CsrError> {
        if pem.len() > CSR_LEN_MAX {
            return Err(CsrError::TooLong(pem.len()));
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| CsrError::NotPem)?;
        let Ok(([], request)) = X509CertificationRequest::from_der(&der) else {
            return Err(CsrError::Malformed);
        };
        request.verify_signature().map_err(|_| CsrError::Signature)?;
        let spki = request.certification_request_info.subject_pki.raw.to_vec();
        let key = SubjectPublicKeyInfo::from_der(&spki).map_err(|_| CsrError::Algorithm)?;
        if key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(CsrError::Algorithm);
        }
        Ok(Self { spki })
    }

    /// Takes the key of a certificate that exists, to renew it.
    pub(crate) fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, PeerError> {
        parse(certificate)?;
        Ok(Self { spki: spki_of(certificate)? })
    }

    /// The public key as SubjectPublicKeyInfo, in DER.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// Refuses a request that was not made by the peer of this connection: a stolen request would
    /// otherwise spend somebody's token on a key that nobody at the other end has.
    pub fn check_peer(&self, peer: &ConnectInfo) -> Result<(), PeerError> {
        if peer.peer_spki()? == self.spki { Ok(()) } else { Err(PeerError::OtherKey) }
    }
}

impl fmt::Debug for VerifiedCsr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifiedCsr").finish_non_exhaustive()
    }
}

/// Reads a private key; other algorithms than ours are refused.
pub(crate) fn parse_key(pem: &str) -> Result<KeyPair, CsrError> {
    KeyPair::from_pkcs8_pem_and_sign_algo(pem, &PKCS_ECDSA_P256_SHA256).map_err(CsrError::Key)
}

pub(crate) fn key_der(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))
}
