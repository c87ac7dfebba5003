//! The program as an administrator runs it, without a watchdog.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use common::{MS, Node, now_ns};

const PROGRAM: &str = env!("CARGO_BIN_EXE_bellwether-fencer");

fn settings(node: &Node) -> PathBuf {
    let path = node.dir.path().join("fencer.toml");
    let text =
        format!("runtime_dir = {:?}\npet_ms = 100\nstop_ms = 100\n", node.dir.path().display());
    std::fs::write(&path, text).unwrap();
    path
}

fn command(node: &Node, word: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg(word).arg("--config").arg(settings(node));
    command
}

fn output(node: &Node, words: &[&str]) -> Output {
    command(node, words[0]).args(&words[1..]).output().unwrap()
}

/// Starts a fencer, and waits until it says to systemd that it is ready.
fn start(node: &Node) -> Child {
    let socket = node.dir.path().join("notify");
    let _ = std::fs::remove_file(&socket);
    let systemd = UnixDatagram::bind(&socket).unwrap();
    let mut run = command(node, "run");
    let child = run.env("NOTIFY_SOCKET", &socket).stderr(Stdio::piped()).spawn().unwrap();
    let mut word = [0; 16];
    let length = systemd.recv(&mut word).unwrap();
    assert_eq!(&word[..length], b"READY=1");
    child
}

#[test]
fn it_kills_what_is_overdue_without_any_agent() {
    let node = Node::new();
    let mut fencer = start(&node);
    let mut overdue = node.vmm(1, "lease");
    let mut storage = node.vmm(2, "storage");
    storage.page.grant(7, 1).unwrap();
    let deadline = now_ns() + 20 * MS;
    overdue.page.grant(7, deadline).unwrap();
    assert!(overdue.was_killed());
    assert!(now_ns() >= deadline + 100 * MS, "not before its time to stop is over");
    assert!(storage.lives());
    let log = BufReader::new(fencer.stderr.take().unwrap());
    let pid = format!("pid={}", overdue.pid());
    assert!(log.lines().any(|line| {
        let line = line.unwrap();
        line.starts_with("<3>killed a VMM") && line.contains(&pid)
    }));
    fencer.kill().unwrap();
    fencer.wait().unwrap();
}

#[test]
fn it_ends_when_asked_to_and_only_when_nobody_depends_on_it() {
    let node = Node::new();
    let mut fencer = start(&node);
    let status: serde_json::Value =
        serde_json::from_slice(&output(&node, &["status", "--json"]).stdout).unwrap();
    assert_eq!(status["pid"], fencer.id());
    assert!(status["proof"]["reason"].as_str().unwrap().contains("no watchdog is armed"));
    assert!(status["proof"]["watchdog_ms"].is_null());

    let second = output(&node, &["run"]);
    assert!(String::from_utf8_lossy(&second.stderr).contains("another fencer runs"));

    assert!(output(&node, &["stop"]).status.success());
    assert!(fencer.wait().unwrap().success());
    let again = output(&node, &["stop"]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("no fencer runs"), "{again:?}");
}

#[test]
fn a_killed_fencer_is_followed_by_another() {
    let node = Node::new();
    let mut first = start(&node);
    first.kill().unwrap();
    first.wait().unwrap();
    let mut second = start(&node);
    let status = output(&node, &["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["pid"], second.id());
    second.kill().unwrap();
    second.wait().unwrap();
}

#[test]
fn check_arms_nothing_and_says_what_is_missing() {
    let node = Node::new();
    let path = settings(&node);
    let text = std::fs::read_to_string(&path).unwrap() + "watchdog_device = \"/dev/null/none\"\n";
    std::fs::write(&path, text).unwrap();
    let check = Command::new(PROGRAM).args(["check", "--json", "--config"]).arg(&path).output();
    let report: serde_json::Value = serde_json::from_slice(&check.unwrap().stdout).unwrap();
    assert_eq!(report["watchdog"], false);
    assert!(report["problem"].as_str().unwrap().contains("/dev/null/none"));
}
