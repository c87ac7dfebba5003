//! Connections to agents and to other controllers: made once per address, kept, shared.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bellwether_core::Node;
use bellwether_pki::{IdentityFiles, ServerIdentity, TlsError, connect_channel};
use bellwether_proto::v1::agent_client::AgentClient;
use bellwether_raft::{ConnectError, ControllerNode};
use tonic::transport::Channel;

type Tls = bellwether_pki::Reloadable<Arc<rustls::ClientConfig>>;

/// The channels of one controller.
pub struct Links {
    tls: Tls,
    open: Mutex<BTreeMap<(String, SocketAddr), Channel>>,
}

impl Links {
    pub fn new(files: &IdentityFiles) -> Result<Self, TlsError> {
        let tls = Tls::new(bellwether_pki::client_config(files)?);
        Ok(Self { tls, open: Mutex::default() })
    }

    fn channel(&self, server: ServerIdentity, addr: SocketAddr) -> Channel {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let made = || connect_channel(addr, self.tls.clone(), server);
        open.entry((server.dns_name(), addr)).or_insert_with(made).clone()
    }

    /// The agent of a node, wherever it registered from.
    pub fn agent(&self, node: &Node) -> Result<AgentClient<Channel>, String> {
        let addr = resolve(&node.address, node.agent_port)?;
        Ok(AgentClient::new(self.channel(ServerIdentity::Agent(node.id.0), addr)))
    }

    /// The API of another controller.
    pub fn api(&self, id: u64, node: &ControllerNode) -> Result<Channel, String> {
        let addr = resolve(&node.address, node.api_port)?;
        Ok(self.channel(ServerIdentity::Controller(id), addr))
    }

    /// A new connection to the Raft port of another controller.
    pub fn raft(&self, id: u64, node: &ControllerNode) -> Result<Channel, ConnectError> {
        let addr = resolve(&node.address, node.raft_port)?;
        Ok(connect_channel(addr, self.tls.clone(), ServerIdentity::Controller(id)))
    }
}

fn resolve(address: &str, port: u16) -> Result<SocketAddr, String> {
    let ip = address.parse().map_err(|_| format!("`{address}` is not an IP address"))?;
    Ok(SocketAddr::new(ip, port))
}
