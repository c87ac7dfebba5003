//! Whole controllers: elections, replication, failures, restarts.

mod chaos;
mod cluster;
mod crash;
mod gate;
mod latency;
mod wire;

use std::time::Duration;

use bellwether_core::Outcome;

use self::cluster::Cluster;
use crate::testing::{command, first_missing, has, soon};
use crate::{ConfirmError, InitializeError, ProposeError, RaftConfig, Role, TransferError};

fn plain(_: &mut RaftConfig) {}

fn snapshots_every_40(config: &mut RaftConfig) {
    config.limits.snapshot_entries = 40;
    config.limits.kept_entries = 5;
}

fn impatient(config: &mut RaftConfig) {
    config.timers.propose_timeout = Duration::from_secs(3);
}

/// Handlers of the API run as tasks, so they may call only what can be sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_can_be_made_from_a_task() {
    let cluster = Cluster::of(1, plain).await;
    let (handle, node) = (cluster[1].clone(), cluster.members[&1].node.clone());
    let work = tokio::spawn(async move {
        handle.update_member(1, node.clone()).await.unwrap();
        handle.add_voter(1, node.clone()).await.unwrap();
        handle.propose(command(1)).await.unwrap();
        handle.confirm_leadership().await.unwrap();
        handle.transfer_leadership(1).await.unwrap();
        assert!(handle.remove_member(9).await.is_ok());
        assert!(handle.initialize_single(node).await.is_err());
        handle.watch_status().wait_for(|status| status.is_leader()).await.unwrap();
        handle.shutdown().await.unwrap();
        assert!(!handle.stopped().await.is_empty());
        assert!(matches!(handle.propose(command(2)).await, Err(ProposeError::Fatal(_))));
    });
    soon("the work", work).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_controller_commits_and_shows_what_it_acknowledged() {
    let cluster = Cluster::of(1, plain).await;
    for number in 0..20 {
        assert_eq!(cluster[1].propose(command(number)).await.unwrap(), Outcome::Done);
        assert!(has(&cluster[1].view().state, number));
    }
    let confirmed = cluster[1].confirm_leadership().await.unwrap();
    assert_eq!(confirmed.term, cluster[1].status().term);
    assert!(cluster[1].view().includes(confirmed.read_index));
    let node = cluster.members[&1].node.clone();
    let again = cluster[1].initialize_single(node).await.unwrap_err();
    assert!(matches!(again, InitializeError::AlreadyInitialized));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_what_was_acknowledged_and_is_another_leadership() {
    let mut cluster = Cluster::of(1, snapshots_every_40).await;
    cluster.propose(1, 0..100).await;
    let term = cluster[1].confirm_leadership().await.unwrap().term;
    let node = cluster.kill(1).await;
    cluster.restart(1, &node).await;
    soon("the election", cluster.leader_among(&[1])).await;
    let confirmed = cluster[1].confirm_leadership().await.unwrap();
    assert!(confirmed.term > term, "{} is not after {term}", confirmed.term);
    assert_eq!(first_missing(&cluster[1].view(), 0..100), None);
    assert!(cluster[1].status().purged.is_some(), "no snapshot was taken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_controllers_replicate_and_a_follower_names_the_leader() {
    let cluster = Cluster::of(3, plain).await;
    cluster.propose(1, 0..50).await;
    for id in [1, 2, 3] {
        cluster.applied(id, 0..50).await;
        assert_eq!(cluster[id].view().state, cluster[1].view().state);
    }
    let error = cluster[2].propose(command(50)).await.unwrap_err();
    let ProposeError::NotLeader { leader: Some((leader, node)) } = error else {
        panic!("{error}");
    };
    assert_eq!((leader, node), (1, cluster.members[&1].node.clone()));
    let error = cluster[2].confirm_leadership().await.unwrap_err();
    assert!(matches!(error, ConfirmError::NotLeader { leader: Some((1, _)) }), "{error}");
    assert_eq!(cluster[1].status().voters.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_dies_and_writes_go_on() {
    let mut cluster = Cluster::of(3, plain).await;
    cluster.propose(1, 0..30).await;
    let term = cluster[1].status().term;
    let node = cluster.kill(1).await;
    let leader = soon("the next leader", cluster.leader_among(&[2, 3])).await;
    cluster.propose(leader, 30..60).await;
    assert_eq!(first_missing(&cluster[leader].view(), 0..60), None);
    assert!(cluster[leader].status().term > term);
    cluster.restart(1, &node).await;
    cluster.applied(1, 0..60).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_lags_catches_up_through_a_snapshot() {
    let mut cluster = Cluster::of(3, snapshots_every_40).await;
    cluster.propose(1, 0..10).await;
    cluster.applied(3, 0..10).await;
    let node = cluster.kill(3).await;
    cluster.propose(1, 10..300).await;
    let mut status = cluster[1].watch_status();
    soon("the purge", status.wait_for(|s| s.purged > Some(100))).await.unwrap();
    cluster.restart(3, &node).await;
    cluster.applied(3, 0..300).await;
    assert!(cluster[3].status().snapshot > Some(100), "{:?}", cluster[3].status());
    cluster.propose(1, 300..310).await;
    cluster.applied(3, 0..310).await;
    assert_eq!(cluster[3].view().state, cluster[1].view().state);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolated_leader_confirms_nothing_and_its_writes_are_unknown() {
    let cluster = Cluster::of(3, impatient).await;
    cluster.propose(1, 0..5).await;
    let old = cluster[1].confirm_leadership().await.unwrap();
    cluster.isolate(1, true);
    assert!(cluster[1].status().is_leader(), "it cannot know yet");
    let error = cluster[1].confirm_leadership().await.unwrap_err();
    assert!(
        matches!(error, ConfirmError::NoQuorum { .. } | ConfirmError::NotLeader { .. }),
        "{error}"
    );
    let leader = soon("the next leader", cluster.leader_among(&[2, 3])).await;
    let new = cluster[leader].confirm_leadership().await.unwrap();
    assert!(new.term > old.term);
    assert!(cluster[1].confirm_leadership().await.is_err());
    assert!(cluster[1].propose(command(99)).await.is_err());
    cluster.propose(leader, 5..10).await;
    cluster.isolate(1, false);
    cluster.applied(1, 0..10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_a_cut_leader_took_is_unknown() {
    let cluster = Cluster::of(3, impatient).await;
    cluster.propose(1, 0..5).await;
    // At once after the cut its lease still holds, so it takes the write and cannot commit it.
    cluster.isolate(1, true);
    let error = cluster[1].propose(command(5)).await.unwrap_err();
    assert!(matches!(error, ProposeError::OutcomeUnknown { .. }), "{error}");
    assert!(error.is_outcome_unknown());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_off_follower_does_not_raise_the_term() {
    let cluster = Cluster::of(3, plain).await;
    let term = cluster[1].confirm_leadership().await.unwrap().term;
    cluster.isolate(3, true);
    let mut status = cluster[3].watch_status();
    // It misses heartbeats for several election timeouts, asks around, and gets no answer.
    let asked = status.wait_for(|status| status.role == Role::Candidate || status.term > term);
    assert!(tokio::time::timeout(Duration::from_secs(6), asked).await.is_err());
    cluster.isolate(3, false);
    cluster.propose(1, 0..5).await;
    cluster.applied(3, 0..5).await;
    assert_eq!(cluster[1].confirm_leadership().await.unwrap().term, term);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_over() {
    let cluster = Cluster::of(3, plain).await;
    cluster.propose(1, 0..5).await;
    assert!(matches!(
        cluster[1].transfer_leadership(9).await,
        Err(TransferError::NotVoter { to: 9 })
    ));
    cluster[1].transfer_leadership(3).await.unwrap();
    assert_eq!(soon("the next leader", cluster.leader_among(&[1, 2, 3])).await, 3);
    cluster.propose(3, 5..10).await;
    cluster.applied(1, 0..10).await;
    let error = cluster[1].transfer_leadership(2).await.unwrap_err();
    assert!(matches!(error, TransferError::NotLeader { leader: Some((3, _)), .. }), "{error}");
}

/// While it hands over, a leader takes no writes; it must not stay so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handover_to_nobody_ends_in_an_election() {
    let cluster = Cluster::of(3, impatient).await;
    cluster.propose(1, 0..5).await;
    cluster.isolate(3, true);
    let error = cluster[1].transfer_leadership(3).await.unwrap_err();
    assert!(matches!(error, TransferError::NotTaken { to: 3, .. }), "{error}");
    let writes = async {
        loop {
            let leader = cluster.leader_among(&[1, 2]).await;
            if cluster[leader].propose(command(5)).await.is_ok() {
                break;
            }
        }
    };
    soon("a leader that takes writes", writes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_removed_hands_over() {
    let cluster = Cluster::of(3, plain).await;
    cluster.propose(1, 0..5).await;
    cluster[1].remove_member(1).await.unwrap();
    let leader = soon("the next leader", cluster.leader_among(&[2, 3])).await;
    cluster.propose(leader, 5..10).await;
    assert!(!cluster[leader].status().voters.contains_key(&1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_moved_is_found_at_its_new_address() {
    let mut cluster = Cluster::of(3, plain).await;
    cluster.kill(3).await;
    cluster.start(3).await;
    cluster.propose(1, 0..5).await;
    let node = cluster.members[&3].node.clone();
    cluster[1].update_member(3, node.clone()).await.unwrap();
    cluster.applied(3, 0..5).await;
    let mut status = cluster[3].watch_status();
    let known = status.wait_for(|status| status.voters.get(&3) == Some(&node));
    soon("the new address", known).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_controller_votes_no_more() {
    let cluster = Cluster::of(3, plain).await;
    cluster[1].remove_member(3).await.unwrap();
    let status = cluster[1].status();
    assert_eq!(status.voters.keys().copied().collect::<Vec<_>>(), [1, 2]);
    assert!(status.learners.is_empty());
    // Two of two are the quorum now, and the third is not needed.
    cluster.isolate(3, true);
    cluster.propose(1, 0..5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_no_message_carries_is_refused() {
    let cluster = Cluster::of(1, |config| config.limits.message_bytes = (64 << 10) + 16).await;
    let error = cluster[1].propose(command(1)).await.unwrap_err();
    assert!(matches!(error, ProposeError::TooLarge { max: 16, .. }), "{error}");
    assert!(!error.is_outcome_unknown());
}
