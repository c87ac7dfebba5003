//! How long a proposal takes. `cargo nextest run -p bellwether-raft --run-ignored only latency`
//! prints it; nothing is asserted, because it is the disk that answers.

use std::time::{Duration, Instant};

use super::cluster::Cluster;
use super::plain;
use crate::testing::command;

const PROPOSALS: u64 = 500;
const TOGETHER: u64 = 64;

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!("{what}: p50 {:?} p99 {:?} max {:?}", at(50), at(99), at(100));
}

async fn measure(cluster: &Cluster, what: &str) {
    let mut times = Vec::new();
    for number in 0..PROPOSALS {
        let begun = Instant::now();
        cluster[1].propose(command(number)).await.unwrap();
        times.push(begun.elapsed());
    }
    report(&format!("{what}, one at a time"), times);

    let begun = Instant::now();
    let lanes = (0..TOGETHER).map(|lane| {
        let handle = cluster[1].clone();
        tokio::spawn(async move {
            let mut times = Vec::new();
            for number in 0..PROPOSALS / 10 {
                let begun = Instant::now();
                handle.propose(command(lane + number * TOGETHER)).await.unwrap();
                times.push(begun.elapsed());
            }
            times
        })
    });
    let times: Vec<_> = futures::future::join_all(lanes).await;
    let times: Vec<_> = times.into_iter().flat_map(Result::unwrap).collect();
    let rate = times.len() as f64 / begun.elapsed().as_secs_f64();
    report(&format!("{what}, {TOGETHER} together ({rate:.0}/s)"), times);

    let mut times = Vec::new();
    for _ in 0..PROPOSALS {
        let begun = Instant::now();
        cluster[1].confirm_leadership().await.unwrap();
        times.push(begun.elapsed());
    }
    report(&format!("{what}, confirm leadership"), times);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn latency() {
    measure(&Cluster::of(1, plain).await, "1 controller").await;
    measure(&Cluster::of(3, plain).await, "3 controllers").await;
}
