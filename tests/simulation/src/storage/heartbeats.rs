//! The nodes' heartbeats on the storage, and when a pulse in them has risen.

use bellwether_agent_core::Pulse;
use bellwether_types::NodeId;

use super::{IoError, Server, Storage};
use crate::kernel::{HostId, Nanos};
use crate::sync::Promise;

impl Storage {
    /// Writes a node's heartbeat, and gives the highest pulse in those of the others.
    pub async fn exchange_heartbeats(
        &self,
        host: HostId,
        node: NodeId,
        pulse: Option<Pulse>,
    ) -> Result<Option<Pulse>, IoError> {
        let promise = Promise::new(&self.kernel);
        let (answer, kernel) = (promise.clone(), self.kernel.clone());
        let whole = move |server: &mut Server| {
            answer.keep(server.check().map(|()| server.beat(node, pulse, kernel.now())));
        };
        let torn = move |server: &mut Server| {
            server.heartbeats.insert(node, None);
        };
        self.submit(host, Box::new(whole), Some(Box::new(torn)));
        promise.wait().await?;
        self.ask(host, move |server| {
            server.check()?;
            Ok(server.pulse_beside(node))
        })
        .await
    }
}

impl Server {
    fn beat(&mut self, node: NodeId, pulse: Option<Pulse>, now: Nanos) {
        let others: Vec<NodeId> =
            self.heartbeats.keys().copied().filter(|it| *it != node).collect();
        let before: Vec<_> = others.iter().map(|other| self.pulse_beside(*other)).collect();
        self.heartbeats.insert(node, pulse);
        for (other, before) in others.into_iter().zip(before) {
            if self.pulse_beside(other) > before {
                self.pulse_rose.insert(other, now);
            }
        }
    }

    /// The highest pulse in the heartbeats of all others.
    fn pulse_beside(&self, node: NodeId) -> Option<Pulse> {
        let others = self.heartbeats.iter().filter(|(other, _)| **other != node);
        others.filter_map(|(_, pulse)| *pulse).max()
    }
}
