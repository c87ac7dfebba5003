//! The console stream: the ring first, then what comes; input goes to the guest.

use std::sync::Arc;
use std::time::Duration;

use bellwether_proto::v1::{ConsoleInput, ConsoleOutput};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::devices::serial::Serial;

/// The most output in one message.
const CHUNK_BYTES: usize = 16 * 1024;
/// Messages that wait for a slow reader; then the ring absorbs, and at last drops.
pub const QUEUE: usize = 4;
/// How often input that the guest did not take is offered again, and how many times.
const INPUT_RETRY: Duration = Duration::from_millis(10);
const INPUT_RETRIES_MAX: u32 = 500;

/// Sends output until the reader goes away.
pub async fn send_output(serial: Arc<Serial>, to: mpsc::Sender<Result<ConsoleOutput, Status>>) {
    let console = serial.console();
    let mut written = console.watch();
    let mut position = 0;
    loop {
        written.mark_unchanged();
        let chunk = console.read(position, CHUNK_BYTES);
        position = chunk.next;
        if chunk.bytes.is_empty() {
            tokio::select! {
                changed = written.changed() => if changed.is_err() { return },
                () = to.closed() => return,
            }
            continue;
        }
        let output = ConsoleOutput { data: chunk.bytes, dropped: chunk.dropped };
        if to.send(Ok(output)).await.is_err() {
            return;
        }
    }
}

/// Gives input to the guest until the writer ends; a guest that takes none loses it.
pub async fn take_input(serial: Arc<Serial>, mut from: Streaming<ConsoleInput>) {
    while let Ok(Some(input)) = from.message().await {
        let mut rest = &input.data[..];
        for _ in 0..INPUT_RETRIES_MAX {
            rest = &rest[serial.input(rest)..];
            if rest.is_empty() {
                break;
            }
            tokio::time::sleep(INPUT_RETRY).await;
        }
        if !rest.is_empty() {
            tracing::warn!(bytes = rest.len(), "the guest takes no console input; it is dropped");
        }
    }
}
