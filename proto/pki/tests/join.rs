//! The join port: a newcomer knows a token, the cluster knows nothing of the newcomer.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bellwether_pki::{
    Ca, CaPin, ConnectInfo, IdentityFiles, JoinToken, KeyAndCsr, PeerError, RAFT_PORT_ROLES, Role,
    ServeLimits, ServerIdentity, TlsIncoming, Validity, VerifiedCsr, client_config,
    join_client_config, join_server_config, server_config,
};
use common::*;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;

const ANY: ServerIdentity = ServerIdentity::AnyController;

async fn join_port(ca: &Ca) -> SocketAddr {
    serve(join_server_config(&member_at(ca, Role::Controller, 1)).unwrap()).await
}

#[tokio::test]
async fn a_newcomer_with_a_token_joins_and_is_a_member_then() {
    let ca = new_ca();
    let addr = join_port(&ca).await;
    let text = JoinToken::generate(Role::Agent, ca.pin(), vec![addr]).unwrap().to_text().unwrap();

    let token: JoinToken = text.parse().unwrap();
    let key = KeyAndCsr::generate("node5").unwrap();
    let tls = join_client_config(token.ca_pin, &key).unwrap();
    let answer = call(token.endpoints[0], tls, ANY).await.unwrap();
    assert_eq!(header(&answer, "x-who"), "nobody");
    assert_eq!(header(&answer, "x-key-len"), key.spki().len().to_string());

    let validity = Validity::days(std::time::SystemTime::now(), 30);
    let who = identity(&ca, Role::Controller, 5);
    let issued = issue(&ca, &who, &key, validity);
    let files =
        IdentityFiles::from_pem(ca.certificate_pem(), &issued, &key.key_pem(), None).unwrap();
    files.require_pin(token.ca_pin).unwrap();
    let raft = server_config(&member_at(&ca, Role::Controller, 1), RAFT_PORT_ROLES).unwrap();
    let raft = serve(raft).await;
    let answer = call(raft, client_config(&files).unwrap(), ANY).await.unwrap();
    assert_eq!(header(&answer, "x-who"), who.uri());
}

#[tokio::test]
async fn the_pin_must_be_the_one_of_the_servers_ca() {
    let ca = new_ca();
    let addr = join_port(&ca).await;
    let key = KeyAndCsr::generate("node5").unwrap();
    for wrong in [new_ca().pin(), CaPin::from_bytes([0; 32])] {
        let refused = call(addr, join_client_config(wrong, &key).unwrap(), ANY).await.unwrap_err();
        assert!(refused.contains("server's certificate was refused"), "{refused}");
    }
}

/// A server that shows a chain of our choice, as an impostor between the two would.
async fn impostor(chain: Vec<CertificateDer<'static>>, key: &KeyAndCsr) -> SocketAddr {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = rustls_pki_types::pem::PemObject::from_pem_slice(key.key_pem().as_bytes()).unwrap();
    let key: PrivateKeyDer<'static> = key;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(WebPkiClientVerifier::no_client_auth())
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = acceptor.accept(stream).await;
        }
    });
    addr
}

#[tokio::test]
async fn an_impostor_who_shows_the_real_ca_certificate_is_refused() {
    let (ca, evil) = (new_ca(), new_ca());
    let validity = Validity::days(std::time::SystemTime::now(), 1);
    let key = KeyAndCsr::generate("evil").unwrap();
    let csr = VerifiedCsr::parse(key.csr_pem()).unwrap();
    let by_evil = evil.issue(&identity(&evil, Role::Controller, 1), &csr, validity).unwrap();
    // An agent of the right cluster has a real certificate, but it is no controller's.
    let by_ca = ca.issue(&identity(&ca, Role::Agent, 2), &csr, validity).unwrap();
    let admin = ca.issue(&identity(&ca, Role::Admin, 0), &csr, validity).unwrap();
    let real = ca.certificate().clone();
    let chains = [
        vec![by_evil.der().clone(), real.clone()],
        vec![by_evil.der().clone(), evil.certificate().clone(), real.clone()],
        vec![by_ca.der().clone(), real.clone()],
        vec![admin.der().clone(), real.clone()],
        vec![by_ca.der().clone()],
    ];
    let newcomer = KeyAndCsr::generate("node5").unwrap();
    for chain in chains {
        let addr = impostor(chain, &key).await;
        let tls = join_client_config(ca.pin(), &newcomer).unwrap();
        let refused = call(addr, tls, ANY).await.unwrap_err();
        assert!(refused.contains("server's certificate was refused"), "{refused}");
    }
}

/// Connects with a client configuration and gives what a handler on the join port would see.
async fn seen_by_join_port(ca: &Ca, tls: Arc<rustls::ClientConfig>) -> ConnectInfo {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = join_server_config(&member_at(ca, Role::Controller, 1)).unwrap();
    let mut incoming = TlsIncoming::new(listener, server, ServeLimits::default());
    let client = tokio::spawn(call(addr, tls, ANY));
    let accepted = tokio::time::timeout(Duration::from_secs(20), incoming.accept()).await;
    let info = accepted.unwrap().info().clone();
    client.abort();
    info
}

#[tokio::test]
async fn a_request_for_another_key_is_refused() {
    let ca = new_ca();
    let (mine, other) = (KeyAndCsr::generate("a").unwrap(), KeyAndCsr::generate("a").unwrap());
    let info = seen_by_join_port(&ca, join_client_config(ca.pin(), &mine).unwrap()).await;
    VerifiedCsr::parse(mine.csr_pem()).unwrap().check_peer(&info).unwrap();
    let refused = VerifiedCsr::parse(other.csr_pem()).unwrap().check_peer(&info);
    assert_eq!(refused, Err(PeerError::OtherKey));
}

#[tokio::test]
async fn the_join_port_believes_no_identity() {
    let ca = new_ca();
    // Even a real member's certificate proves nothing there, as no chain is checked.
    let member = client_config(&member(&ca, Role::Controller)).unwrap();
    assert_eq!(seen_by_join_port(&ca, member).await.identity, None);
}

#[test]
fn a_request_must_be_signed_by_its_own_key() {
    use base64::Engine;
    let key = KeyAndCsr::generate("node5").unwrap();
    let body: String = key.csr_pem().lines().filter(|line| !line.starts_with('-')).collect();
    let engine = base64::engine::general_purpose::STANDARD;
    let mut der = engine.decode(body).unwrap();
    let at = der.len() - 8;
    der[at] ^= 1;
    let forged = format!(
        "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
        engine.encode(der)
    );
    assert!(VerifiedCsr::parse(&forged).is_err());
    assert!(VerifiedCsr::parse(&"x".repeat(100_000)).is_err());
    assert!(VerifiedCsr::parse("").is_err());
}
