//! Certificates and tokens that nobody of ours has written.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::Arc;

use bellwether_pki::{
    Ca, Identity, JoinSecret, JoinToken, PeerError, RAFT_PORT_ROLES, Role, SecretHash,
    ServerIdentity, TokenError, VerifiedCsr, client_config, peer_identity, server_config,
};
use bellwether_types::ClusterId;
use common::*;
use proptest::prelude::*;
use rcgen::{CertificateParams, CustomExtension, Issuer, KeyPair, SanType};
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use uuid::Uuid;

/// A certificate with these URIs that our CA's key has signed, as a bug of ours would.
fn signed(ca: &Ca, uris: &[String]) -> (CertificateDer<'static>, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names =
        uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().unwrap())).collect();
    let ca_key = KeyPair::from_pem(&ca.key_pem()).unwrap();
    let issuer = Issuer::from_ca_cert_der(ca.certificate(), ca_key).unwrap();
    (params.signed_by(&key, &issuer).unwrap().der().clone(), key)
}

fn hostile_client(ca: &Ca, uris: &[String]) -> Arc<ClientConfig> {
    let (certificate, key) = signed(ca, uris);
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.certificate().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

#[tokio::test]
async fn one_clear_identity_of_this_cluster_or_none() {
    let ca = new_ca();
    let tls = server_config(&member_at(&ca, Role::Controller, 1), RAFT_PORT_ROLES).unwrap();
    let addr = serve(tls).await;
    let good = identity(&ca, Role::Controller, 2).uri();
    let agent = identity(&ca, Role::Agent, 2).uri();
    let foreign = identity(&new_ca(), Role::Controller, 2).uri();
    let hostile: [&[String]; 8] = [
        &[],
        &[foreign],
        std::slice::from_ref(&agent),
        &[agent.clone(), good.clone()],
        &[good.clone(), good.clone()],
        &[format!("{good}/x")],
        &[good.to_uppercase()],
        &[good.replace("/2/", "/+2/")],
    ];
    for uris in hostile {
        let client = hostile_client(&ca, uris);
        let refused = call(addr, client, ServerIdentity::AnyController).await.unwrap_err();
        assert!(refused.contains("refused the role"), "{uris:?}: {refused}");
    }
    // The same client with the one good URI passes: it is the URIs that were refused.
    call(addr, hostile_client(&ca, &[good]), ServerIdentity::AnyController).await.unwrap();
}

#[tokio::test]
async fn a_member_cannot_issue_certificates() {
    let ca = new_ca();
    let tls = server_config(&member_at(&ca, Role::Controller, 1), RAFT_PORT_ROLES).unwrap();
    let addr = serve(tls).await;
    // The member signs a certificate with its own key and sends its own certificate along.
    let (certificate, key) = signed(&ca, &[identity(&ca, Role::Agent, 2).uri()]);
    let forged_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let uri = identity(&ca, Role::Controller, 2).uri();
    params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())];
    let issuer = Issuer::from_ca_cert_der(&certificate, key).unwrap();
    let forged = params.signed_by(&forged_key, &issuer).unwrap().der().clone();

    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(forged_key.serialize_der()));
    let base = client_config(&member(&ca, Role::Controller)).unwrap();
    let mut config = (*base).clone();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.certificate().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![forged, certificate], key)
        .unwrap();
    config.client_auth_cert_resolver = chain.client_auth_cert_resolver.clone();
    let refused = call(addr, Arc::new(config), ServerIdentity::AnyController).await.unwrap_err();
    assert!(refused.contains("does not know the CA"), "{refused}");
}

fn cluster() -> ClusterId {
    ClusterId::from_uuid(Uuid::from_u128(7))
}

fn token() -> JoinToken {
    let endpoints = vec!["10.1.2.3:7443".parse().unwrap(), "[fd00::1]:7443".parse().unwrap()];
    JoinToken::generate(Role::Agent, new_ca().pin(), endpoints).unwrap()
}

#[test]
fn every_change_of_one_character_is_found() {
    let text = token().to_text().unwrap().to_string();
    text.parse::<JoinToken>().unwrap();
    let alphabet = (' '..='~').chain(['ä', '\n']);
    for other in alphabet {
        for (at, was) in text.char_indices().filter(|(_, was)| *was != other) {
            let mut changed = text.clone();
            changed.replace_range(at..at + was.len_utf8(), &other.to_string());
            assert!(changed.parse::<JoinToken>().is_err(), "{at}: {was:?} as {other:?}");
        }
    }
}

