//! Some controllers in one process, over real connections on loopback, without TLS.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

use super::gate::{Gate, connect};
use crate::testing::{PATIENCE, command, first_missing, soon};
use crate::{ControllerNode, RaftConfig, RaftHandle, RaftStatus};

type Gates = Arc<Mutex<BTreeMap<u64, Gate>>>;

pub struct Member {
    pub handle: RaftHandle,
    pub node: ControllerNode,
    server: JoinHandle<()>,
}

pub struct Cluster {
    pub members: BTreeMap<u64, Member>,
    dirs: BTreeMap<u64, TempDir>,
    gates: Gates,
    tune: fn(&mut RaftConfig),
}

impl Cluster {
    pub fn new(tune: fn(&mut RaftConfig)) -> Self {
        let (members, dirs, gates) = Default::default();
        Self { members, dirs, gates, tune }
    }

    /// A group of this many voters, led by controller 1.
    pub async fn of(size: u64, tune: fn(&mut RaftConfig)) -> Self {
        let mut cluster = Self::new(tune);
        cluster.start(1).await;
        cluster[1].initialize_single(cluster.members[&1].node.clone()).await.unwrap();
        soon("the first election", cluster.leader_among(&[1])).await;
        for id in 2..=size {
            cluster.start(id).await;
            let node = cluster.members[&id].node.clone();
            cluster[1].add_voter(id, node).await.unwrap();
        }
        cluster
    }

    /// Starts a controller, on a new port, with what its directory holds.
    pub async fn start(&mut self, id: u64) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        self.start_on(id, listener, port).await;
    }

    /// Starts a controller again where the others know it.
    pub async fn restart(&mut self, id: u64, node: &ControllerNode) {
        let address = SocketAddr::from(([127, 0, 0, 1], node.raft_port));
        let listener = TcpListener::bind(address).await.unwrap();
        self.start_on(id, listener, node.raft_port).await;
    }

    async fn start_on(&mut self, id: u64, listener: TcpListener, port: u16) {
        let dir = self.dirs.entry(id).or_insert_with(|| tempfile::tempdir().unwrap());
        let mut config = RaftConfig::new(id, dir.path());
        (self.tune)(&mut config);
        let gates = Arc::clone(&self.gates);
        let connector = move |to: u64, node: ControllerNode| {
            let gates = [gate(&gates, id), gate(&gates, to)];
            connect(SocketAddr::from(([127, 0, 0, 1], node.raft_port)), gates)
        };
        let handle = RaftHandle::start(config, connector).await.unwrap();
        let service = handle.service().into_server();
        let server = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        let node = ControllerNode {
            name: format!("host-{id}"),
            address: "127.0.0.1".into(),
            raft_port: port,
            ..ControllerNode::default()
        };
        self.members.insert(id, Member { handle, node, server });
    }

    /// Cuts a controller off from all the others, or lets it back.
    pub fn isolate(&self, id: u64, cut: bool) {
        gate(&self.gates, id).store(cut, Ordering::SeqCst);
    }

    /// Ends a controller without a word to the others.
    pub async fn kill(&mut self, id: u64) -> ControllerNode {
        self.isolate(id, true);
        let member = self.members.remove(&id).unwrap();
        member.handle.shutdown().await.unwrap();
        member.server.abort();
        // The port is free once the task is gone.
        assert!(soon("the server's end", member.server).await.is_err());
        self.isolate(id, false);
        member.node
    }

    /// Waits until all of these agree that one of them leads, and returns it.
    pub async fn leader_among(&self, ids: &[u64]) -> u64 {
        let mut watches: Vec<_> = ids.iter().map(|id| self[*id].watch_status()).collect();
        loop {
            let mut seen = Vec::new();
            for watch in &mut watches {
                let leads = |status: &RaftStatus| {
                    status.leader.as_ref().is_some_and(|(leader, _)| ids.contains(leader))
                };
                let status = soon("a leader", watch.wait_for(leads)).await.unwrap();
                seen.push((status.term, status.leader.unwrap().0));
            }
            if seen.iter().all(|leader| *leader == seen[0]) && self[seen[0].1].status().is_leader()
            {
                return seen[0].1;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Commits commands on one controller.
    pub async fn propose(&self, on: u64, numbers: std::ops::Range<u64>) {
        for number in numbers {
            self[on].propose(command(number)).await.unwrap();
        }
    }

    /// Waits until a controller has applied commands.
    pub async fn applied(&self, on: u64, numbers: std::ops::Range<u64>) {
        let mut views = self[on].watch_state();
        let all = views.wait_for(|view| first_missing(view, numbers.clone()).is_none());
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            let missing = first_missing(&self[on].view(), numbers);
            panic!("controller {on} lacks {missing:?}: {:?}", self[on].status());
        }
    }
}

fn gate(gates: &Gates, id: u64) -> Gate {
    Arc::clone(gates.lock().unwrap().entry(id).or_default())
}

impl std::ops::Index<u64> for Cluster {
    type Output = RaftHandle;

    fn index(&self, id: u64) -> &RaftHandle {
        &self.members[&id].handle
    }
}
