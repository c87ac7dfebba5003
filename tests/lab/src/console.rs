//! The serial console of a host: what it says goes into the timeline, and to whoever looks on.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use crate::timeline::Timeline;

/// Pieces that wait for somebody who reads slowly; then he misses some.
const WAITING_MAX: usize = 1024;
/// A line that is longer is cut there.
const LINE_BYTES_MAX: usize = 4096;

/// Both directions of one console. It outlives its machine, as a cable does.
#[derive(Clone, Default)]
pub struct Console {
    ends: Arc<Mutex<Ends>>,
}

#[derive(Default)]
struct Ends {
    machine: Option<UnixStream>,
    onlookers: Vec<SyncSender<Vec<u8>>>,
}

impl Console {
    /// Listens for the machine, which connects whenever it is switched on.
    pub fn listen(host: &str, socket: &Path, timeline: &Timeline) -> Result<Self> {
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("listen on {}", socket.display()))?;
        let console = Self::default();
        let (own, host, timeline) = (console.clone(), host.to_owned(), timeline.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                own.lock().machine = stream.try_clone().ok();
                own.follow(stream, &host, &timeline);
                own.lock().machine = None;
            }
        });
        Ok(console)
    }

    /// What the host says from now on, as it comes.
    pub fn look_on(&self) -> Receiver<Vec<u8>> {
        let (sender, receiver) = sync_channel(WAITING_MAX);
        self.lock().onlookers.push(sender);
        receiver
    }

    /// Types at the console. Nobody reads it while the machine is off.
    pub fn type_in(&self, bytes: &[u8]) -> Result<()> {
        let machine = self.lock().machine.as_ref().map(UnixStream::try_clone);
        let mut machine = machine.context("the machine is off")??;
        machine.write_all(bytes).context("write to the console")
    }

    fn follow(&self, mut stream: UnixStream, host: &str, timeline: &Timeline) {
        let mut line = Vec::new();
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut piece) {
            let piece = &piece[..count];
            // Who has gone, or is too slow, is none of the host's business.
            self.lock().onlookers.retain(|onlooker| !is_gone(onlooker, piece));
            for &byte in piece {
                match byte {
                    b'\n' => note_line(&mut line, host, timeline),
                    byte if line.len() < LINE_BYTES_MAX => line.push(byte),
                    _ => {}
                }
            }
        }
        note_line(&mut line, host, timeline);
    }

    fn lock(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_gone(onlooker: &SyncSender<Vec<u8>>, piece: &[u8]) -> bool {
    matches!(onlooker.try_send(piece.to_vec()), Err(std::sync::mpsc::TrySendError::Disconnected(_)))
}

fn note_line(line: &mut Vec<u8>, host: &str, timeline: &Timeline) {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end();
    if !text.is_empty() {
        timeline.note(host, text);
    }
    line.clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_says_is_noted_by_line_and_shown_as_it_comes() {
        let directory = std::env::temp_dir().join(format!("bw-console-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&directory).unwrap();
        let timeline = Timeline::create(&directory.join("timeline")).unwrap();
        let socket = directory.join("console");
        let console = Console::listen("node1", &socket, &timeline).unwrap();
        let heard = console.look_on();
        let mut machine = UnixStream::connect(&socket).unwrap();
        machine.write_all(b"login: ").unwrap();
        assert_eq!(heard.recv().unwrap(), b"login: ");
        machine.write_all(b"root\r\nbye").unwrap();
        while console.type_in(b"ls\n").is_err() {}
        let mut typed = [0; 3];
        machine.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"ls\n");
        drop(machine);
        let text = loop {
            let text = std::fs::read_to_string(timeline.path()).unwrap();
            if text.lines().count() == 2 {
                break text;
            }
        };
        assert!(text.contains("login: root\n") && text.ends_with("bye\n"), "{text}");
        std::fs::remove_dir_all(directory).unwrap();
    }
}
