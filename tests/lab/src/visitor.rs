//! Commands that talk to a lab which another process keeps up.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::door::{Visit, Wish};
use crate::wire::Outcome;

/// Ctrl-], as in telnet.
const LEAVE: u8 = 0x1d;
/// Between two looks at a lab that another process makes.
const LOOK: Duration = Duration::from_millis(200);

/// Starts this program once more, in the background and without a terminal, and waits until its lab
/// is up. What it says meanwhile goes on to the screen.
pub fn start(directory: &Path, arguments: &[&str]) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let log = directory.join("up.log");
    let file = File::create(&log).with_context(|| format!("create {}", log.display()))?;
    let own = std::env::current_exe().context("find this program")?;
    let mut lab = Command::new("setsid")
        .arg(own)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .context("start setsid")?;
    let mut said = File::open(&log)?;
    await_door(directory, &mut lab, &mut said)
}

fn await_door(directory: &Path, lab: &mut Child, said: &mut File) -> Result<()> {
    // Nobody sends: the wait for a message is the pace.
    let (_never, pace) = mpsc::channel::<()>();
    loop {
        let ended = lab.try_wait()?;
        let mut text = String::new();
        said.read_to_string(&mut text)?;
        std::io::stderr().write_all(text.as_bytes())?;
        if let Some(status) = ended {
            bail!("the lab did not come up ({status})");
        }
        if Visit::find(directory)?.is_some_and(|visit| visit.notice.pid == lab.id()) {
            return Ok(());
        }
        let _ = pace.recv_timeout(LOOK);
    }
}

/// Asks the lab that is up for a command, and shows what it says.
pub fn command(directory: &Path, line: &str) -> Result<i32> {
    let line = line.to_owned();
    show(&Visit::expect(directory)?.ask(&Wish::Command { line })?)
}

/// Runs a program in a host and becomes its exit status.
pub fn exec(directory: &Path, host: &str, words: &[String]) -> Result<i32> {
    let argv = ["sh", "-c", &words.join(" ")].map(str::to_owned).to_vec();
    show(&Visit::expect(directory)?.ask(&Wish::Exec { host: host.to_owned(), argv })?)
}

pub fn show(outcome: &Outcome) -> Result<i32> {
    std::io::stdout().write_all(outcome.stdout.as_bytes())?;
    std::io::stderr().write_all(outcome.stderr.as_bytes())?;
    Ok(outcome.code)
}

/// A root shell at a host's serial console, which needs no network there.
pub fn shell(directory: &Path, host: &str) -> Result<i32> {
    let visit = Visit::expect(directory)?;
    let argv = ["systemctl", "restart", "--no-block", "lab-shell"].map(str::to_owned).to_vec();
    let started = visit.ask(&Wish::Exec { host: host.to_owned(), argv })?;
    match started.code {
        0 => console(directory, host),
        _ => show(&started),
    }
}

/// The serial console of a host, until Ctrl-] or the end of the input.
pub fn console(directory: &Path, host: &str) -> Result<i32> {
    let mut heard = Visit::expect(directory)?.console(host)?;
    let typed = heard.get_ref().try_clone()?;
    eprintln_line(&format!("console of {host}; Ctrl-] leaves it"));
    let _raw = RawTerminal::enter()?;
    thread::spawn(move || {
        // The console's end ends the other half.
        let _ = type_on(typed);
    });
    let mut screen = std::io::stdout();
    let mut piece = [0; 4096];
    while let Ok(count @ 1..) = heard.read(&mut piece) {
        screen.write_all(&piece[..count])?;
        screen.flush()?;
    }
    Ok(0)
}

fn eprintln_line(text: &str) {
    // Whether anybody reads it does not matter.
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn type_on(mut console: UnixStream) -> Result<()> {
    let mut keys = std::io::stdin();
    let mut piece = [0; 1024];
    while let count @ 1.. = keys.read(&mut piece)? {
        let end = piece[..count].iter().position(|&key| key == LEAVE);
        console.write_all(&piece[..end.unwrap_or(count)])?;
        if end.is_some() {
            break;
        }
    }
    Ok(console.shutdown(std::net::Shutdown::Both)?)
}

/// The terminal passes on every key, Ctrl-C included, until this is dropped.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let input = std::io::stdin();
        if !input.is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(&input)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&input, OptionalActions::Flush, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // The program ends now; a terminal that is gone needs no care.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, before);
        }
    }
}
