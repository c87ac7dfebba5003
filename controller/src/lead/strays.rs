//! Clears away incarnations that nobody counts on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bellwether_core::reconcile::{Stray, strays};
use bellwether_core::state::Node;
use bellwether_proto::v1;
use bellwether_types::TaskId;
use tokio::task::JoinSet;
use tonic::Status;

use super::{Leadership, orders};
use crate::controller::Controller;

/// How long a release may take.
const RELEASE: Duration = Duration::from_secs(15);

/// Releases that are under way. They end with the leadership whose term they carry.
#[derive(Default)]
pub struct Strays {
    under_way: BTreeSet<Stray>,
    releases: JoinSet<Stray>,
}

impl Strays {
    /// Orders the release of every stray that is not being released already.
    pub fn clear(&mut self, controller: &Arc<Controller>, leadership: Leadership) {
        while let Some(ended) = self.releases.try_join_next() {
            match ended {
                Ok(stray) => drop(self.under_way.remove(&stray)),
                Err(error) => {
                    tracing::error!(%error, "the release of a stray panicked");
                    // Which one it was is not told. To order the others twice does no harm.
                    self.under_way.clear();
                }
            }
        }
        let found = strays(&controller.state(), &controller.observed());
        for stray in found {
            if self.under_way.insert(stray) {
                let controller = Arc::clone(controller);
                self.releases.spawn(async move {
                    release(&controller, leadership, stray).await;
                    stray
                });
            }
        }
    }
}

async fn order_release(
    controller: &Controller,
    leadership: Leadership,
    stray: Stray,
    node: &Node,
) -> Result<(), Status> {
    let order = orders::order(leadership.term, TaskId(0), stray.vm, stray.epoch, node);
    let order = order.map_err(Status::unavailable)?;
    let mut request = tonic::Request::new(v1::ReleaseRequest { order: Some(order) });
    request.set_timeout(RELEASE);
    let mut agent = controller.links.agent(node).map_err(Status::unavailable)?;
    agent.release(request).await.map(drop)
}

async fn release(controller: &Controller, leadership: Leadership, stray: Stray) {
    let node = controller.state().nodes.get(&stray.node).cloned();
    let Some(node) = node.filter(Node::is_online) else {
        return tokio::time::sleep(RELEASE / 15).await;
    };
    let released = order_release(controller, leadership, stray, &node).await;
    let (node, vm, epoch) = (stray.node.0, stray.vm, stray.epoch.0);
    match released {
        Ok(()) => {
            tracing::info!(node_id = node, vm_id = %vm, epoch, "a stray was released");
            // The next report would name it again if it was taken before the release.
            controller.note(|observed| {
                if let Some(report) = observed.nodes.get_mut(&stray.node) {
                    report.vms.retain(|seen| seen.vm != vm || seen.epoch != stray.epoch);
                }
            });
        }
        Err(status) => {
            tracing::warn!(node_id = node, vm_id = %vm, epoch, %status, "a stray was not released");
            tokio::time::sleep(RELEASE / 15).await;
        }
    }
}
