//! Who gets through which port, over real connections.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use bellwether_pki::{
    AGENT_PORT_ROLES, API_PORT_ROLES, Ca, IdentityFiles, KeyAndCsr, RAFT_PORT_ROLES, Reloadable,
    Role, ServeLimits, ServerIdentity, TlsError, client_config, join_client_config, server_config,
};
use common::*;
use rustls::{ClientConfig, HandshakeKind, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const ANY: ServerIdentity = ServerIdentity::AnyController;

#[tokio::test]
async fn each_port_serves_its_roles_and_refuses_the_others() {
    let ca = new_ca();
    let server = member_at(&ca, Role::Controller, 1);
    for allowed in [RAFT_PORT_ROLES, AGENT_PORT_ROLES, API_PORT_ROLES] {
        let addr = serve(server_config(&server, allowed).unwrap()).await;
        for role in ROLES {
            let client = member(&ca, role);
            let answer = call(addr, client_config(&client).unwrap(), ANY).await;
            match allowed.contains(&role) {
                true => assert_eq!(header(&answer.unwrap(), "x-who"), client.identity().uri()),
                false => assert!(answer.unwrap_err().contains("refused the role"), "{role}"),
            }
        }
    }
}

#[tokio::test]
async fn strangers_get_through_no_port() {
    // A CA that was good ten days ago, so that only the leaf is out of its time.
    let before = validity_at(-30).0;
    let cluster = bellwether_types::ClusterId::from_uuid(uuid::Uuid::now_v7());
    let ca = Ca::create_at(cluster, "lab", before).unwrap();
    let server = member_at(&ca, Role::Controller, 1);
    for allowed in [RAFT_PORT_ROLES, AGENT_PORT_ROLES, API_PORT_ROLES] {
        let addr = serve(server_config(&server, allowed).unwrap()).await;
        for (what, config, expected) in strangers(&ca) {
            let refused = call(addr, config, ANY).await.unwrap_err();
            assert!(refused.contains(expected), "{what}: {refused}");
        }
    }
}

/// Clients that trust our CA but have no good certificate of it.
fn strangers(ca: &Ca) -> Vec<(&'static str, Arc<ClientConfig>, &'static str)> {
    let key = KeyAndCsr::generate("node2").unwrap();
    let expired = shown_outside_its_time(ca, -10);
    let early = shown_outside_its_time(ca, 10);
    vec![
        ("foreign CA", mixed(ca, &member(&new_ca(), Role::Controller)), "another cluster"),
        ("no certificate", no_certificate(ca), "wants a certificate"),
        ("self-signed", join_client_config(ca.pin(), &key).unwrap(), ""),
        ("expired", client_config(&expired).unwrap(), "expired"),
        ("not yet valid", client_config(&early).unwrap(), "expired"),
    ]
}

/// A controller that loads its identity with a clock of its own, as a broken one would.
fn shown_outside_its_time(ca: &Ca, days: i64) -> IdentityFiles {
    let dir = tempfile::tempdir().unwrap();
    let key = KeyAndCsr::generate("node2").unwrap();
    let (then, validity) = validity_at(days);
    let ca_pem = ca.certificate_pem();
    let certificate = issue(ca, &identity(ca, Role::Controller, 2), &key, validity);
    write_raw(
        dir.path(),
        &[("ca.pem", ca_pem), ("cert.pem", &certificate), ("key.pem", &key.key_pem())],
    );
    IdentityFiles::load_at(dir.path(), then).unwrap()
}

fn roots(ca: &Ca) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(ca.certificate().clone()).unwrap();
    roots
}

fn builder(ca: &Ca) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(ca))
}

