//! Lets controllers that have joined vote.

use std::sync::Arc;
use std::time::Duration;

use bellwether_core::Member;
use bellwether_raft::RaftHandle;

use crate::controller::Controller;
use crate::serve::controller_node;

/// The pause between two rounds when a newcomer is not up yet.
const PAUSE: Duration = Duration::from_millis(500);

/// Adds every controller that the state knows to the Raft group, one after the other. A newcomer
/// is a learner until it has the log, so that the quorum never waits for one that has nothing.
pub async fn keep(controller: Arc<Controller>) {
    let mut states = controller.raft.watch_state();
    let mut last = 0;
    loop {
        match missing(&controller, last) {
            None => {
                if states.changed().await.is_err() {
                    return;
                }
            }
            Some(member) => {
                last = member.id;
                admit(controller.raft.clone(), member).await;
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// The next controller after `last` that does not vote, in a circle: one that never comes up must
/// not keep the others waiting.
fn missing(controller: &Controller, last: u64) -> Option<Member> {
    let status = controller.raft.status();
    let state = controller.state();
    let after = state.controllers.range(last + 1..).chain(state.controllers.range(..=last));
    let mut members = after.map(|(_, member)| member);
    members.find(|member| !status.voters.contains_key(&member.id)).cloned()
}

async fn admit(raft: RaftHandle, member: Member) {
    let node = controller_node(&member);
    // A learner that is not up yet would hold up the wait, and with it every other newcomer.
    match tokio::time::timeout(PAUSE * 10, raft.add_voter(member.id, node)).await {
        Ok(Ok(())) => tracing::info!(node_id = member.id, name = member.name, "votes from now on"),
        Ok(Err(error)) => tracing::debug!(node_id = member.id, %error, "does not vote yet"),
        Err(_) => tracing::debug!(node_id = member.id, "does not vote yet: it is not up"),
    }
}
