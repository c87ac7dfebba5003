//! A VMM process under test, spoken to as an agent speaks to it, with the real test guest.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use bellwether_proto::v1::vmm_client::VmmClient;
use bellwether_proto::v1::{
    ConsoleInput, ConsoleOutput, CreateRequest, Disk, LoadAheadReply, LoadAheadRequest, LoadReply,
    LoadRequest, PreCopyProgress, SaveReply, SaveRequest, StartReply, StartRequest, StateFile,
    StatusRequest, StopRequest, VmSpec, VmmStatus,
};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use uuid::Uuid;

/// Everything that should happen happens within this, on the slowest machine.
pub const LONG: Duration = Duration::from_secs(60);
const PACE: Duration = Duration::from_millis(5);

/// The test guest; its absence fails the test.
pub fn guest() -> PathBuf {
    if let Some(path) = std::env::var_os("BELLWETHER_TEST_GUEST") {
        return PathBuf::from(path);
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guest/target");
    ["x86_64-unknown-linux-gnu/release", "release"]
        .iter()
        .map(|profile| built.join(profile).join("bellwether-guest"))
        .find(|path| path.exists())
        .unwrap_or_else(|| {
            panic!(
                "the test guest is not built: run `cargo build --release --manifest-path \
                 tests/guest/Cargo.toml`, or name it in BELLWETHER_TEST_GUEST"
            )
        })
}

/// A file of zeros.
pub fn disk(directory: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = directory.join(name);
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// What a VM is made of.
#[derive(Clone)]
pub struct Config {
    pub request: CreateRequest,
}

impl Config {
    /// One vCPU, 64 MiB, no disk, a tick each 10 ms.
    pub fn new() -> Self {
        let spec = VmSpec {
            name: "test".into(),
            vcpus: 1,
            memory_mib: 64,
            kernel: guest().display().to_string(),
            cmdline: "tick_ms=10 journal_ms=10 mem_mib=8".into(),
            ..Default::default()
        };
        Self {
            request: CreateRequest {
                vm_id: Uuid::new_v4().to_string(),
                spec: Some(spec),
                arbiter: "storage".into(),
                ..Default::default()
            },
        }
    }

    pub fn spec(&mut self) -> &mut VmSpec {
        self.request.spec.as_mut().unwrap()
    }

    pub fn with_disk(mut self, path: &Path) -> Self {
        self.add_disk(path, false);
        self
    }

    pub fn add_disk(&mut self, path: &Path, read_only: bool) {
        let disk = Disk { path: path.display().to_string(), format: "raw".into(), read_only };
        self.spec().disks.push(disk);
    }
}

/// One VMM process.
pub struct Vmm {
    pub child: Child,
    pub client: VmmClient<Channel>,
    pub directory: PathBuf,
}

impl Vmm {
    /// Starts an empty VMM with its socket in a directory of its own below `directory`.
    pub async fn spawn(directory: &Path) -> Self {
        Self::spawn_as(Command::new(env!("CARGO_BIN_EXE_bellwether-vmm")), directory).await
    }

    /// The same with a limit on the size of files ready to be set: beyond it a write fails, and the
    /// signal that would end the process is ignored.
    pub async fn spawn_limitable(directory: &Path) -> Self {
        let mut shell = Command::new("sh");
        let program = env!("CARGO_BIN_EXE_bellwether-vmm");
        shell.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\"", program]);
        Self::spawn_as(shell, directory).await
    }

    async fn spawn_as(mut program: Command, directory: &Path) -> Self {
        let directory = directory.join(format!("vmm-{}", Uuid::new_v4()));
        let socket = directory.join("api.sock");
        let child = program
            .args(["--log", "info", "serve", "--api-socket"])
            .arg(&socket)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let client = connect(&socket).await;
        Self { child, client, directory }
    }

    /// The same, with a machine created.
    pub async fn created(directory: &Path, config: &Config) -> Self {
        let mut vmm = Self::spawn(directory).await;
        vmm.create(config).await.unwrap();
        vmm
    }

    /// The same, running at this epoch.
    pub async fn running(directory: &Path, config: &Config, epoch: u64) -> Self {
        let mut vmm = Self::created(directory, config).await;
        vmm.start(epoch).await.unwrap();
        vmm
    }

    pub async fn create(&mut self, config: &Config) -> Result<VmmStatus, Status> {
        Ok(self.client.create(config.request.clone()).await?.into_inner())
    }

    pub async fn start(&mut self, epoch: u64) -> Result<StartReply, Status> {
        self.start_within(epoch, 0, false).await
    }

    pub async fn start_within(
        &mut self,
        epoch: u64,
        lock_wait_ms: u64,
        consume: bool,
    ) -> Result<StartReply, Status> {
        let request = StartRequest { epoch, lock_wait_ms, consume_state_file: consume };
        Ok(self.client.start(request).await?.into_inner())
    }

    pub async fn load(&mut self, file: &StateFile) -> Result<LoadReply, Status> {
        Ok(self.client.load(LoadRequest { file: Some(file.clone()) }).await?.into_inner())
    }

    /// Loads the pieces of a pre-copy's message.
    pub async fn load_ahead(&mut self, told: PreCopyProgress) -> Result<LoadAheadReply, Status> {
        let PreCopyProgress { path, epoch, generation, pieces, .. } = told;
        let request = LoadAheadRequest { path, epoch, generation, pieces };
        Ok(self.client.load_ahead(request).await?.into_inner())
    }

    pub async fn save(&mut self, directory: &Path, generation: u64) -> Result<SaveReply, Status> {
        let request = SaveRequest { directory: directory.display().to_string(), generation };
        Ok(self.client.save(request).await?.into_inner())
    }

    pub async fn status(&mut self) -> VmmStatus {
        self.client.status(StatusRequest {}).await.unwrap().into_inner()
    }

    /// Waits until the VMM shows this state and reason (its beginning).
    pub async fn wait_state(&mut self, state: &str, reason: &str) -> VmmStatus {
        let reached = async {
            loop {
                let status = self.status().await;
                if status.state == state && status.reason.starts_with(reason) {
                    return status;
                }
                tokio::time::sleep(PACE).await;
            }
        };
        match timeout(LONG, reached).await {
            Ok(status) => status,
            Err(_) => panic!("never reached {state} ({reason}): {:?}", self.status().await),
        }
    }

    /// Waits until all restored memory is there.
    pub async fn wait_memory(&mut self) {
        let whole = async {
            loop {
                let status = self.status().await;
                if status.memory_loaded_bytes == status.memory_total_bytes {
                    return;
                }
                tokio::time::sleep(PACE).await;
            }
        };
        timeout(LONG, whole).await.expect("memory is never whole");
    }

    pub async fn stop(&mut self) -> ExitStatus {
        self.client.stop(StopRequest {}).await.unwrap();
        self.wait_exit().await
    }

    /// Waits until the process has ended by itself.
    pub async fn wait_exit(&mut self) -> ExitStatus {
        let ended = async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(PACE).await;
            }
        };
        timeout(LONG, ended).await.expect("the VMM does not end")
    }

    pub fn exit_record(&self) -> serde_json::Value {
        let bytes = std::fs::read(self.directory.join("exit.json")).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("api.sock")
    }

    /// SIGKILL, and wait for the end.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub async fn console(&mut self) -> Console {
        let (input, from) = mpsc::channel(4);
        let stream = self.client.console(ReceiverStream::new(from)).await.unwrap().into_inner();
        Console { input, stream, partial: String::new(), lines: vec![] }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

