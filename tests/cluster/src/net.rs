//! Loopback addresses for a cluster: Linux answers on all of 127/8, so every node gets its own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Result, bail};

/// What a node may listen on.
pub const API_PORT: u16 = 7400;
pub const RAFT_PORT: u16 = 7401;
pub const JOIN_PORT: u16 = 7402;
pub const AGENT_PORT: u16 = 7410;
const PORTS: [u16; 4] = [API_PORT, RAFT_PORT, JOIN_PORT, AGENT_PORT];

/// A chosen range is taken by another cluster at the same time about once in 40,000 runs.
const TRIES: usize = 50;

/// A network `127.a.b.0` on which the ports of the first `nodes` addresses are free.
#[derive(Clone, Copy, Debug)]
pub struct Subnet {
    a: u8,
    b: u8,
}

impl Subnet {
    pub fn choose(nodes: usize) -> Result<Self> {
        for _ in 0..TRIES {
            let random = uuid::Uuid::new_v4();
            let [a, b, ..] = *random.as_bytes();
            let subnet = Self { a: 64 + a % 180, b: 1 + b % 250 };
            if (1..=nodes).all(|node| subnet.is_free(node)) {
                return Ok(subnet);
            }
        }
        bail!("found no 127.a.b.0 network with the ports {PORTS:?} free in {TRIES} tries")
    }

    /// The address of a node, counted from 1.
    pub fn address(self, node: usize) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(127, self.a, self.b, node as u8))
    }

    fn is_free(self, node: usize) -> bool {
        let address = self.address(node);
        PORTS.iter().all(|port| TcpListener::bind(SocketAddr::new(address, *port)).is_ok())
    }
}
