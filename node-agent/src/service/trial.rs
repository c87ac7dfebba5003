//! Trials of the shared storage, for `bell cluster validate`.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use bellwether_claim::trial::{self, Sight, Trial, trial_path};
use bellwether_proto::v1;
use bellwether_types::ClusterId;
use futures::Stream;
use futures::stream;
use tokio::sync::mpsc;
use tonic::Status;
use uuid::Uuid;

use crate::{clock, storage};

/// A caller that neither hangs up nor goes on is gone.
const HOLD_MAX: Duration = Duration::from_secs(30);
/// What the storage may take to answer.
const STORAGE_MAX: Duration = Duration::from_secs(10);

/// Which trial, on which storage.
struct Place {
    storage: PathBuf,
    file: PathBuf,
    remove: bool,
}

impl TryFrom<v1::TrialRequest> for Place {
    type Error = Status;

    fn try_from(request: v1::TrialRequest) -> Result<Self, Status> {
        // The name of a file comes from it, so it has to be a UUID and nothing else.
        let id = Uuid::parse_str(&request.trial)
            .map_err(|error| Status::invalid_argument(format!("`trial`: {error}")))?;
        let storage = PathBuf::from(request.storage);
        Ok(Self { file: trial_path(&storage, id), storage, remove: request.remove })
    }
}

/// Holds the file's lock until the caller drops the stream.
pub async fn hold(
    request: v1::TrialRequest,
    cluster: ClusterId,
) -> Result<impl Stream<Item = Result<v1::TrialHeld, Status>>, Status> {
    let place = Place::try_from(request)?;
    let begun = Instant::now();
    let word = Uuid::new_v4();
    let held = on_storage(place, cluster, move |place| {
        trial::sweep(&place.storage, SystemTime::now())?;
        Trial::begin(&place.file, word)
    })
    .await?;
    let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let told = sender.send(Ok(v1::TrialHeld { word: word.to_string(), took_us })).await;
        if told.is_ok() {
            let _hung_up = tokio::time::timeout(HOLD_MAX, sender.closed()).await;
        }
        // To unlock is to ask the storage.
        let _let_go = tokio::task::spawn_blocking(move || drop(held)).await;
    });
    Ok(stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|item| (item, receiver))
    }))
}

pub async fn look(request: v1::TrialRequest, cluster: ClusterId) -> Result<v1::TrialSight, Status> {
    let place = Place::try_from(request)?;
    let seen = on_storage(place, cluster, |place| {
        let seen = trial::look(&place.file)?;
        if place.remove {
            std::fs::remove_file(&place.file)?;
        }
        Ok(seen)
    });
    let Sight { word, locked } = seen.await?;
    Ok(v1::TrialSight { word: word.to_string(), locked, wall_ms: clock::wall_ms() })
}

/// Checks the storage as before a start, and then does something with it, in a thread that it may block.
async fn on_storage<T: Send + 'static>(
    place: Place,
    cluster: ClusterId,
    work: impl FnOnce(&Place) -> std::io::Result<T> + Send + 'static,
) -> Result<T, Status> {
    let path = place.storage.display().to_string();
    let tried = tokio::task::spawn_blocking(move || {
        storage::require_dirs(&place.storage, cluster)
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        work(&place).map_err(|error| {
            let text = format!("{}: {error}", place.file.display());
            match error.kind() {
                std::io::ErrorKind::NotFound => Status::not_found(text),
                _ => Status::failed_precondition(text),
            }
        })
    });
    match tokio::time::timeout(STORAGE_MAX, tried).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => Err(Status::internal(error.to_string())),
        Err(_) => Err(Status::failed_precondition(format!(
            "the storage {path} has not answered for {} s; check its mount on this node",
            STORAGE_MAX.as_secs()
        ))),
    }
}