async fn connect(socket: &Path) -> VmmClient<Channel> {
    let answers = async {
        loop {
            if let Ok(channel) = bellwether_vmm::api::connect(socket).await {
                return VmmClient::new(channel);
            }
            tokio::time::sleep(PACE).await;
        }
    };
    timeout(LONG, answers).await.expect("the VMM does not answer on its socket")
}

/// The guest's serial port as lines.
pub struct Console {
    input: mpsc::Sender<ConsoleInput>,
    stream: Streaming<ConsoleOutput>,
    partial: String,
    pub lines: Vec<String>,
}

impl Console {
    /// Sends a command to the guest.
    pub async fn send(&self, line: &str) {
        self.input.send(ConsoleInput { data: format!("{line}\n").into_bytes() }).await.unwrap();
    }

    /// The next line that begins with `prefix`. A guest that finds an error fails the test.
    pub async fn wait_for(&mut self, prefix: &str) -> String {
        self.wait_until(prefix, |line| line.starts_with(prefix)).await
    }

    pub async fn wait_until(&mut self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        let found = async {
            loop {
                let line = self.next_line().await;
                assert!(!line.starts_with("FATAL"), "the guest found an error: {line}");
                if is_it(&line) {
                    return line;
                }
            }
        };
        match timeout(LONG, found).await {
            Ok(line) => line,
            Err(_) => panic!(
                "no line `{what}`; the last ones: {:#?}",
                self.lines.iter().rev().take(20).collect::<Vec<_>>()
            ),
        }
    }

    /// The number in the next line of this kind, such as `tick 7 ...`.
    pub async fn number(&mut self, kind: &str) -> u64 {
        number(&self.wait_for(&format!("{kind} ")).await)
    }

    /// Whether the guest says nothing for this long.
    pub async fn is_silent_for(&mut self, span: Duration) -> bool {
        timeout(span, self.next_line()).await.is_err()
    }

    async fn next_line(&mut self) -> String {
        loop {
            if let Some((line, rest)) = self.partial.split_once('\n') {
                let line = line.trim_end().to_owned();
                self.partial = rest.to_owned();
                self.lines.push(line.clone());
                return line;
            }
            let chunk = self.stream.message().await.expect("the console broke off");
            let chunk = chunk.expect("the console ended");
            self.partial.push_str(&String::from_utf8_lossy(&chunk.data));
        }
    }
}

/// The second word of a line as a number.
pub fn number(line: &str) -> u64 {
    line.split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("no number in {line}"))
}

/// Asserts that a call was refused with this code and with all these words.
pub fn assert_refused<T: std::fmt::Debug>(outcome: Result<T, Status>, code: Code, words: &[&str]) {
    let status = outcome.expect_err("this should have been refused");
    assert_eq!(status.code(), code, "{}", status.message());
    for word in words {
        assert!(status.message().contains(word), "`{word}` is not in: {}", status.message());
    }
}
