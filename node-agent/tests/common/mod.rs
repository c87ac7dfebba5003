//! One real agent process under a controller that the test plays.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "these are tests; the lint only knows test functions")]

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bellwether_agent::process::find_by_socket;
use bellwether_member::{KnownController, MemberConfig, MemberRole, Ports};
use bellwether_pki::{
    API_PORT_ROLES, Ca, Identity, IdentityFiles, KeyAndCsr, Role, ServeLimits, ServerIdentity,
    Validity, VerifiedCsr, client_config, connect_channel, install_crypto_provider, serve_tls,
    server_config,
};
use bellwether_proto::v1;
use bellwether_proto::v1::agent_client::AgentClient;
use bellwether_proto::v1::nodes_server::{Nodes, NodesServer};
use bellwether_types::{ClusterId, NodeId};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

pub const NODE: u64 = 7;
const PATIENCE: Duration = Duration::from_secs(30);

/// What the controller has heard.
#[derive(Clone, Default, Debug)]
pub struct Heard {
    pub registrations: Vec<v1::RegisterRequest>,
    pub renewals: u64,
    pub vms: HashMap<String, v1::VmObservation>,
}

impl Heard {
    pub fn state(&self, vm: &str) -> &str {
        self.vms.get(vm).map_or("", |vm| vm.state.as_str())
    }
}

/// The controllers' side of the Nodes service, played by the test.
#[derive(Clone)]
pub struct Controller {
    heard: watch::Sender<Heard>,
    grants: Arc<Mutex<Vec<v1::Grant>>>,
    members: Arc<Mutex<Vec<v1::Member>>>,
    term: Arc<Mutex<u64>>,
    storage: PathBuf,
}

#[tonic::async_trait]
impl Nodes for Controller {
    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterReply>, Status> {
        let request = request.into_inner();
        self.hear(&request.vms, |heard| heard.registrations.push(request.clone()));
        let storage = self.storage.display().to_string();
        Ok(Response::new(v1::RegisterReply { storage, lease_ms: 3_000, ..Default::default() }))
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::RenewReply>, Status> {
        let request = request.into_inner();
        let known = self.heard.borrow().registrations.last().map(|it| it.boot_id.clone());
        self.hear(&request.vms, |heard| heard.renewals += 1);
        Ok(Response::new(v1::RenewReply {
            nonce: request.nonce,
            lease_ms: 3_000,
            term: *self.term.lock().unwrap(),
            grants: self.grants.lock().unwrap().clone(),
            controllers: self.members.lock().unwrap().clone(),
            register: known != Some(request.boot_id),
            pulse_ms: 1,
        }))
    }
}

impl Controller {
    fn hear(&self, vms: &[v1::VmObservation], note: impl FnOnce(&mut Heard)) {
        self.heard.send_modify(|heard| {
            heard.vms = vms.iter().map(|vm| (vm.vm_id.clone(), vm.clone())).collect();
            note(heard);
        });
    }
}

/// One node with its controller, in a directory of its own.
pub struct Lab {
    pub dir: tempfile::TempDir,
    pub client: AgentClient<Channel>,
    controller: Controller,
    heard: watch::Receiver<Heard>,
    ca: Ca,
    agent_addr: SocketAddr,
    agent: Option<Child>,
    vmm: PathBuf,
    pub environment: Vec<(String, String)>,
}

/// The stand-in that cargo builds with the tests.
pub fn stand_in() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let target = own.parent().and_then(Path::parent).unwrap();
    let path = target.join("examples/stand_in_vmm");
    assert!(path.exists(), "{} is missing: build the examples", path.display());
    path
}

