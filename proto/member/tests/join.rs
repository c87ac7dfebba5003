//! Joining, against a small Join server over the product's own TLS.

#![allow(clippy::unwrap_used)] // A helper that fails fails its test.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use bellwether_member::{
    InitOptions, InitReport, JoinOptions, MemberConfig, MemberError, MemberRole, Ports,
    init_cluster, join,
};
use bellwether_pki::{
    ConnectInfo, Identity, IdentityFiles, JoinToken, ServeLimits, Validity, VerifiedCsr,
    join_server_config, serve_tls,
};
use bellwether_proto::v1;
use bellwether_proto::v1::join_server::{Join, JoinServer};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// How the server treats a request.
#[derive(Clone)]
enum Conduct {
    Admit,
    Refuse(fn() -> Status),
    /// Admits, but the reply is changed on its way.
    Falsify(fn(&mut v1::JoinReply)),
    /// Ends the whole server in the middle of the request.
    Break,
}

struct Desk {
    files: IdentityFiles,
    config: MemberConfig,
    secret: String,
    conduct: Conduct,
    asked: Arc<AtomicUsize>,
    down: Arc<Notify>,
}

impl Desk {
    fn reply(&self, request: &v1::JoinRequest, peer: &ConnectInfo) -> v1::JoinReply {
        let csr = VerifiedCsr::parse(&request.certificate_request).unwrap();
        csr.check_peer(peer).unwrap();
        let ca = self.files.ca().unwrap();
        let identity = Identity {
            cluster: ca.cluster(),
            role: request.role.parse().unwrap(),
            id: 2,
            name: request.name.clone(),
        };
        let issued = ca.issue(&identity, &csr, Validity::days(SystemTime::now(), 1)).unwrap();
        let ca_key = match request.role.as_str() {
            "controller" => ca.key_pem().to_string(),
            _ => String::new(),
        };
        v1::JoinReply {
            cluster_id: ca.cluster().to_string(),
            cluster_name: ca.name().to_owned(),
            id: 2,
            certificate: issued.pem().to_owned(),
            ca_certificate: ca.certificate_pem().to_owned(),
            ca_key,
            controllers: vec![v1::Member::from(&self.config.as_controller())],
            storage: self.config.storage.display().to_string(),
        }
    }
}

#[tonic::async_trait]
impl Join for Desk {
    async fn join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::JoinReply>, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let peer = request.extensions().get::<ConnectInfo>().unwrap().clone();
        let request = request.into_inner();
        assert_eq!(request.secret, self.secret);
        match &self.conduct {
            Conduct::Admit => Ok(Response::new(self.reply(&request, &peer))),
            Conduct::Refuse(status) => Err(status()),
            Conduct::Falsify(change) => {
                let mut reply = self.reply(&request, &peer);
                change(&mut reply);
                Ok(Response::new(reply))
            }
            Conduct::Break => {
                self.down.notify_one();
                std::future::pending().await
            }
        }
    }
}

/// A cluster of which only the join desks exist.
struct Cluster {
    base: tempfile::TempDir,
    report: InitReport,
    servers: Vec<Arc<Notify>>,
}