fn no_certificate(ca: &Ca) -> Arc<ClientConfig> {
    let mut config = builder(ca).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// Trusts one CA and shows the certificate of another.
fn mixed(trusted: &Ca, shown: &IdentityFiles) -> Arc<ClientConfig> {
    let mut config = builder(trusted).with_no_client_auth();
    let theirs = client_config(shown).unwrap();
    config.client_auth_cert_resolver = theirs.client_auth_cert_resolver.clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

#[tokio::test]
async fn a_client_talks_only_to_whom_it_means() {
    let ca = new_ca();
    let client = client_config(&member(&ca, Role::Controller)).unwrap();
    let agent = serve(server_config(&member_at(&ca, Role::Agent, 2), AGENT_PORT_ROLES).unwrap());
    let agent = agent.await;
    let one = member_at(&ca, Role::Controller, 1);
    let controller = serve(server_config(&one, RAFT_PORT_ROLES).unwrap()).await;
    let foreign = member_at(&new_ca(), Role::Controller, 1);
    let foreign = serve(server_config(&foreign, RAFT_PORT_ROLES).unwrap()).await;

    use ServerIdentity::{Agent, Controller};
    for (addr, server) in [(agent, Agent(2)), (controller, Controller(1)), (controller, ANY)] {
        call(addr, client.clone(), server).await.unwrap();
    }
    let wrong = [
        (agent, Agent(3)),
        (agent, ANY),
        (agent, Controller(2)),
        (controller, Controller(2)),
        (controller, Agent(1)),
        (foreign, ANY),
        (foreign, Controller(1)),
    ];
    for (addr, server) in wrong {
        let refused = call(addr, client.clone(), server).await.unwrap_err();
        assert!(refused.contains("server's certificate was refused"), "{server:?}: {refused}");
    }
}

#[test]
fn an_admin_cannot_serve_and_an_agent_cannot_take_joins() {
    let ca = new_ca();
    let refused = server_config(&member(&ca, Role::Admin), API_PORT_ROLES);
    assert!(matches!(refused, Err(TlsError::AdminServes)));
    let refused = bellwether_pki::join_server_config(&member(&ca, Role::Agent));
    assert!(matches!(refused, Err(TlsError::JoinRole(Role::Agent))));
}

#[tokio::test]
async fn a_service_refuses_other_roles_with_a_sentence() {
    let ca = new_ca();
    let tls = server_config(&member_at(&ca, Role::Controller, 1), API_PORT_ROLES).unwrap();
    let addr = serve_for(tls, &[Role::Controller]).await;
    let answer = call(addr, client_config(&member(&ca, Role::Agent)).unwrap(), ANY).await.unwrap();
    assert_eq!(header(&answer, "grpc-status"), "7");
    let message = header(&answer, "grpc-message").replace("%20", " ").replace("%60", "`");
    let expected = "this port serves controllers; the certificate says agent `node2`";
    assert_eq!(message, expected);
    let ok = call(addr, client_config(&member(&ca, Role::Controller)).unwrap(), ANY).await.unwrap();
    assert_eq!(header(&ok, "grpc-status"), "0");
}

#[tokio::test]
async fn idle_connections_keep_nobody_out() {
    let ca = new_ca();
    let tls = server_config(&member_at(&ca, Role::Controller, 1), RAFT_PORT_ROLES).unwrap();
    // The timeout is longer than the test may last: it is not what saves the good client.
    let limits = ServeLimits { handshakes_max: 4, handshake_timeout: Duration::from_secs(600) };
    let addr = serve_limited(tls, limits).await;
    let mut idle = Vec::new();
    for _ in 0..50 {
        idle.push(TcpStream::connect(addr).await.unwrap());
    }
    let client = client_config(&member(&ca, Role::Controller)).unwrap();
    call(addr, client, ANY).await.unwrap();
    // The bound is kept by dropping the oldest, not by serving without a bound.
    let read = tokio::time::timeout(Duration::from_secs(20), idle[0].read(&mut [0; 16])).await;
    assert!(matches!(read.unwrap(), Ok(0) | Err(_)));
}

#[tokio::test]
async fn a_handshake_that_does_not_go_on_is_dropped() {
    let ca = new_ca();
    let tls = server_config(&member_at(&ca, Role::Controller, 1), RAFT_PORT_ROLES).unwrap();
    let limits = ServeLimits { handshake_timeout: Duration::from_millis(50), ..Default::default() };
    let addr = serve_limited(tls, limits).await;
    let mut idle = TcpStream::connect(addr).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(20), idle.read(&mut [0; 16])).await;
    assert!(matches!(read.unwrap(), Ok(0) | Err(_)));
}

#[tokio::test]
async fn a_replaced_configuration_serves_the_next_connection() {
    let ca = new_ca();
    let old = server_config(&member_at(&ca, Role::Controller, 1), API_PORT_ROLES).unwrap();
    let source = Reloadable::new(old);
    let addr = serve(source.clone()).await;
    let client = client_config(&member(&ca, Role::Agent)).unwrap();
    call(addr, client.clone(), ServerIdentity::Controller(1)).await.unwrap();

    source.replace(server_config(&member_at(&ca, Role::Controller, 7), API_PORT_ROLES).unwrap());
    call(addr, client.clone(), ServerIdentity::Controller(7)).await.unwrap();
    call(addr, client, ServerIdentity::Controller(1)).await.unwrap_err();
}

#[tokio::test]
async fn no_session_is_resumed_past_the_verifier() {
    let ca = new_ca();
    let tls = server_config(&member_at(&ca, Role::Controller, 1), RAFT_PORT_ROLES).unwrap();
    let addr = serve(tls).await;
    // This client would resume if the server let it.
    let theirs = client_config(&member(&ca, Role::Controller)).unwrap();
    let mut config = builder(&ca).with_no_client_auth();
    config.client_auth_cert_resolver = theirs.client_auth_cert_resolver.clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    for _ in 0..3 {
        let name = ServerName::try_from("controller.bellwether.internal").unwrap();
        let tcp = TcpStream::connect(addr).await.unwrap();
        let mut stream = connector.connect(name, tcp).await.unwrap();
        // The server's first HTTP/2 frame comes after all that TLS has to say.
        stream.read_exact(&mut [0; 9]).await.unwrap();
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
    }
}
