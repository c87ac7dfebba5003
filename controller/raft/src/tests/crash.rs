//! A controller process that is killed in the middle of its writes.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};

use crate::testing::{command, first_missing, soon};
use crate::{ConnectError, ControllerNode, RaftConfig, RaftHandle};

/// Where the child works; without it, the child's test is no test.
const DIRECTORY: &str = "BELLWETHER_RAFT_CRASH_DIR";
const ROUNDS: u64 = 3;
const PER_ROUND: usize = 60;
/// Commands that are on their way at the same time.
const LANES: u64 = 4;

async fn alone(dir: PathBuf) -> RaftHandle {
    let connector = |_: u64, _: ControllerNode| async {
        Err::<_, ConnectError>("this controller is alone".into())
    };
    RaftHandle::start(RaftConfig::new(1, dir), connector).await.unwrap()
}

async fn lead(handle: &RaftHandle) {
    let mut status = handle.watch_status();
    soon("the election", status.wait_for(|status| status.is_leader())).await.unwrap();
}

/// Proposes for ever and prints what was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child of another test"]
async fn child() {
    let Some(dir) = std::env::var_os(DIRECTORY) else { return };
    let handle = alone(dir.into()).await;
    if !handle.is_initialized().await.unwrap() {
        handle.initialize_single(ControllerNode::default()).await.unwrap();
    }
    lead(&handle).await;
    let first = handle.view().state.tokens.len() as u64;
    let lanes = (0..LANES).map(|lane| {
        let handle = handle.clone();
        async move {
            for number in 0.. {
                let number = first + lane + number * LANES;
                handle.propose(command(number)).await.unwrap();
                println!("\nacknowledged {number}");
            }
        }
    });
    futures::future::join_all(lanes).await;
}

/// Runs the child until it has acknowledged enough, and kills it.
fn run_and_kill(dir: &std::path::Path) -> Vec<u64> {
    let mut child = Process::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::crash::child", "--ignored", "--nocapture"])
        .env(DIRECTORY, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let number = |line: String| line.strip_prefix("acknowledged ").map(|n| n.parse().unwrap());
    let mut acknowledged: Vec<u64> =
        lines.by_ref().map_while(Result::ok).filter_map(number).take(PER_ROUND).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    acknowledged.extend(lines.map_while(Result::ok).filter_map(number));
    assert!(acknowledged.len() >= PER_ROUND, "the child ended by itself: {acknowledged:?}");
    acknowledged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_controller_has_everything_that_it_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = Vec::new();
    for _ in 0..ROUNDS {
        let path = dir.path().to_owned();
        let round = tokio::task::spawn_blocking(move || run_and_kill(&path));
        acknowledged.extend(soon("the child's work", round).await.unwrap());
        let handle = alone(dir.path().to_owned()).await;
        lead(&handle).await;
        handle.confirm_leadership().await.unwrap();
        let view = handle.view();
        for number in &acknowledged {
            assert_eq!(first_missing(&view, *number..number + 1), None, "{number} is lost");
        }
        handle.shutdown().await.unwrap();
    }
}