impl Cluster {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        std::fs::create_dir(base.path().join("storage")).unwrap();
        let report = init_cluster(InitOptions {
            data_dir: base.path().join("first"),
            cluster_name: "lab".into(),
            name: "alpha".into(),
            address: "127.0.0.1".parse().unwrap(),
            ports: Ports::default(),
            storage: base.path().join("storage"),
            context_dir: base.path().join("context"),
            admin_name: "admin".into(),
        })
        .unwrap();
        Self { base, report, servers: Vec::new() }
    }

    fn token(&self, role: MemberRole) -> JoinToken {
        let nowhere = vec!["127.0.0.1:1".parse().unwrap()];
        JoinToken::generate(role.into(), self.report.ca_pin, nowhere).unwrap()
    }

    /// Starts a desk that knows the token, and puts its address into the token.
    fn desk(&mut self, token: &mut JoinToken, conduct: Conduct) -> Arc<AtomicUsize> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap();
        let files = IdentityFiles::load(&self.report.data_dir).unwrap();
        let tls = join_server_config(&files).unwrap();
        let (asked, down) = (Arc::default(), Arc::new(Notify::new()));
        self.servers.push(Arc::clone(&down));
        let desk = Desk {
            files,
            config: self.report.config.clone(),
            secret: token.secret.to_wire().to_string(),
            conduct,
            asked: Arc::clone(&asked),
            down: Arc::clone(&down),
        };
        // A runtime of its own, so that its end takes every connection with it, as a crash does.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async move {
                listener.set_nonblocking(true).unwrap();
                let listener = TcpListener::from_std(listener).unwrap();
                let incoming = serve_tls(listener, tls, ServeLimits::default());
                let server = Server::builder().add_service(JoinServer::new(desk));
                tokio::select! {
                    ended = server.serve_with_incoming(incoming) => ended.unwrap(),
                    () = down.notified() => {}
                }
            });
        });
        token.endpoints.retain(|known| known.port() != 1);
        token.endpoints.push(endpoint);
        asked
    }

    fn data_dir(&self) -> PathBuf {
        self.base.path().join("members/second")
    }

    async fn join(&self, token: &JoinToken, role: MemberRole) -> Result<MemberConfig, MemberError> {
        join(JoinOptions {
            token: token.to_text().unwrap().to_string(),
            data_dir: self.data_dir(),
            name: "beta".into(),
            role,
            address: "127.0.0.2".parse().unwrap(),
            ports: Ports::default(),
        })
        .await
    }

    fn assert_nothing_left(&self) {
        let members = self.base.path().join("members");
        assert!(entries(&members).is_empty(), "{:?}", entries(&members));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.servers.iter().for_each(|server| server.notify_one());
    }
}

