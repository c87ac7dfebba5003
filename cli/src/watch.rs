//! Waiting for tasks: following each one through changes of the leader until it has ended.

use std::time::Duration;

use bellwether_member::CallFailure;
use bellwether_proto::v1;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status};

use crate::client::{Client, Cluster, ROUND_PAUSE};
use crate::exit::{Exit, Failure, Subject};
use crate::output::Progress;

/// How long no controller may be heard before the watcher gives up. The task goes on without it.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Updates wait here while the terminal is slow.
const UPDATES_MAX: usize = 64;

/// Whether a task has ended.
pub fn has_ended(task: &v1::Task) -> bool {
    task.outcome != "running"
}

/// Shows the tasks' steps until all have ended; the ended tasks in the order of their numbers.
pub async fn wait_for_tasks(
    cluster: &Cluster,
    ids: &[u64],
    progress: &mut Progress,
) -> Result<Vec<v1::Task>, Failure> {
    let (updates, mut news) = mpsc::channel(UPDATES_MAX);
    let mut watchers = JoinSet::new();
    for &id in ids {
        let clients =
            cluster.endpoints().iter().map(|&endpoint| cluster.client(endpoint)).collect();
        watchers.spawn(watch(clients, id, cluster.deadline(), updates.clone()));
    }
    drop(updates);
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    loop {
        tokio::select! {
            update = news.recv() => match update {
                Some(task) => progress.show(&task),
                None => break,
            },
            _ = &mut interrupt => return Err(left(ids)),
        }
    }
    progress.finish();
    let mut ended = Vec::new();
    while let Some(watched) = watchers.join_next().await {
        let watched = watched.map_err(|error| {
            Failure::new(Exit::Unknown, format!("watching a task broke off: {error}"))
        })?;
        ended.push(watched?);
    }
    ended.sort_by_key(|task| task.id);
    Ok(ended)
}

fn left(ids: &[u64]) -> Failure {
    let (noun, list) = (if ids.len() == 1 { "task" } else { "tasks" }, join(ids));
    Failure::new(Exit::Unknown, format!("no longer waiting; {noun} {list} goes on by itself"))
        .remedy("`bell task list` shows how it stands")
}

fn join(ids: &[u64]) -> String {
    ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

/// Follows one task, from controller to controller.
async fn watch(
    clients: Vec<Client>,
    id: u64,
    deadline: Option<Instant>,
    updates: mpsc::Sender<v1::Task>,
) -> Result<v1::Task, Failure> {
    let mut heard = Instant::now();
    let mut reason = String::new();
    loop {
        for client in &clients {
            let followed = follow(client.clone(), id, &updates, &mut heard);
            match before(deadline, followed).await {
                Some(Ok(Some(task))) => return Ok(task),
                Some(Ok(None)) => "the controller ended the stream".clone_into(&mut reason),
                Some(Err(status)) => reason = retry_reason(id, &status)?,
                None => return Err(lost_sight(id, "time ran out")),
            }
        }
        if heard.elapsed() > SILENCE_MAX {
            return Err(lost_sight(id, &reason));
        }
        sleep(ROUND_PAUSE).await;
    }
}

/// The result, or none when the deadline has passed first.
pub async fn before<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => timeout_at(deadline, work).await.ok(),
        None => Some(work.await),
    }
}

/// Reads one stream; the task if it has ended, none if the stream has before it.
async fn follow(
    mut client: Client,
    id: u64,
    updates: &mpsc::Sender<v1::Task>,
    heard: &mut Instant,
) -> Result<Option<v1::Task>, Status> {
    let mut stream = client.watch_task(v1::TaskRequest { id }).await?.into_inner();
    let mut seen = false;
    loop {
        let message = stream.message().await;
        // A stream may be silent for as long as a step takes, so that its end is when it was last
        // heard. One that brought nothing at all was no contact.
        if seen || matches!(message, Ok(Some(_))) {
            *heard = Instant::now();
        }
        let Some(task) = message? else { return Ok(None) };
        seen = true;
        // The receiver is gone only when the command is ending.
        let _ = updates.send(task.clone()).await;
        if has_ended(&task) {
            return Ok(Some(task));
        }
    }
}

/// Why to try again, or the failure if trying again cannot help.
fn retry_reason(id: u64, status: &Status) -> Result<String, Failure> {
    match CallFailure::of(status) {
        CallFailure::NotConnected(reason)
        | CallFailure::ServerRefused(reason)
        | CallFailure::NotStarted(reason)
        | CallFailure::Lost(reason) => Ok(reason),
        CallFailure::ClientRefused(reason) => Err(Failure::new(Exit::Forbidden, reason)),
        CallFailure::Answered => match status.code() {
            Code::NotFound | Code::PermissionDenied | Code::Unauthenticated => {
                Err(Failure::from_status(&format!("watch task {id}"), &Subject::Task(id), status))
            }
            _ => Ok(status.message().to_owned()),
        },
    }
}

fn lost_sight(id: u64, reason: &str) -> Failure {
    Failure::new(
        Exit::Unknown,
        format!("task {id} goes on, but this command cannot follow it: {reason}"),
    )
    .remedy(format!("see how it ended with `bell task show {id}`"))
}
