//! The lab's hand in a host: runs what it is told and passes on what guests print, over a port
//! of the machine. It touches no network and no shared storage, so it answers when both are dead.
//!
//! Under the name `fence_lab` it is a fence agent: it asks the lab for the power switch of a host,
//! through the hand in its own host.
#![forbid(unsafe_code)]
#![allow(clippy::print_stderr)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bellwether_lab::wire::{FromHost, Outcome, PORT_NAME, ToHost};

const FENCE_AGENT: &str = "fence_lab";
const POWER: &str = "/run/lab-power";
const PORTS: &str = "/sys/class/virtio-ports";
const VMS: &str = "/run/bellwether/vms";
/// Between two looks for new VMMs.
const LOOK: Duration = Duration::from_millis(250);

fn main() -> Result<ExitCode> {
    let name = std::env::args().next().unwrap_or_default();
    match Path::new(&name).file_name().is_some_and(|name| name == FENCE_AGENT) {
        true => fence(),
        false => hand().map(|()| ExitCode::SUCCESS),
    }
}

fn hand() -> Result<()> {
    let path = find_port()?;
    let port = OpenOptions::new().read(true).write(true).open(&path);
    let port = port.with_context(|| format!("open {}", path.display()))?;
    let line = Line { port: Arc::new(Mutex::new(port.try_clone()?)), asked: Asked::default() };
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    line.send(&FromHost::Hello { boot_id })?;
    let guests = line.clone();
    thread::spawn(move || watch_guests(&guests));
    let listener = UnixListener::bind(POWER)?;
    // The controller's user asks, too.
    fs::set_permissions(POWER, PermissionsExt::from_mode(0o666))?;
    let switches = line.clone();
    thread::spawn(move || serve_switches(&listener, &switches));
    serve(port, &line)
}

fn find_port() -> Result<PathBuf> {
    for entry in fs::read_dir(PORTS).with_context(|| format!("read {PORTS}"))? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("this machine has no port {PORT_NAME}: it is no host of a lab")
}

/// The way to the lab; messages of several threads do not mix.
#[derive(Clone)]
struct Line {
    port: Arc<Mutex<File>>,
    asked: Asked,
}

/// Fence agents that wait for an answer, by the number of the request.
type Asked = Arc<Mutex<BTreeMap<u64, mpsc::Sender<(i32, String)>>>>;

impl Line {
    fn send(&self, message: &FromHost) -> Result<()> {
        let mut text = serde_json::to_string(message)?;
        text.push('\n');
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        port.write_all(text.as_bytes()).context("write to the lab")
    }
}

fn serve(port: File, line: &Line) -> Result<()> {
    for text in BufReader::new(port).lines() {
        let text = text.context("read from the lab")?;
        match serde_json::from_str(&text) {
            Ok(ToHost::Run { id, argv, input, limit_ms }) => {
                let line = line.clone();
                thread::spawn(move || {
                    let outcome = run(&argv, &input, limit_ms).unwrap_or_else(|error| Outcome {
                        code: 127,
                        stderr: format!("{error:#}"),
                        ..Outcome::default()
                    });
                    line.send(&FromHost::Done { id, outcome })
                });
            }
            Ok(ToHost::Power { id, code, text }) => {
                let asked = line.asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                // One whose time was over waits no longer.
                let _ = asked.map(|asked| asked.send((code, text)));
            }
            // Half a line of a lab that went away meanwhile.
            Err(error) => eprintln!("ignored: {error}"),
        }
    }
    bail!("the lab hung up")
}

