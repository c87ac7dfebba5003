//! `bell` at a real terminal: a pseudo-terminal whose other end the test holds.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Stdio};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::support::{Conduct, Lab};

struct Terminal {
    /// The person's end.
    person: File,
    /// The command's end, kept open so that the modes can be looked at.
    device: File,
    seen: String,
}

impl Terminal {
    fn new() -> Self {
        let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let name = ptsname(&person, Vec::new()).unwrap().into_string().unwrap();
        let device = OpenOptions::new().read(true).write(true).open(name).unwrap();
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&device, size).unwrap();
        Self { person: File::from(person), device, seen: String::new() }
    }

    fn start(&self, lab: &Lab, line: &str) -> Child {
        let end = || Stdio::from(self.device.try_clone().unwrap());
        lab.command(line).stdin(end()).stdout(end()).stderr(end()).spawn().unwrap()
    }

    /// Reads until the text has appeared; a test that waits in vain is ended by its runner.
    fn expect(&mut self, text: &str) {
        let mut buffer = [0; 1024];
        while !self.seen.contains(text) {
            let length = self.person.read(&mut buffer).unwrap();
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.person.write_all(keys).unwrap();
    }

    fn modes(&self) -> Termios {
        tcgetattr(self.device.as_fd()).unwrap()
    }

    fn is_raw(&self) -> bool {
        !self
            .modes()
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }
}

#[test]
fn the_console_is_raw_and_the_terminal_is_as_before_when_it_is_left() {
    let (lab, _) = Lab::with(Conduct::Serve);
    let mut terminal = Terminal::new();
    let before = terminal.modes();
    let mut bell = terminal.start(&lab, "vm console web-1");
    terminal.expect("tick 2");
    assert!(terminal.is_raw());
    terminal.type_keys(b"\x03echoed by the guest");
    terminal.expect("\x03echoed by the guest");
    terminal.type_keys(b"\x1d");
    assert_eq!(bell.wait().unwrap().code(), Some(0));
    assert!(!terminal.is_raw());
    assert_eq!(format!("{before:?}"), format!("{:?}", terminal.modes()));
}

#[test]
fn a_signal_leaves_the_terminal_as_it_was() {
    let (lab, _) = Lab::with(Conduct::Serve);
    let mut terminal = Terminal::new();
    let mut bell = terminal.start(&lab, "vm console web-1");
    terminal.expect("tick 2");
    assert!(terminal.is_raw());
    let pid = rustix::process::Pid::from_child(&bell);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(bell.wait().unwrap().code(), Some(6));
    assert!(!terminal.is_raw());
}

#[test]
fn a_node_is_declared_dead_only_by_typing_its_name() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    for (typed, code) in [("yes\n", 2), ("n1\n", 0)] {
        let mut terminal = Terminal::new();
        let mut bell = terminal.start(&lab, "node confirm-down 1");
        terminal.expect("Type the node's name (n1)");
        assert!(terminal.seen.contains("\x1b[1mYou assert that node n1 is switched off"));
        assert!(terminal.seen.contains("(web-1)"), "the VMs at stake: {}", terminal.seen);
        terminal.type_keys(typed.as_bytes());
        assert_eq!(bell.wait().unwrap().code(), Some(code));
    }
    assert_eq!(*calls.lock().unwrap(), ["node 1", "node 1", "confirm n1"]);
}

#[test]
fn a_task_moves_at_a_terminal_and_its_result_stays() {
    let (lab, _) = Lab::with(Conduct::Serve);
    let mut terminal = Terminal::new();
    let mut bell = terminal.start(&lab, "vm migrate web-1");
    terminal.expect("outage 18.2 ms");
    assert_eq!(bell.wait().unwrap().code(), Some(0));
    assert!(!terminal.seen.contains("task 12 migrate"), "plain lines are for logs");
}
