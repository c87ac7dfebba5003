//! The followers: one task per incarnation, which read its console and ask for its status.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use bellwether_proto::v1;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::StreamExt;

use super::{Shared, lock};
use crate::vmm::{self, Incarnation};

/// Between two looks for new incarnations: short against the time that a VMM needs to get ready.
const LOOK: Duration = Duration::from_millis(10);
/// Between two questions for the status.
const SAMPLE: Duration = Duration::from_millis(40);
/// Between two attempts to attach to a console that is not there yet.
const ATTACH: Duration = Duration::from_millis(10);

pub async fn follow(runtime_dirs: Vec<(usize, PathBuf)>, vm_id: String, record: Shared) {
    let mut followers = JoinSet::new();
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        for incarnation in vmm::incarnations(&runtime_dirs, &vm_id) {
            let (who, new) = lock(&record).enter(&incarnation);
            if new {
                followers.spawn(follow_one(incarnation, who, record.clone()));
            }
        }
        while followers.try_join_next().is_some() {}
    }
}

async fn follow_one(incarnation: Incarnation, who: usize, record: Shared) {
    tokio::join!(
        read_console(&incarnation.socket, who, &record),
        sample_status(&incarnation.socket, who, &record),
    );
}

/// As long as its directory is there, the VMM may come or come back.
fn may_answer(socket: &Path) -> bool {
    socket.parent().is_some_and(Path::exists)
}

async fn read_console(socket: &Path, who: usize, record: &Shared) {
    let mut reader = Reader { who, position: 0, line: Vec::new() };
    let mut pace = interval(ATTACH);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while may_answer(socket) {
        pace.tick().await;
        // An error is a VMM that has ended or has not begun: the loop's condition tells which.
        let _ = attach(socket, &mut reader, record).await;
    }
}

async fn attach(socket: &Path, reader: &mut Reader, record: &Shared) -> Result<()> {
    let mut client = vmm::connect(socket).await?;
    // The input's sender stays open, because its end would end the console.
    let (_input, receiver) = tokio::sync::mpsc::channel::<v1::ConsoleInput>(1);
    let input = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut output = client.console(input).await?.into_inner();
    // A console that is attached anew begins with what its ring still has.
    let mut position = 0;
    while let Some(frame) = output.next().await {
        let frame = frame?;
        position += frame.dropped;
        let skip = reader.position.saturating_sub(position).min(frame.data.len() as u64);
        reader.take(&frame.data[skip as usize..], record);
        position += frame.data.len() as u64;
        reader.position = reader.position.max(position);
    }
    Ok(())
}

/// Makes lines out of bytes.
struct Reader {
    who: usize,
    /// How many bytes of the console's whole output have been taken.
    position: u64,
    line: Vec<u8>,
}

impl Reader {
    fn take(&mut self, bytes: &[u8], record: &Shared) {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    let text = String::from_utf8_lossy(&self.line);
                    lock(record).hear(self.who, text.trim_end_matches('\r'));
                    self.line.clear();
                }
                byte => self.line.push(byte),
            }
        }
    }
}

async fn sample_status(socket: &Path, who: usize, record: &Shared) {
    let mut pace = interval(SAMPLE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while may_answer(socket) {
        pace.tick().await;
        let asked = Instant::now();
        let running = vmm::status(socket).await.is_ok_and(|status| status.state == "running");
        if running {
            lock(record).saw_running(who, asked, Instant::now());
        }
    }
}