fn files(ca: &Ca, role: Role, id: u64, name: &str) -> IdentityFiles {
    let key = KeyAndCsr::generate(name).unwrap();
    let request = VerifiedCsr::parse(key.csr_pem()).unwrap();
    let identity = Identity { cluster: ca.cluster(), role, id, name: name.into() };
    let issued = ca.issue(&identity, &request, Validity::days(SystemTime::now(), 2)).unwrap();
    IdentityFiles::from_pem(ca.certificate_pem(), issued.pem(), &key.key_pem(), None).unwrap()
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

impl Lab {
    /// A node whose agent has registered.
    pub async fn new() -> Self {
        let mut lab = Self::without_agent(stand_in()).await;
        lab.start_agent();
        lab.until("registered", |heard| !heard.registrations.is_empty()).await;
        lab
    }

    pub async fn without_agent(vmm: PathBuf) -> Self {
        install_crypto_provider();
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::create(ClusterId::from_uuid(uuid::Uuid::now_v7()), "lab").unwrap();
        let storage = dir.path().join("storage");
        for dir in ["claims", "state", "heartbeats"] {
            std::fs::create_dir_all(storage.join(dir)).unwrap();
        }
        std::fs::write(storage.join("cluster.id"), format!("{}\n", ca.cluster())).unwrap();
        let (sender, heard) = watch::channel(Heard::default());
        let controller = Controller {
            heard: sender,
            grants: Arc::default(),
            members: Arc::default(),
            term: Arc::new(Mutex::new(1)),
            storage,
        };
        let api = serve(&ca, controller.clone()).await;
        let agent_addr = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let mut lab = Self {
            client: agent_client(agent_addr, &files(&ca, Role::Controller, 1, "c1")),
            dir,
            controller,
            heard,
            ca,
            agent_addr,
            agent: None,
            vmm,
            environment: vec![],
        };
        lab.write_member(api);
        lab.set_boot_id(FIRST_BOOT);
        lab
    }

    fn write_member(&mut self, api: SocketAddr) {
        let data = self.dir.path().join("node");
        files(&self.ca, Role::Agent, NODE, "n7").save(&data).unwrap();
        let ports = Ports { api: api.port(), raft: 1, join: 2, agent: 3 };
        let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
        let itself = NodeId(1);
        let controller =
            KnownController { id: itself, name: "c1".into(), address: localhost, ports };
        let dead = KnownController {
            id: NodeId(2),
            name: "c2".into(),
            address: localhost,
            ports: Ports { api: free_port(), ..ports },
        };
        let member = MemberConfig {
            cluster_id: self.ca.cluster(),
            cluster_name: "lab".into(),
            id: NodeId(NODE),
            name: "n7".into(),
            role: MemberRole::Agent,
            address: localhost,
            storage: self.storage(),
            bootstrap: false,
            ports: Ports { agent: self.agent_addr.port(), api: 1, raft: 2, join: 3 },
            // The first one never answers: every test starts with a rotation.
            controllers: vec![dead, controller],
        };
        member.save(&data).unwrap();
        let config = format!(
            "vmm = {:?}\nruntime_dir = {:?}\nboot_id_path = {:?}\nrenew_interval_ms = 100\n\
             status_interval_ms = 50\n",
            self.vmm,
            self.runtime(),
            self.dir.path().join("boot_id"),
        );
        std::fs::write(data.join("agent.toml"), config).unwrap();
    }

    pub fn storage(&self) -> PathBuf {
        self.dir.path().join("storage")
    }
    pub fn runtime(&self) -> PathBuf {
        self.dir.path().join("run")
    }
    /// The directory of an incarnation.
    pub fn home(&self, vm: &str, epoch: u64) -> PathBuf {
        self.runtime().join(format!("vms/{vm}.{epoch}"))
    }
    pub fn set_boot_id(&self, boot: u128) {
        std::fs::write(self.dir.path().join("boot_id"), boot_id(boot)).unwrap();
    }

    pub fn start_agent(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("agent.log"))
            .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_bellwether-agent"))
            .args(["run", "--data-dir"])
            .arg(self.dir.path().join("node"))
            .env("RUST_LOG", "debug,h2=info,hyper=info,rustls=info,tower=info")
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(child);
    }

    /// SIGKILL to the agent and nothing else.
    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Waits for an agent that a failpoint kills.
    pub fn agent_died(&mut self) {
        self.agent.take().unwrap().wait().unwrap();
    }

    /// A new agent on the same directories, which has registered.
    pub async fn restart_agent(&mut self) {
        let before = self.heard.borrow().registrations.len();
        self.start_agent();
        self.until("registered again", |heard| heard.registrations.len() > before).await;
    }

    /// Waits until the controller has heard something.
    pub async fn until(&mut self, what: &str, condition: impl FnMut(&Heard) -> bool) -> Heard {
        let waited = tokio::time::timeout(PATIENCE, self.heard.wait_for(condition)).await;
        if let Ok(heard) = waited {
            return heard.unwrap().clone();
        }
        let log = std::fs::read_to_string(self.dir.path().join("agent.log")).unwrap();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(40)..].join("\n");
        panic!("never: {what}; heard {:?}\n{tail}", self.controller.heard.borrow());
    }

    pub async fn until_state(&mut self, vm: &str, state: &str) -> Heard {
        self.until(&format!("{vm} {state}"), |heard| heard.state(vm) == state).await
    }

    /// The controller names these as all controllers, by their API ports.
    pub fn announce_controllers(&self, api_ports: &[u16]) {
        let member = |(id, api): (u64, &u16)| v1::Member {
            id,
            name: format!("c{id}"),
            address: Ipv4Addr::LOCALHOST.to_string(),
            ports: Some(v1::Ports { api: (*api).into(), raft: 1, join: 2, agent: 3 }),
        };
        *self.controller.members.lock().unwrap() = (1..).zip(api_ports).map(member).collect();
    }

    /// What the agent's data directory says of the controllers.
    pub fn known_controllers(&self) -> Vec<KnownController> {
        MemberConfig::load(&self.dir.path().join("node")).unwrap().controllers
    }

    /// The term with which renewals are answered from now on.
    pub fn lead_in(&self, term: u64) {
        *self.controller.term.lock().unwrap() = term;
    }

    pub fn grant(&self, vm: &str, epoch: u64) {
        let grant = v1::Grant { vm_id: vm.into(), epoch };
        *self.controller.grants.lock().unwrap() = vec![grant];
    }

    /// A client of the agent's port with another certificate.
    pub fn client_of(&self, role: Role) -> AgentClient<Channel> {
        agent_client(self.agent_addr, &files(&self.ca, role, 0, "other"))
    }
    pub fn client_of_agent(&self) -> AgentClient<Channel> {
        agent_client(self.agent_addr, &files(&self.ca, Role::Agent, 8, "n8"))
    }

    /// The process of an incarnation, if it lives.
    pub fn vmm_pid(&self, vm: &str, epoch: u64) -> Option<u32> {
        let found = find_by_socket(&self.home(vm, epoch).join("api.sock")).unwrap();
        assert!(found.len() <= 1, "one VMM for one socket: {found:?}");
        found.first().copied()
    }

    pub async fn prepare(&mut self, vm: &str, epoch: u64, cmdline: &str) -> Result<u64, Status> {
        let request = v1::PrepareRequest {
            order: order(vm, epoch),
            spec: Some(spec(cmdline)),
            arbiter: "storage".into(),
            storage: self.storage().display().to_string(),
        };
        Ok(self.client.prepare(request).await?.into_inner().prepare_us)
    }

    /// Boots the guest.
    pub async fn activate(&mut self, vm: &str, epoch: u64) -> Result<v1::ActivateReply, Status> {
        self.activate_from(vm, epoch, &[]).await
    }

    /// Lets the guest go on from the state file with this hash.
    pub async fn activate_from(
        &mut self,
        vm: &str,
        epoch: u64,
        hash: &[u8],
    ) -> Result<v1::ActivateReply, Status> {
        let (order, state_hash) = (order(vm, epoch), hash.to_vec());
        let request = v1::ActivateRequest { order, lock_wait_ms: 0, state_hash };
        Ok(self.client.activate(request).await?.into_inner())
    }

    pub async fn seal(&mut self, vm: &str, epoch: u64) -> Result<v1::SealReply, Status> {
        let storage = self.storage().display().to_string();
        let request = v1::SealRequest { order: order(vm, epoch), storage };
        Ok(self.client.seal(request).await?.into_inner())
    }

    pub async fn release(&mut self, vm: &str, epoch: u64) -> Result<v1::ReleaseReply, Status> {
        let request = v1::ReleaseRequest { order: order(vm, epoch) };
        Ok(self.client.release(request).await?.into_inner())
    }

    /// A VM that runs, and that the controller knows to run.
    pub async fn running(&mut self, vm: &str, epoch: u64, cmdline: &str) {
        self.prepare(vm, epoch, cmdline).await.unwrap();
        self.activate(vm, epoch).await.unwrap();
        self.until_state(vm, "running").await;
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        let homes = std::fs::read_dir(self.runtime().join("vms"));
        for home in homes.into_iter().flatten().flatten() {
            for pid in find_by_socket(&home.path().join("api.sock")).unwrap_or_default() {
                kill(pid);
            }
        }
    }
}

