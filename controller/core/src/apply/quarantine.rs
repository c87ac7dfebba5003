//! Nodes that are lost again and again get no new VMs for a time.
//!
//! ```text
//!   free --- lost N times within the window ---> quarantined --- its time passes ---> free
//!                                                      \-------- a person ----------/
//! ```
//!
//! At most a quarter of the nodes is in quarantine at a time: a fault of the network that all of
//! them share must not leave the cluster without nodes. VMs that run on the node stay there.

use bellwether_types::NodeId;

use super::{About, Applied};
use crate::command::{Outcome, Rejection};
use crate::state::{Level, State};

impl State {
    /// Counts that a node was lost, and puts it into quarantine if that was too often.
    pub(super) fn count_loss(&mut self, at: u64, id: NodeId) {
        let settings = self.settings;
        let limit = usize::try_from(settings.quarantine_exits).unwrap_or(usize::MAX);
        let window = settings.quarantine_window_s * 1_000;
        let quarantined = self.nodes.values().filter(|n| n.quarantined_until.is_some()).count();
        let room = (quarantined + 1) * 4 <= self.nodes.len();
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.losses.retain(|lost| at.saturating_sub(*lost) < window);
        node.losses.push(at);
        if limit == 0 || node.losses.len() < limit || node.quarantined_until.is_some() {
            // More than the limit are never asked for.
            let surplus = node.losses.len().saturating_sub(limit.max(1));
            node.losses.drain(..surplus);
            return;
        }
        let (name, times) = (node.name.clone(), node.losses.len());
        let lost =
            format!("{name} was lost {times} times within {} s", settings.quarantine_window_s);
        let text = match room {
            true => {
                node.quarantined_until = Some(at + settings.quarantine_s * 1_000);
                format!(
                    "{lost}: it gets no new VMs for {} s; `bell node unquarantine {name}` ends that",
                    settings.quarantine_s
                )
            }
            false => format!("{lost}; it is not quarantined, a quarter of the nodes is the most"),
        };
        self.event(at, Level::Error, About::node(&name), text);
    }

    pub(super) fn lift_quarantine(&mut self, at: u64, id: NodeId, by: &str) -> Applied {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Err(Rejection::not_found(format!("there is no node {id}")));
        };
        if node.quarantined_until.take().is_none() {
            return Ok(Outcome::Unchanged);
        }
        // What led to this quarantine must not lead to the next one.
        node.losses.clear();
        let name = node.name.clone();
        let text = match by {
            crate::reconcile::BY_CLUSTER => format!("the quarantine of {name} is over"),
            person => format!("{person} ended the quarantine of {name}"),
        };
        self.event(at, Level::Info, About::node(&name), text);
        Ok(Outcome::Done)
    }
}
