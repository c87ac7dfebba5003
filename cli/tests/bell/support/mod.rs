//! A small Admin server over the product's own mutual TLS, and the real `bell` against it.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use bellwether_member::{InitOptions, InitReport, Ports, init_cluster};
use bellwether_pki::{
    API_PORT_ROLES, IdentityFiles, RequireRole, Role, ServeLimits, serve_tls, server_config,
};
use bellwether_proto::v1::admin_server::AdminServer;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tonic::Status;
use tonic::transport::Server;

mod desk;
pub use desk::Desk;

/// How a server treats its callers.
#[derive(Clone, Copy)]
pub enum Conduct {
    /// Answers as a cluster would.
    Serve,
    /// Answers every call with this status.
    Answer(fn() -> Status),
    /// Ends, with all its connections, when it is asked anything.
    Break,
    /// Sends the first update of a watched task and ends then.
    BreakWatching,
    /// Never answers.
    Silent,
}

/// What a server was asked, in order.
pub type Calls = Arc<Mutex<Vec<String>>>;

/// A cluster's identities, its servers, and an administrator with `bell`.
pub struct Lab {
    pub base: tempfile::TempDir,
    pub report: InitReport,
    servers: Vec<Arc<Notify>>,
    endpoints: Vec<SocketAddr>,
}

impl Lab {
    pub fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        std::fs::create_dir(base.path().join("storage")).unwrap();
        let report = init_cluster(InitOptions {
            data_dir: base.path().join("controller"),
            cluster_name: "lab".into(),
            name: "alpha".into(),
            address: "127.0.0.1".parse().unwrap(),
            ports: Ports::default(),
            storage: base.path().join("storage"),
            context_dir: base.path().join("config"),
            admin_name: "admin".into(),
        })
        .unwrap();
        Self { base, report, servers: Vec::new(), endpoints: Vec::new() }
    }

    /// A lab with one server.
    pub fn with(conduct: Conduct) -> (Self, Calls) {
        let mut lab = Self::new();
        let calls = lab.serve(conduct);
        (lab, calls)
    }

    /// An endpoint at which nobody listens.
    pub fn nobody(&mut self) {
        self.endpoints.push("127.0.0.1:1".parse().unwrap());
    }

    /// Starts a server and makes it the last endpoint of the context.
    pub fn serve(&mut self, conduct: Conduct) -> Calls {
        self.serve_roles(conduct, API_PORT_ROLES)
    }

    /// The same for a port that serves these roles.
    pub fn serve_roles(&mut self, conduct: Conduct, roles: &[Role]) -> Calls {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        self.endpoints.push(listener.local_addr().unwrap());
        listener.set_nonblocking(true).unwrap();
        let files = IdentityFiles::load(&self.report.data_dir).unwrap();
        let tls = server_config(&files, roles).unwrap();
        let (calls, down) = (Calls::default(), Arc::new(Notify::new()));
        self.servers.push(Arc::clone(&down));
        let desk = Desk { conduct, calls: Arc::clone(&calls), down: Arc::clone(&down) };
        let guarded = AdminServer::with_interceptor(desk, RequireRole::any_of(&[Role::Admin]));
        // A runtime of its own, so that its end takes every connection with it, as a crash does.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async move {
                let listener = TcpListener::from_std(listener).unwrap();
                let incoming = serve_tls(listener, tls, ServeLimits::default());
                tokio::select! {
                    ended = Server::builder().add_service(guarded).serve_with_incoming(incoming) => ended.unwrap(),
                    () = down.notified() => {}
                }
            });
        });
        calls
    }

    pub fn config(&self) -> PathBuf {
        self.base.path().join("config/bell.toml")
    }

    /// Writes the context with the endpoints so far and the given identity.
    pub fn write_context(&self, identity: &std::path::Path) {
        let endpoints: Vec<_> = self.endpoints.iter().map(|e| format!("\"{e}\"")).collect();
        let text = format!(
            "current = \"lab\"\n[contexts.lab]\nendpoints = [{}]\nidentity = \"{}\"\n",
            endpoints.join(", "),
            identity.display()
        );
        std::fs::write(self.config(), text).unwrap();
    }

    /// Runs `bell` with a line of arguments and nothing on its input.
    pub fn bell(&self, line: &str) -> Ran {
        self.bell_with_input(line, "")
    }

    pub fn bell_with_input(&self, line: &str, input: &str) -> Ran {
        let mut child = self
            .command(line)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that ends without reading its input breaks the pipe, which is its right.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        Ran::from(child.wait_with_output().unwrap())
    }

    /// `bell` with this lab's context, not started yet.
    pub fn command(&self, line: &str) -> Command {
        if !self.endpoints.is_empty() && !self.config().exists() {
            self.write_context(&self.report.admin.dir);
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_bell"));
        command
            .args(line.split_whitespace())
            .env("BELLWETHER_CONFIG", self.config())
            .env("TZ", "UTC");
        command
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.servers.iter().for_each(|server| server.notify_one());
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap()
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}