pub fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

pub fn new_vm() -> String {
    uuid::Uuid::now_v7().to_string()
}

pub fn order(vm: &str, epoch: u64) -> Option<v1::Order> {
    order_of(vm, epoch, 5)
}

pub fn order_of(vm: &str, epoch: u64, term: u64) -> Option<v1::Order> {
    Some(v1::Order { term, task: 3, vm_id: vm.into(), epoch, boot_id: boot_id(FIRST_BOOT) })
}

/// The boot in which a lab begins; orders are meant for it unless a test says otherwise.
pub const FIRST_BOOT: u128 = 1;

pub fn boot_id(boot: u128) -> String {
    uuid::Uuid::from_u128(boot).to_string()
}

pub fn spec(cmdline: &str) -> v1::VmSpec {
    v1::VmSpec {
        name: "web-1".into(),
        vcpus: 1,
        memory_mib: 64,
        kernel: "/k".into(),
        cmdline: cmdline.into(),
        restart: "restart".into(),
        ..v1::VmSpec::default()
    }
}

async fn serve(ca: &Ca, controller: Controller) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = server_config(&files(ca, Role::Controller, 1, "c1"), API_PORT_ROLES).unwrap();
    let incoming = serve_tls(listener, tls, ServeLimits::default());
    let server = tonic::transport::Server::builder()
        .add_service(NodesServer::new(controller))
        .serve_with_incoming(incoming);
    tokio::spawn(server);
    address
}

fn agent_client(address: SocketAddr, files: &IdentityFiles) -> AgentClient<Channel> {
    let tls = client_config(files).unwrap();
    AgentClient::new(connect_channel(address, tls, ServerIdentity::Agent(NODE)))
}
