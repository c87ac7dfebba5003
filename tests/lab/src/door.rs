//! The door of a lab that is up: other processes find it and ask for things.
//!
//! ```text
//! lab.json --> where the door is       Command  --> one after the other, by the thread that owns the lab
//!                                      Exec     --> the host's control channel, at once
//!                                      Console  --> bytes in both directions until one side hangs up
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::channel::Channel;
use crate::console::Console;
use crate::wire::Outcome;

/// The file in the lab's directory that says where the door is.
const NOTICE: &str = "lab.json";
/// How long a command in a host may take.
const EXEC_MAX: Duration = Duration::from_secs(3600);

/// What is written at the door.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Notice {
    pub pid: u32,
    pub door: PathBuf,
}

/// What a visitor wants, a line of JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wish {
    /// A command as in the lab's own shell.
    Command { line: String },
    /// A program in a host.
    Exec { host: String, argv: Vec<String> },
    /// The serial console of a host. The answer to the wish comes first.
    Console { host: String },
}

/// A command for the thread that owns the lab, and where its answer goes.
pub struct Request {
    pub line: String,
    pub answer: Sender<Outcome>,
}

/// What a visitor may reach without the thread that owns the lab.
pub type Hands = BTreeMap<String, (Channel, Console)>;

/// Opens the door. It stays open until the process ends.
pub fn open(socket: &Path, hands: Hands, requests: Sender<Request>) -> Result<()> {
    let listener =
        UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
    thread::spawn(move || {
        for visitor in listener.incoming().flatten() {
            let (hands, requests) = (hands.clone(), requests.clone());
            // A visitor that goes away in the middle is no concern of the lab.
            thread::spawn(move || serve(visitor, &hands, &requests));
        }
    });
    Ok(())
}

/// Writes where the door is; whoever reads it sees all of it or nothing.
pub fn announce(directory: &Path, door: &Path) -> Result<()> {
    let notice = Notice { pid: std::process::id(), door: door.to_owned() };
    let new = directory.join(format!(".{NOTICE}.tmp"));
    fs::write(&new, serde_json::to_vec(&notice)?)?;
    fs::rename(&new, notice_path(directory))
        .with_context(|| format!("write {}", notice_path(directory).display()))
}

pub fn notice_path(directory: &Path) -> PathBuf {
    directory.join(NOTICE)
}

fn serve(visitor: UnixStream, hands: &Hands, requests: &Sender<Request>) -> Result<()> {
    let mut reader = BufReader::new(visitor.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    match serde_json::from_str(&line)? {
        Wish::Command { line } => {
            let (answer, answers) = channel();
            requests.send(Request { line, answer })?;
            reply(&visitor, &answers.recv()?)
        }
        Wish::Exec { host, argv } => {
            let words: Vec<&str> = argv.iter().map(String::as_str).collect();
            let outcome = hand(hands, &host)
                .and_then(|(channel, _)| channel.run(&words, "", EXEC_MAX))
                .unwrap_or_else(|error| refused(&error));
            reply(&visitor, &outcome)
        }
        Wish::Console { host } => match hand(hands, &host) {
            Ok((_, console)) => {
                reply(&visitor, &Outcome::default())?;
                connect(reader, visitor, console)
            }
            Err(error) => reply(&visitor, &refused(&error)),
        },
    }
}

fn hand<'a>(hands: &'a Hands, host: &str) -> Result<&'a (Channel, Console)> {
    hands.get(host).with_context(|| format!("the lab has no host `{host}`; `lab list` shows them"))
}

/// An error as the outcome of a command.
pub fn refused(error: &anyhow::Error) -> Outcome {
    Outcome { code: 1, stderr: format!("error: {error:#}\n"), ..Outcome::default() }
}

fn reply(mut visitor: &UnixStream, outcome: &Outcome) -> Result<()> {
    let mut text = serde_json::to_string(outcome)?;
    text.push('\n');
    visitor.write_all(text.as_bytes()).context("answer a visitor")
}

fn connect(mut typed: impl Read, mut screen: UnixStream, console: &Console) -> Result<()> {
    let heard = console.look_on();
    thread::spawn(move || {
        while let Ok(piece) = heard.recv() {
            if screen.write_all(&piece).is_err() {
                break;
            }
        }
    });
    let mut piece = [0; 1024];
    while let Ok(count @ 1..) = typed.read(&mut piece) {
        console.type_in(&piece[..count])?;
    }
    Ok(())
}

/// A visitor's side: the lab that is up.
pub struct Visit {
    directory: PathBuf,
    pub notice: Notice,
}

impl Visit {
    /// The lab of a directory, or none if none is up there.
    pub fn find(directory: &Path) -> Result<Option<Self>> {
        let path = notice_path(directory);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let notice: Notice =
            serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
        // A lab that was killed leaves its notice, and nobody answers at its door.
        let answers = UnixStream::connect(&notice.door).is_ok();
        Ok(answers.then(|| Self { directory: directory.to_owned(), notice }))
    }

    /// The same where there must be one.
    pub fn expect(directory: &Path) -> Result<Self> {
        Self::find(directory)?
            .context("no lab is up; `cargo xtask lab up --keep` starts one and leaves it running")
    }

    /// Asks, and waits for the answer.
    pub fn ask(&self, wish: &Wish) -> Result<Outcome> {
        Ok(self.send(wish)?.1)
    }

    /// Bytes in both directions, after the answer.
    pub fn console(&self, host: &str) -> Result<BufReader<UnixStream>> {
        let (stream, outcome) = self.send(&Wish::Console { host: host.to_owned() })?;
        match outcome.code {
            0 => Ok(stream),
            _ => bail!("{}", outcome.stderr.trim().trim_start_matches("error: ")),
        }
    }

    fn send(&self, wish: &Wish) -> Result<(BufReader<UnixStream>, Outcome)> {
        let door = &self.notice.door;
        let lab = || format!("talk to the lab of {}", self.directory.display());
        let mut stream = UnixStream::connect(door).with_context(lab)?;
        let mut text = serde_json::to_string(wish)?;
        text.push('\n');
        stream.write_all(text.as_bytes()).with_context(lab)?;
        let mut reader = BufReader::new(stream);
        let mut answer = String::new();
        reader.read_line(&mut answer).with_context(lab)?;
        let outcome = serde_json::from_str(&answer).context("the lab ended before it answered")?;
        Ok((reader, outcome))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_reaches_the_owner_and_its_answer_the_visitor() {
        let directory = std::env::temp_dir().join(format!("bw-door-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&directory).unwrap();
        assert!(Visit::find(&directory).unwrap().is_none());
        let door = directory.join("door");
        let (requests, received) = channel();
        open(&door, Hands::new(), requests).unwrap();
        announce(&directory, &door).unwrap();
        let owner = thread::spawn(move || {
            let request: Request = received.recv().unwrap();
            let stdout = format!("did {}", request.line);
            request.answer.send(Outcome { stdout, ..Outcome::default() }).unwrap();
        });
        let visit = Visit::expect(&directory).unwrap();
        let wish = Wish::Command { line: "power off node2".to_owned() };
        assert_eq!(visit.ask(&wish).unwrap().stdout, "did power off node2");
        owner.join().unwrap();
        let nobody = Wish::Exec { host: "node9".to_owned(), argv: vec![] };
        assert!(visit.ask(&nobody).unwrap().stderr.contains("no host `node9`"));
        assert!(visit.console("node9").unwrap_err().to_string().contains("node9"));
        fs::remove_dir_all(directory).unwrap();
    }
}