fn run(argv: &[String], input: &str, limit_ms: u64) -> Result<Outcome> {
    let limit = format!("{}.{:03}", limit_ms / 1000, limit_ms % 1000);
    let mut child = Command::new("timeout")
        .args(["-k", "1", &limit])
        .args(argv)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start timeout")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read its input is none of our business.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    Ok(Outcome {
        code: exit_code(output.status),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Follows the console of each VMM that there is.
fn watch_guests(line: &Line) {
    let followed = Arc::new(Mutex::new(BTreeSet::new()));
    // Nobody sends: the wait for a message is the pace.
    let (_never, pace) = mpsc::channel::<()>();
    while pace.recv_timeout(LOOK) == Err(mpsc::RecvTimeoutError::Timeout) {
        for socket in sockets() {
            let is_new =
                followed.lock().unwrap_or_else(PoisonError::into_inner).insert(socket.clone());
            if is_new {
                let (line, followed) = (line.clone(), followed.clone());
                thread::spawn(move || {
                    let _ = follow(&socket, &line);
                    followed.lock().unwrap_or_else(PoisonError::into_inner).remove(&socket);
                });
            }
        }
    }
}

fn sockets() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(VMS) else { return Vec::new() };
    let sockets = entries.flatten().map(|entry| entry.path().join("api.sock"));
    sockets.filter(|socket| socket.exists()).collect()
}

/// Until the console ends; the loop above attaches anew if the VMM is still there.
fn follow(socket: &Path, line: &Line) -> Result<()> {
    let name = socket.parent().and_then(Path::file_name).context("a socket without a directory")?;
    let name = name.to_string_lossy();
    let (vm_id, epoch) = name.split_once('.').context("a directory without an epoch")?;
    let epoch: u64 = epoch.parse()?;
    let mut console = attach(socket)?;
    // The end of the input would end the console.
    let _input = console.stdin.take();
    let output = console.stdout.take().context("a console without output")?;
    let mut reader = BufReader::new(output);
    let mut bytes = Vec::new();
    while reader.by_ref().take(4096).read_until(b'\n', &mut bytes)? > 0 {
        let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        line.send(&FromHost::Guest { vm_id: vm_id.to_owned(), epoch, line: text })?;
        bytes.clear();
    }
    console.wait()?;
    Ok(())
}

fn attach(socket: &Path) -> Result<Child> {
    Command::new("bellwether-vmm")
        .args(["console", "--api-socket"])
        .arg(socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("start bellwether-vmm console")
}

/// A request is `ACTION HOST`, an answer `CODE TEXT`.
fn serve_switches(listener: &UnixListener, line: &Line) {
    for (id, stream) in (1..).zip(listener.incoming().flatten()) {
        let line = line.clone();
        thread::spawn(move || serve_switch(id, stream, &line));
    }
}

fn serve_switch(id: u64, mut stream: UnixStream, line: &Line) -> Result<()> {
    let mut request = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut request)?;
    let (action, host) = request.trim().split_once(' ').context("a request without a host")?;
    let (sender, answer) = mpsc::channel();
    line.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
    line.send(&FromHost::Power { id, host: host.to_owned(), action: action.to_owned() })?;
    let (code, text) = answer.recv()?;
    Ok(writeln!(stream, "{code} {text}")?)
}

/// The agent's side of the ClusterLabs interface: `key=value` lines on standard input.
fn fence() -> Result<ExitCode> {
    let mut input = String::new();
    std::io::stdin().read_to_string(&mut input)?;
    let value =
        |key: &str| input.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let mut out = std::io::stdout();
    match value("action").unwrap_or("reboot") {
        "metadata" => {
            out.write_all(METADATA.as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
        action => {
            let mut stream = UnixStream::connect(POWER).context("ask the lab")?;
            writeln!(stream, "{action} {}", value("plug").context("no plug was given")?)?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            let (code, text) = answer.trim().split_once(' ').context("no answer")?;
            writeln!(out, "{text}")?;
            Ok(ExitCode::from(code.parse::<u8>()?))
        }
    }
}

const METADATA: &str = r#"<?xml version="1.0" ?>
<resource-agent name="fence_lab" shortdesc="Power switches of the lab's hosts">
<parameters>
  <parameter name="action" required="1"><content type="string" default="reboot"/></parameter>
  <parameter name="plug" required="1"><content type="string"/><shortdesc lang="en">Host</shortdesc></parameter>
</parameters>
<actions><action name="off"/><action name="status"/><action name="monitor"/><action name="metadata"/></actions>
</resource-agent>
"#;