#[test]
fn lost_doubled_and_swapped_characters_are_found() {
    let text = token().to_text().unwrap().to_string();
    for at in 0..text.len() {
        let (head, tail) = text.split_at(at);
        assert!(format!("{head}{}", &tail[1..]).parse::<JoinToken>().is_err());
        assert!(head.parse::<JoinToken>().is_err());
        let doubled = format!("{head}{}{tail}", &tail[..1]);
        assert!(doubled.parse::<JoinToken>().is_err());
        if at > 0 && text.as_bytes()[at - 1] != text.as_bytes()[at] {
            let swapped =
                format!("{}{}{}{}", &text[..at - 1], &tail[..1], &head[at - 1..], &tail[1..]);
            assert!(swapped.parse::<JoinToken>().is_err());
        }
    }
}

#[test]
fn a_token_survives_a_broken_line_and_says_what_is_wrong() {
    let token = token();
    let text = token.to_text().unwrap();
    let broken = format!("  {}\r\n{} \n", &text[..60], &text[60..]);
    let read: JoinToken = broken.parse().unwrap();
    assert_eq!(
        (read.role, read.ca_pin, &read.endpoints),
        (token.role, token.ca_pin, &token.endpoints)
    );
    assert_eq!(read.secret_hash(), token.secret_hash());
    assert_eq!("hello".parse::<JoinToken>().unwrap_err(), TokenError::Form);
    assert_eq!("".parse::<JoinToken>().unwrap_err(), TokenError::Form);
    assert_eq!(text[..text.len() - 1].parse::<JoinToken>().unwrap_err(), TokenError::Checksum);
    assert_eq!("x".repeat(1 << 20).parse::<JoinToken>().unwrap_err(), TokenError::Form);
    let none = JoinToken::generate(Role::Agent, token.ca_pin, vec![]).unwrap_err();
    assert_eq!(none, TokenError::Endpoints(0));
}

#[test]
fn secrets_are_hidden_and_compared_by_hash() {
    let token = token();
    let wire = token.secret.to_wire();
    assert!(!format!("{token:?}").contains(wire.as_str()));
    let read = JoinSecret::from_wire(&wire).unwrap();
    assert_eq!(read.hash(), token.secret_hash());
    assert_ne!(JoinSecret::generate().unwrap().hash(), token.secret_hash());
    let hash: SecretHash = token.secret_hash().to_string().parse().unwrap();
    assert_eq!(hash, token.secret_hash());
    for bad in ["", "x", &wire[1..], &format!("{}x", wire.as_str()), "ä"] {
        assert!(JoinSecret::from_wire(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused_as_a_certificate(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let refused = peer_identity(&[CertificateDer::from(bytes)], cluster());
        prop_assert_eq!(refused, Err(PeerError::Malformed));
    }

    #[test]
    fn any_san_extension_is_read_without_panic(content in proptest::collection::vec(any::<u8>(), 0..120)) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], content)];
        let certificate = params.self_signed(&key).unwrap().der().clone();
        prop_assert!(peer_identity(&[certificate], cluster()).is_err());
    }

    #[test]
    fn any_uri_is_read_without_panic(uri in "(bellwether://)?[ -~]{0,120}") {
        let ca = new_ca();
        let (certificate, _) = signed(&ca, std::slice::from_ref(&uri));
        if let Ok(identity) = peer_identity(&[certificate], cluster()) {
            prop_assert_eq!(identity.uri(), uri);
        }
    }

    #[test]
    fn a_damaged_certificate_never_panics_or_changes_the_reader(at in 0usize..2000, bit in 0u8..8) {
        let ca = new_ca();
        let (certificate, _) = signed(&ca, &[identity(&ca, Role::Agent, 2).uri()]);
        let mut bytes = certificate.to_vec();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        // It may be read (the signature is not checked here), but only as an identity in full.
        if let Ok(identity) = peer_identity(&[CertificateDer::from(bytes)], ca.cluster()) {
            prop_assert!(identity.validate().is_ok());
        }
    }

    #[test]
    fn identities_survive_their_uri(
        raw in any::<u128>(), number in 1u64.., name in "[a-zA-Z0-9][a-zA-Z0-9-]{0,62}", pick in 0usize..3,
    ) {
        let role = ROLES[pick];
        let id = if role == Role::Admin { 0 } else { number };
        let identity = Identity { cluster: ClusterId::from_uuid(Uuid::from_u128(raw)), role, id, name };
        prop_assert_eq!(Identity::from_uri(&identity.uri()), Ok(identity));
    }

    #[test]
    fn any_text_is_refused_as_a_token(text in "(bw1\\.)?\\PC{0,200}") {
        prop_assert!(text.parse::<JoinToken>().is_err());
    }

    #[test]
    fn any_text_is_refused_as_a_request(text in "\\PC{0,300}") {
        prop_assert!(VerifiedCsr::parse(&text).is_err());
    }
}