fn entries(dir: &Path) -> Vec<String> {
    let Ok(found) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> =
        found.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn an_agent_joins_and_never_sees_the_key_of_the_ca() {
    let mut cluster = Cluster::new();
    let mut token = cluster.token(MemberRole::Agent);
    cluster.desk(&mut token, Conduct::Admit);
    let config = cluster.join(&token, MemberRole::Agent).await.unwrap();
    assert_eq!(entries(&cluster.data_dir()), ["ca.pem", "cert.pem", "key.pem", "member.toml"]);
    assert_eq!(MemberConfig::load(&cluster.data_dir()).unwrap(), config);
    assert!(!config.bootstrap);
    assert_eq!(config.controllers, [cluster.report.config.as_controller()]);
    assert_eq!(config.storage, cluster.report.config.storage);
    let files = IdentityFiles::load(&cluster.data_dir()).unwrap();
    assert_eq!((files.identity().id, files.identity().name.as_str()), (2, "beta"));
    assert_eq!(entries(&cluster.base.path().join("members")), ["second"]);
}

#[tokio::test]
async fn a_controller_joins_with_the_key_of_the_ca() {
    let mut cluster = Cluster::new();
    let mut token = cluster.token(MemberRole::Controller);
    cluster.desk(&mut token, Conduct::Admit);
    cluster.join(&token, MemberRole::Controller).await.unwrap();
    assert!(IdentityFiles::load(&cluster.data_dir()).unwrap().ca().is_some());
}

#[tokio::test]
async fn a_controller_that_cannot_serve_is_passed_over() {
    let mut cluster = Cluster::new();
    let mut token = cluster.token(MemberRole::Agent);
    cluster.desk(&mut token, Conduct::Refuse(|| Status::unavailable("no leader")));
    cluster.desk(&mut token, Conduct::Admit);
    token.endpoints.insert(0, "127.0.0.1:1".parse().unwrap());
    cluster.join(&token, MemberRole::Agent).await.unwrap();
}

#[tokio::test]
async fn a_refusal_reaches_the_reader_as_the_controller_said_it() {
    for (status, word) in [
        (
            (|| Status::failed_precondition("the token expired at 12:00")) as fn() -> Status,
            "expired at 12:00",
        ),
        (|| Status::failed_precondition("the token was used by node gamma"), "used by node gamma"),
        (|| Status::unauthenticated("the token is not one of this cluster"), "not one of this"),
        (|| Status::permission_denied("the token is for the role controller"), "role controller"),
    ] {
        let mut cluster = Cluster::new();
        let mut token = cluster.token(MemberRole::Agent);
        cluster.desk(&mut token, Conduct::Refuse(status));
        let second = cluster.desk(&mut token, Conduct::Admit);
        let error = cluster.join(&token, MemberRole::Agent).await.unwrap_err();
        assert!(matches!(error, MemberError::Declined { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(error.remedy().unwrap().contains("join-token"));
        assert_eq!(second.load(Ordering::SeqCst), 0, "a decision of the cluster is final");
        cluster.assert_nothing_left();
    }
}

#[tokio::test]
async fn a_foreign_controller_never_learns_the_secret() {
    let (mut ours, mut theirs) = (Cluster::new(), Cluster::new());
    let mut token = ours.token(MemberRole::Agent);
    let asked = theirs.desk(&mut token, Conduct::Admit);
    let endpoint = token.endpoints[0];
    let error = ours.join(&token, MemberRole::Agent).await.unwrap_err();
    assert!(error.to_string().contains(&format!(
        "the controller at {endpoint} is not of the cluster that made this token"
    )));
    assert!(matches!(error, MemberError::WrongCluster { .. }));
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    ours.assert_nothing_left();

    // One stale address does not keep a host out.
    ours.desk(&mut token, Conduct::Admit);
    ours.join(&token, MemberRole::Agent).await.unwrap();
}

#[tokio::test]
async fn a_lost_answer_is_unknown_and_not_a_refusal() {
    let mut cluster = Cluster::new();
    let mut token = cluster.token(MemberRole::Agent);
    cluster.desk(&mut token, Conduct::Break);
    let error = cluster.join(&token, MemberRole::Agent).await.unwrap_err();
    assert!(matches!(error, MemberError::OutcomeUnknown { .. }), "{error:?}");
    cluster.desk(&mut token, Conduct::Refuse(|| Status::failed_precondition("used")));
    token.endpoints.remove(0);
    cluster.desk(&mut token, Conduct::Break);
    token.endpoints.reverse();
    let error = cluster.join(&token, MemberRole::Agent).await.unwrap_err();
    assert!(matches!(error, MemberError::OutcomeUnknown { .. }), "{error:?}");
    cluster.assert_nothing_left();
}

#[tokio::test]
async fn a_reply_that_does_not_fit_is_not_written_down() {
    type Change = fn(&mut v1::JoinReply);
    for (change, word) in [
        ((|r| r.ca_key = "key".into()) as Change, "not for agents"),
        (|r| r.id = 3, "number 2"),
        (|r| r.storage = "relative".into(), "absolute"),
        (|r| r.controllers.clear(), "controllers is empty"),
        (|r| r.certificate.clear(), "certificate"),
        (|r| r.cluster_id = "x".into(), "cluster's id"),
    ] {
        let mut cluster = Cluster::new();
        let mut token = cluster.token(MemberRole::Agent);
        cluster.desk(&mut token, Conduct::Falsify(change));
        let error = cluster.join(&token, MemberRole::Agent).await.unwrap_err();
        assert!(matches!(error, MemberError::BadReply { .. }), "{error:?}");
        assert!(error.to_string().contains(word), "{word}: {error}");
        cluster.assert_nothing_left();
    }
}

#[tokio::test]
async fn what_can_be_known_before_asking_is_refused_before_asking() {
    let mut cluster = Cluster::new();
    let mut token = cluster.token(MemberRole::Agent);
    let asked = cluster.desk(&mut token, Conduct::Admit);
    let wrong_role = cluster.join(&token, MemberRole::Controller).await.unwrap_err();
    assert!(wrong_role.to_string().contains("made for the role agent"), "{wrong_role}");

    let text = token.to_text().unwrap().to_string();
    let options = JoinOptions {
        token: text.replace(&text[10..12], "__"),
        data_dir: cluster.data_dir(),
        name: "beta".into(),
        role: MemberRole::Agent,
        address: "127.0.0.2".parse().unwrap(),
        ports: Ports::default(),
    };
    let damaged = join(options.clone()).await.unwrap_err();
    assert!(matches!(damaged, MemberError::BadToken { .. }), "{damaged}");

    let used = JoinOptions { token: text, data_dir: cluster.report.data_dir.clone(), ..options };
    let used = join(used).await.unwrap_err();
    assert!(matches!(used, MemberError::AlreadyAMember { .. }), "{used}");
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn nobody_at_home_lists_every_address() {
    let cluster = Cluster::new();
    let mut token = cluster.token(MemberRole::Agent);
    let second: SocketAddr = "127.0.0.2:1".parse().unwrap();
    token.endpoints.push(second);
    let error = cluster.join(&token, MemberRole::Agent).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, MemberError::Unreachable { .. }));
    assert!(text.contains("127.0.0.1:1: ") && text.contains("127.0.0.2:1: "), "{text}");
    assert!(text.contains("refused"), "{text}");
}
