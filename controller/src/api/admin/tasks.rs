//! Tasks and events, as they are and as they go on.

use std::collections::BTreeMap;

use bellwether_core::Task;
use bellwether_core::task::Measures;
use bellwether_proto::v1;
use bellwether_raft::StateView;
use bellwether_types::TaskId;
use futures::{StreamExt, stream};
use tokio::sync::watch;
use tonic::Status;

use super::{AdminApi, BoxStream};
use crate::api::view;

impl AdminApi {
    pub(super) fn tasks(&self, all: bool) -> v1::ListTasksReply {
        let state = self.controller.state();
        let wanted = |task: &&Task| all || task.outcome.is_none();
        let tasks = state.tasks.values().filter(wanted).map(|task| view::task(&state, task));
        v1::ListTasksReply { tasks: tasks.collect() }
    }

    pub(super) fn task(&self, id: u64) -> Result<v1::Task, Status> {
        let state = self.controller.state();
        let task = state.tasks.get(&TaskId(id)).ok_or_else(|| {
            Status::not_found(format!(
                "there is no task {id}, or it ended long ago; see `bell task list --all`"
            ))
        })?;
        Ok(with_progress(view::task(&state, task), &self.controller.watch_progress().borrow()))
    }

    /// The task now and after each change, until it has ended.
    pub(super) fn watch(&self, id: u64) -> Result<BoxStream<v1::Task>, Status> {
        let first = self.task(id)?;
        let rest = stream::unfold(
            (first.clone(), self.controller.raft.watch_state(), self.controller.watch_progress()),
            move |(last, mut states, mut progress)| async move {
                if last.outcome != "running" {
                    return None;
                }
                let next = next_of(&mut states, &mut progress, id, &last).await?;
                Some((Ok(next.clone()), (next, states, progress)))
            },
        );
        Ok(Box::pin(stream::iter([Ok(first)]).chain(rest)))
    }

    pub(super) fn events(&self, request: v1::EventsRequest) -> BoxStream<v1::Event> {
        let states = self.controller.raft.watch_state();
        let start = (request.after, states, Vec::new().into_iter());
        let follow = request.follow;
        let next = move |(mut after, mut states, mut batch): Cursor| async move {
            loop {
                if let Some(event) = batch.next() {
                    let event: v1::Event = event;
                    after = event.seq;
                    return Some((Ok(event), (after, states, batch)));
                }
                let newer = events_after(&states.borrow_and_update().state, after);
                let empty = newer.is_empty();
                batch = newer.into_iter();
                if !empty {
                    continue;
                }
                if !follow || states.changed().await.is_err() {
                    return None;
                }
            }
        };
        Box::pin(stream::unfold(start, next))
    }
}

type States = watch::Receiver<StateView>;
type Progress = watch::Receiver<BTreeMap<TaskId, Measures>>;
/// The last event that was sent, where news come from, and what is still to be sent.
type Cursor = (u64, States, std::vec::IntoIter<v1::Event>);

/// The task when it no longer is what it was; none when it is forgotten.
async fn next_of(
    states: &mut States,
    progress: &mut Progress,
    id: u64,
    last: &v1::Task,
) -> Option<v1::Task> {
    loop {
        let task = {
            let state = &states.borrow_and_update().state;
            let task = view::task(state, state.tasks.get(&TaskId(id))?);
            with_progress(task, &progress.borrow_and_update())
        };
        if task != *last {
            return Some(task);
        }
        tokio::select! {
            changed = states.changed() => changed.ok()?,
            changed = progress.changed() => changed.ok()?,
        }
    }
}

/// A task that is under way, with how far it is within its step.
fn with_progress(mut task: v1::Task, all: &BTreeMap<TaskId, Measures>) -> v1::Task {
    if let Some(progress) = all.get(&TaskId(task.id)).filter(|_| task.outcome == "running") {
        task.measures.extend(progress.clone());
    }
    task
}

fn events_after(state: &bellwether_core::State, after: u64) -> Vec<v1::Event> {
    state.events.iter().filter(|event| event.seq > after).map(view::event).collect()
}
