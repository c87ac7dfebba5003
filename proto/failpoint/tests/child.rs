//! Each test starts this binary again as the process that reaches the points.
#![allow(clippy::unwrap_used, reason = "a test")]
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use bellwether_failpoint::{ENV, HoldDir, failpoint, failpoint_error, hold, hold_error};

const MODE: &str = "BELLWETHER_FAILPOINT_TEST_MODE";
const LONG: Duration = Duration::from_secs(20);

/// The other side: it does nothing in an ordinary run of the tests.
#[test]
fn child() {
    let Ok(mode) = std::env::var(MODE) else { return };
    match mode.as_str() {
        "sync" => {
            for round in 1..=3 {
                println!("round {round}");
                failpoint!("p.sync");
            }
        }
        "error" => {
            println!("error: {:?}", (0..3).map(|_| failpoint_error!("p.error")).collect::<Vec<_>>())
        }
        "async" => multi_thread(async {
            hold("p.async").await;
            println!("async: {:?}", hold_error("p.error").await);
        }),
        // With one thread, a timer can fire during the hold only if the hold does not block it.
        "dropped" => tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
            .block_on(async {
                let held = tokio::time::timeout(Duration::from_millis(50), hold("p.async")).await;
                println!("dropped: {}", held.is_err());
            }),
        other => panic!("unknown mode {other}"),
    }
    println!("end");
}

fn multi_thread(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread().enable_time().build().unwrap().block_on(work);
}

fn start(mode: &str, points: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(MODE, mode)
        .env(ENV, points)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(mut child: Child) -> (ExitStatus, String) {
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (child.wait().unwrap(), text)
}

#[test]
fn without_the_variable_nothing_happens() {
    let (status, text) = finish(start("sync", ""));
    assert!(status.success() && text.contains("end"), "{text}");
}

#[test]
fn kill_is_a_sigkill_at_the_nth_hit() {
    let (status, text) = finish(start("sync", "p.sync=kill@2"));
    assert_eq!(status.signal(), Some(9), "{text}");
    assert!(text.contains("round 2") && !text.contains("round 3"), "{text}");
}

#[test]
fn other_points_are_not_touched() {
    let (status, text) = finish(start("sync", "p.syn=kill;p.sync2=kill"));
    assert!(status.success() && text.contains("end"), "{text}");
}

#[test]
fn held_until_let_go() {
    let dir = tempfile::tempdir().unwrap();
    for (mode, point) in [("sync", "p.sync"), ("async", "p.async")] {
        let holds = HoldDir::new(dir.path());
        let mut child = start(mode, &holds.entry(point));
        let pid = holds.wait_reached(point, LONG).unwrap();
        assert_eq!(pid, i32::try_from(child.id()).unwrap());
        assert!(child.try_wait().unwrap().is_none(), "it went on without leave");
        holds.release(point).unwrap();
        let (status, text) = finish(child);
        assert!(status.success() && text.contains("end"), "{text}");
    }
}

#[test]
fn a_held_process_does_not_outlive_its_test() {
    let dir = tempfile::tempdir().unwrap();
    let holds = HoldDir::new(dir.path());
    let child = start("sync", &holds.entry("p.sync"));
    holds.wait_reached("p.sync", LONG).unwrap();
    drop(dir);
    assert_eq!(finish(child).0.signal(), Some(9));
}

#[test]
fn a_dropped_hold_lets_the_runtime_end() {
    let dir = tempfile::tempdir().unwrap();
    let (status, text) = finish(start("dropped", &HoldDir::new(dir.path()).entry("p.async")));
    assert!(status.success() && text.contains("dropped: true"), "{text}");
}

#[test]
fn an_error_reaches_the_caller_at_the_nth_hit() {
    let (_, text) = finish(start("error", "p.error=error:no space@2"));
    assert!(text.contains(r#"[Ok(()), Err("no space"), Ok(())]"#), "{text}");
    let (_, text) = finish(start("async", "p.error=error:no space"));
    assert!(text.contains(r#"async: Err("no space")"#), "{text}");
}

#[test]
fn mistakes_end_the_process_loudly() {
    for points in ["p.sync", "p.sync=kil", "p.sync=error:x", "p.sync=hold:/nonexistent/dir"] {
        let (status, text) = finish(start("sync", points));
        assert!(!status.success(), "{points}: {text}");
        assert!(text.contains(ENV), "{points}: {text}");
    }
}

#[test]
fn waiting_for_a_point_that_nobody_reaches_ends() {
    let dir = tempfile::tempdir().unwrap();
    let error = HoldDir::new(dir.path()).wait_reached("p", Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn a_directory_arms_points_while_the_process_runs() {
    let dir = tempfile::tempdir().unwrap();
    let points = HoldDir::new(dir.path());
    std::fs::write(dir.path().join("p.async.hold"), "").unwrap();
    std::fs::write(dir.path().join("p.error.error"), "no space").unwrap();
    let child = start("async", &format!("dir:{}", dir.path().display()));
    let held = points.wait_reached("p.async", LONG).unwrap();
    assert_eq!(held.unsigned_abs(), child.id());
    std::fs::remove_file(dir.path().join("p.async.hold")).unwrap();
    let (status, text) = finish(child);
    assert!(status.success() && text.contains("async: Err(\"no space\")"), "{text}");
}

#[test]
fn a_kill_in_the_directory_is_for_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let kill = dir.path().join("p.sync.kill");
    std::fs::write(&kill, "").unwrap();
    let variable = format!("dir:{}", dir.path().display());
    let (status, text) = finish(start("sync", &variable));
    assert_eq!(status.signal(), Some(9), "{text}");
    assert!(!kill.exists());
    let (status, text) = finish(start("sync", &variable));
    assert!(status.success() && text.contains("round 3"), "{text}");
}
