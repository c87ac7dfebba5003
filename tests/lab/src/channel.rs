//! The lab's end of the control channel of one host, and what is heard on it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::supply::Panel;
use crate::timeline::Timeline;
use crate::watch::Watch;
use crate::wire::{FromHost, Outcome, ToHost};

/// How much later than the program's own limit its answer may come: hosts here are slow.
const ANSWER_GRACE: Duration = Duration::from_secs(10);

/// Where it goes what is heard from hosts.
#[derive(Clone)]
pub struct Heard {
    pub timeline: Timeline,
    pub watch: Watch,
    pub panel: Panel,
}

#[derive(Clone)]
pub struct Channel {
    shared: Arc<Shared>,
}

struct Shared {
    host: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stream: Option<UnixStream>,
    /// Of the agent that said hello last.
    boot_id: Option<String>,
    next_id: u64,
    answers: BTreeMap<u64, Outcome>,
}

impl Channel {
    /// Listens for the machine, which connects whenever it is switched on.
    pub fn listen(host: &str, socket: &Path, heard: Heard) -> Result<Self> {
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("listen on {}", socket.display()))?;
        let shared =
            Shared { host: host.to_owned(), state: Mutex::default(), changed: Condvar::new() };
        let channel = Self { shared: Arc::new(shared) };
        let own = channel.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                own.connected(&stream);
                own.read(stream, &heard);
                own.disconnected();
            }
        });
        Ok(channel)
    }

    /// The boot of the host whose agent is there.
    pub fn boot_id(&self) -> Option<String> {
        self.lock().boot_id.clone()
    }

    /// Forgets the agent of the boot before: the next one says hello anew.
    pub fn forget_boot(&self) {
        self.lock().boot_id = None;
    }

    /// Waits for the agent of a boot.
    pub fn await_boot(&self, limit: Duration) -> Option<String> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.boot_id.is_some() || left.is_zero() {
                return state.boot_id.clone();
            }
            state = self.wait(state, left);
        }
    }

    /// Runs a program in the host.
    pub fn run(&self, argv: &[&str], input: &str, limit: Duration) -> Result<Outcome> {
        let id = self.send(argv, input, limit)?;
        self.answer(id, limit + ANSWER_GRACE)
            .with_context(|| format!("{} did not answer `{}`", self.shared.host, argv.join(" ")))
    }

    /// Starts a program in the host and does not wait for its end.
    pub fn begin(&self, argv: &[&str], limit: Duration) -> Result<()> {
        self.send(argv, "", limit).map(drop)
    }

    fn send(&self, argv: &[&str], input: &str, limit: Duration) -> Result<u64> {
        let argv: Vec<String> = argv.iter().map(|&word| word.to_owned()).collect();
        let line = argv.join(" ");
        let host = &self.shared.host;
        let mut state = self.lock();
        let id = state.next_id;
        state.next_id += 1;
        let limit_ms = limit.as_millis() as u64;
        let request = ToHost::Run { id, argv, input: input.to_owned(), limit_ms };
        drop(state);
        self.tell(&request).with_context(|| format!("run `{line}` in {host}"))?;
        Ok(id)
    }

    fn tell(&self, message: &ToHost) -> Result<()> {
        let mut text = serde_json::to_string(message)?;
        text.push('\n');
        let stream = self.lock().stream.as_ref().map(UnixStream::try_clone);
        let mut stream = stream.context("it is switched off")??;
        Ok(stream.write_all(text.as_bytes())?)
    }

    /// Waits until the agent of this boot is gone.
    pub fn await_end(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        let before = state.boot_id.clone();
        while state.boot_id == before {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.wait(state, left);
        }
        true
    }

    fn answer(&self, id: u64, limit: Duration) -> Option<Outcome> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(outcome) = state.answers.remove(&id) {
                return Some(outcome);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.stream.is_none() {
                return None;
            }
            state = self.wait(state, left);
        }
    }

    fn connected(&self, stream: &UnixStream) {
        self.lock().stream = stream.try_clone().ok();
    }

    fn disconnected(&self) {
        let mut state = self.lock();
        state.stream = None;
        state.boot_id = None;
        state.answers.clear();
        self.shared.changed.notify_all();
    }

    fn read(&self, stream: UnixStream, heard: &Heard) {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(FromHost::Guest { vm_id, epoch, line }) => {
                    let host = &self.shared.host;
                    heard.watch.take(host, &vm_id, epoch, &line, &heard.timeline);
                }
                Ok(FromHost::Hello { boot_id }) => self.change(|s| s.boot_id = Some(boot_id)),
                Ok(FromHost::Done { id, outcome }) => {
                    self.change(|s| drop(s.answers.insert(id, outcome)));
                }
                Ok(FromHost::Power { id, host, action }) => {
                    if let Some((code, text)) = heard.panel.ask(&host, &action, &heard.timeline) {
                        // A host that goes down meanwhile needs no answer.
                        let _ = self.tell(&ToHost::Power { id, code, text });
                    }
                }
                // A reset in the middle of a line.
                Err(error) => {
                    heard.timeline.note(&self.shared.host, &format!("lab channel: {error}"));
                }
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.shared.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, left: Duration) -> MutexGuard<'a, State> {
        let (state, _) =
            self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        state
    }
}
