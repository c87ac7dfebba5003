//! What all owners of VMs share.

use std::sync::Arc;
use std::time::Duration;

use bellwether_types::{BootId, ClusterId, NodeId};

use crate::board::Board;
use crate::desk::Desk;
use crate::fencing::Fencing;
use crate::launch::Launcher;
use crate::runtime_dir::RuntimeDir;
use crate::terms::Terms;

/// This node: who it is, and the desks at which its VMs are handled.
#[derive(Debug)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    pub cluster: ClusterId,
    pub boot_id: BootId,
    pub runtime: Arc<RuntimeDir>,
    pub terms: Terms,
    pub launcher: Launcher,
    pub desk: Desk,
    pub fencing: Fencing,
    pub board: Board,
    pub status_interval: Duration,
    /// See `agent.toml`.
    pub patience: u32,
}

impl Node {
    /// How long a VMM may take here for what takes it at most `usual` on an ordinary host.
    pub fn allow(&self, usual: Duration) -> Duration {
        usual.saturating_mul(self.patience)
    }
}
