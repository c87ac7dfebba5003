//! Pre-copy of a running guest, as an agent orders it, with the guest that checks its own memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::Duration;

use bellwether_proto::v1::{
    AbortPreCopyRequest, PreCopyProgress, PreCopyRequest, SaveReply, SaveRequest, StateFile,
};
use common::{Config, LONG, Vmm, assert_refused, disk};
use tempfile::TempDir;
use tokio::time::timeout;
use tonic::{Code, Status, Streaming};

const MIB: u64 = 1 << 20;

/// A guest of 128 MiB that rewrites its patterned memory at this rate, its disk, and its directory.
struct Busy {
    directory: TempDir,
    config: Config,
    vmm: Vmm,
}

impl Busy {
    async fn new(dirty_mib_s: u64) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let disk = disk(directory.path(), "disk.raw", 8 * MIB);
        let mut config = Config::new().with_disk(&disk);
        config.spec().memory_mib = 128;
        config.spec().cmdline =
            format!("tick_ms=10 journal_ms=20 mem_mib=48 fill=50 dirty_mib_s={dirty_mib_s}");
        let vmm = Vmm::running(directory.path(), &config, 1).await;
        let mut this = Self { directory, config, vmm };
        this.vmm.console().await.wait_for("filled ").await;
        this
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn request(&self, generation: u64) -> PreCopyRequest {
        PreCopyRequest {
            directory: self.path().display().to_string(),
            generation,
            finish_anyway: true,
            ..Default::default()
        }
    }

    async fn pre_copy(
        &mut self,
        request: PreCopyRequest,
    ) -> Result<Streaming<PreCopyProgress>, Status> {
        Ok(self.vmm.client.pre_copy(request).await?.into_inner())
    }

    async fn save(&mut self, generation: u64) -> Result<SaveReply, Status> {
        let directory = self.path().to_owned();
        self.vmm.save(&directory, generation).await
    }

    /// The guest goes on elsewhere, and finds every byte of its memory as it was.
    async fn assert_moves(&mut self, file: &StateFile, epoch: u64) {
        let mut target = Vmm::created(self.directory.path(), &self.config).await;
        target.load(file).await.unwrap();
        self.vmm.stop().await;
        target.start_within(epoch, 1000, true).await.unwrap();
        self.vmm = target;
        self.assert_whole().await;
    }

    async fn assert_whole(&mut self) {
        let mut console = self.vmm.console().await;
        console.send("verify-fill").await;
        console.wait_for("verified fill_mib=").await;
        console.wait_for("pattern ").await;
        console.wait_for("pattern ").await;
        console.number("journal").await;
        self.vmm.wait_memory().await;
    }

    /// No state file but these, and no dirty log: the guest runs as if nothing had been.
    async fn assert_no_file(&mut self) {
        let is_state = |entry: &std::fs::DirEntry| {
            entry.path().extension().is_some_and(|extension| extension == "state")
        };
        let left = std::fs::read_dir(self.path()).unwrap().map(Result::unwrap).find(is_state);
        assert!(left.is_none(), "{left:?} stays behind");
        let status = self.vmm.status().await;
        assert_eq!((status.state.as_str(), status.reason.as_str()), ("running", ""));
        self.assert_whole().await;
    }
}

/// Progress until this phase; the message that has it, and the highest round.
async fn wait_phase(stream: &mut Streaming<PreCopyProgress>, phase: &str) -> PreCopyProgress {
    let reached = async {
        while let Some(progress) = stream.message().await.unwrap() {
            if progress.phase == phase {
                return progress;
            }
            assert_ne!(progress.phase, "ended", "{}", progress.reason);
        }
        panic!("the stream ended before {phase}");
    };
    timeout(LONG, reached).await.expect("the pre-copy never gets there")
}

#[tokio::test]
async fn a_busy_guest_is_saved_with_little_left_to_write() {
    let mut busy = Busy::new(16).await;
    let request = busy.request(2);
    let mut stream = busy.pre_copy(request).await.unwrap();
    let ready = wait_phase(&mut stream, "ready").await;
    assert!(ready.converged && ready.outage_us <= 50_000, "{ready:?}");
    assert!(ready.bytes_written > 80 * MIB && ready.bandwidth_bytes_per_s > 0, "{ready:?}");
    // The guest goes on while the pre-copy is ready.
    let mut console = busy.vmm.console().await;
    console.number("journal").await;
    let before = busy.vmm.status().await.pre_copy.unwrap();
    let reply = busy.save(2).await.unwrap();
    wait_phase(&mut stream, "saving").await;
    assert!(stream.message().await.unwrap().is_none(), "the stream ends");
    let written = reply.timings.unwrap().bytes_written;
    assert!(written >= before.bytes_written, "{written} of {before:?}");
    busy.assert_moves(&reply.file.unwrap(), 2).await;
}

#[tokio::test]
async fn a_guest_moves_again_and_again_with_pre_copy() {
    let mut busy = Busy::new(128).await;
    for epoch in 2..6 {
        let request = busy.request(epoch);
        let mut stream = busy.pre_copy(request).await.unwrap();
        wait_phase(&mut stream, "ready").await;
        let file = busy.save(epoch).await.unwrap().file.unwrap();
        busy.assert_moves(&file, epoch).await;
    }
}

#[tokio::test]
async fn a_save_does_not_wait_for_a_pre_copy_to_converge() {
    let mut busy = Busy::new(64).await;
    // So slow that it would take minutes; the save takes over in round 0 and finishes that.
    let request = PreCopyRequest { rate_bytes_per_s: 40 * MIB, ..busy.request(2) };
    let mut stream = busy.pre_copy(request).await.unwrap();
    let first = wait_phase(&mut stream, "copying").await;
    assert_eq!(first.round, 0);
    let file = busy.save(2).await.unwrap().file.unwrap();
    wait_phase(&mut stream, "saving").await;
    busy.assert_moves(&file, 2).await;
}

#[tokio::test]
async fn an_aborted_pre_copy_leaves_no_trace() {
    let mut busy = Busy::new(64).await;
    let slow = PreCopyRequest { rate_bytes_per_s: 10 * MIB, ..busy.request(2) };
    let mut stream = busy.pre_copy(slow).await.unwrap();
    busy.vmm.client.abort_pre_copy(AbortPreCopyRequest {}).await.unwrap();
    let ended = stream_end(&mut stream).await;
    assert!(ended.reason.contains("aborted"), "{ended:?}");
    busy.assert_no_file().await;
    // Again, now when it is ready; and without one it is no error.
    let request = busy.request(3);
    let mut stream = busy.pre_copy(request).await.unwrap();
    wait_phase(&mut stream, "ready").await;
    for _ in 0..2 {
        busy.vmm.client.abort_pre_copy(AbortPreCopyRequest {}).await.unwrap();
    }
    stream_end(&mut stream).await;
    busy.assert_no_file().await;
    // A save of another generation ends a pre-copy, too, and is whole by itself.
    let request = busy.request(4);
    busy.pre_copy(request).await.unwrap();
    let file = busy.save(5).await.unwrap().file.unwrap();
    assert!(!busy.path().join(Path::new(&file.path.replace(".5.state", ".4.state"))).exists());
    busy.assert_moves(&file, 2).await;
}

async fn stream_end(stream: &mut Streaming<PreCopyProgress>) -> PreCopyProgress {
    let ended = async {
        let mut last = PreCopyProgress::default();
        while let Some(progress) = stream.message().await.unwrap() {
            last = progress;
        }
        last
    };
    let last = timeout(LONG, ended).await.expect("the stream never ends");
    assert_eq!(last.phase, "ended");
    last
}

#[tokio::test]
async fn what_cannot_converge_gives_up_with_numbers_or_finishes_with_a_prediction() {
    let mut busy = Busy::new(100_000).await;
    // The guest dirties faster than this rate writes.
    let rate = PreCopyRequest { rate_bytes_per_s: 20 * MIB, downtime_ms: 10, ..busy.request(2) };
    let strict = PreCopyRequest { finish_anyway: false, ..rate.clone() };
    let mut stream = busy.pre_copy(strict).await.unwrap();
    let ended = stream_end(&mut stream).await;
    for word in ["cannot converge", "MiB/s", " ms"] {
        assert!(ended.reason.contains(word), "{ended:?}");
    }
    busy.assert_no_file().await;
    let mut stream = busy.pre_copy(rate).await.unwrap();
    let ready = wait_phase(&mut stream, "ready").await;
    assert!(!ready.converged && ready.outage_us > 10_000, "{ready:?}");
    let file = busy.save(2).await.unwrap().file.unwrap();
    busy.assert_moves(&file, 2).await;
}

#[tokio::test]
async fn asked_again_it_joins_what_is_under_way() {
    let mut busy = Busy::new(8).await;
    let request = busy.request(2);
    let mut first = busy.pre_copy(request.clone()).await.unwrap();
    wait_phase(&mut first, "ready").await;
    drop(first);
    let mut second = busy.pre_copy(request.clone()).await.unwrap();
    let ready = wait_phase(&mut second, "ready").await;
    assert!(ready.elapsed_us > 0);
    let refused = busy.pre_copy(PreCopyRequest { directory: String::new(), ..request }).await;
    assert_refused(refused, Code::InvalidArgument, &["directory"]);
    let file = busy.save(2).await.unwrap().file.unwrap();
    let request = busy.request(2);
    assert_refused(busy.pre_copy(request).await, Code::FailedPrecondition, &["pre-copy", "sealed"]);
    // The source claims its VM back, and can do it all again.
    busy.vmm.start(2).await.unwrap();
    assert!(Path::new(&file.path).exists());
    let request = busy.request(3);
    let mut stream = busy.pre_copy(request).await.unwrap();
    wait_phase(&mut stream, "ready").await;
    let file = busy.save(3).await.unwrap().file.unwrap();
    busy.assert_moves(&file, 3).await;
}

#[tokio::test]
async fn killed_at_any_moment_it_leaves_at_most_an_unsealed_file() {
    for wait_ms in [0, 20, 60, 150, 400] {
        let mut busy = Busy::new(64).await;
        let request = PreCopyRequest { rate_bytes_per_s: 200 * MIB, ..busy.request(2) };
        let stream = busy.pre_copy(request).await.unwrap();
        // The moment is the point of the test: there is no condition to wait for.
        let _elapsed = timeout(Duration::from_millis(wait_ms), std::future::pending::<()>()).await;
        busy.vmm.kill();
        drop(stream);
        let mut files = std::fs::read_dir(busy.path()).unwrap().map(|entry| entry.unwrap().path());
        let Some(path) = files.find(|path| path.extension().is_some_and(|e| e == "state")) else {
            continue;
        };
        let inspected = bellwether_statefile::StateFile::inspect(&path);
        assert!(inspected.is_err() || !inspected.unwrap().header.sealed, "{}", path.display());
        // The next attempt of the same name takes its place.
        let mut again = Vmm::running(busy.directory.path(), &busy.config, 1).await;
        again.console().await.number("journal").await;
        busy.vmm = again;
        let request = busy.request(2);
        let mut stream = busy.pre_copy(request).await.unwrap();
        wait_phase(&mut stream, "ready").await;
        busy.save(2).await.unwrap();
    }
}

#[tokio::test]
async fn a_pre_copy_without_room_ends_and_the_guest_goes_on() {
    let mut busy = Busy::new(64).await;
    let missing = PreCopyRequest { directory: "/nowhere".into(), ..busy.request(2) };
    assert_refused(busy.pre_copy(missing).await, Code::NotFound, &["/nowhere"]);
    let pid = rustix::process::Pid::from_child(&busy.vmm.child);
    let limit = |bytes| {
        let limit = rustix::process::Rlimit { current: bytes, maximum: None };
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Fsize, limit).unwrap();
    };
    limit(Some(160 * MIB));
    // Round 0 fits; the rounds behind it do not.
    let mut request = busy.request(2);
    (request.downtime_ms, request.rate_bytes_per_s) = (1, 300 * MIB);
    let mut stream = busy.pre_copy(request).await.unwrap();
    let ended = stream_end(&mut stream).await;
    assert!(ended.reason.contains("too large"), "{ended:?}");
    limit(None);
    busy.assert_no_file().await;
}

/// Follows a pre-copy with a destination until it is ready and the destination has caught up; gives
/// the bytes that were loaded.
async fn tail_until_ready(stream: &mut Streaming<PreCopyProgress>, target: &mut Vmm) -> u64 {
    let mut loaded = 0;
    while let Some(progress) = stream.message().await.unwrap() {
        assert_ne!(progress.phase, "ended", "{}", progress.reason);
        let is_ready = progress.phase == "ready";
        let mut behind = 0;
        if !progress.pieces.is_empty() {
            let reply = target.load_ahead(progress).await.unwrap();
            assert_eq!(reply.left_out, 0);
            behind = reply.loaded_bytes;
            loaded += behind;
        }
        if is_ready && behind <= 16 * MIB {
            return loaded;
        }
    }
    panic!("the stream ended before it was ready");
}

#[tokio::test]
async fn a_destination_that_tails_has_nearly_all_at_the_load() {
    let mut busy = Busy::new(8).await;
    for epoch in 2..5 {
        let mut target = Vmm::created(busy.directory.path(), &busy.config).await;
        let request = PreCopyRequest { tell_pieces: true, ..busy.request(epoch) };
        let mut stream = busy.pre_copy(request).await.unwrap();
        let loaded = tail_until_ready(&mut stream, &mut target).await;
        assert!(loaded > 80 * MIB, "{loaded}");
        assert_eq!(target.status().await.memory_ahead_bytes, loaded);
        // What the source writes before it stops is still loaded, while it saves.
        let (mut source, directory) = (busy.vmm.client.clone(), busy.path().display().to_string());
        let request = SaveRequest { directory, generation: epoch };
        let saving = tokio::spawn(async move { source.save(request).await });
        while let Some(progress) = stream.message().await.unwrap() {
            target.load_ahead(progress).await.unwrap();
        }
        let file = saving.await.unwrap().unwrap().into_inner().file.unwrap();
        let status = target.load(&file).await.unwrap().status.unwrap();
        assert_eq!(status.memory_loaded_bytes, status.memory_total_bytes, "nothing is left");
        busy.vmm.stop().await;
        target.start_within(epoch, 1000, true).await.unwrap();
        busy.vmm = target;
        busy.assert_whole().await;
        assert!(!Path::new(&file.path).exists(), "the file is consumed");
    }
}

#[tokio::test]
async fn what_was_loaded_ahead_is_dropped_when_the_save_is_another() {
    let mut busy = Busy::new(64).await;
    let mut target = Vmm::created(busy.directory.path(), &busy.config).await;
    let request = PreCopyRequest { tell_pieces: true, ..busy.request(2) };
    let mut stream = busy.pre_copy(request).await.unwrap();
    tail_until_ready(&mut stream, &mut target).await;
    // A load that is refused keeps it.
    let wrong = StateFile { path: "/nowhere".into(), hash: vec![7; 32], epoch: 1, bytes: 1 };
    assert_refused(target.load(&wrong).await, Code::NotFound, &["/nowhere"]);
    let file = busy.save(3).await.unwrap().file.unwrap();
    busy.assert_moves(&file, 2).await;
    // The first destination hears of the other save, too, and can boot from the disks as well.
    let cold = busy.save(4).await.unwrap().file.unwrap();
    target.load(&cold).await.unwrap();
    busy.vmm.stop().await;
    target.start_within(4, 1000, false).await.unwrap();
    busy.vmm = target;
    busy.assert_whole().await;
    let mut boots = Vmm::created(busy.directory.path(), &busy.config).await;
    let request = PreCopyRequest { tell_pieces: true, ..busy.request(5) };
    let mut stream = busy.pre_copy(request).await.unwrap();
    tail_until_ready(&mut stream, &mut boots).await;
    busy.vmm.stop().await;
    boots.start_within(6, 1000, false).await.unwrap();
    boots.console().await.wait_for("filled ").await;
    busy.vmm = boots;
    busy.assert_whole().await;
}

#[tokio::test]
async fn the_command_line_saves_with_pre_copy_and_pulls_a_guest_over() {
    let mut busy = Busy::new(32).await;
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_bellwether-vmm"));
        command.args(arguments);
        command
    };
    let (socket, state) = (busy.vmm.socket(), busy.path().join("vm.state"));
    let (socket, text) = (socket.display().to_string(), state.display().to_string());
    let save = ["save", "--api-socket", &socket, "--state-file", &text, "--precopy"];
    let saved = run(&save).output().unwrap();
    let progress = String::from_utf8_lossy(&saved.stderr).into_owned();
    assert!(saved.status.success() && progress.contains("ready round"), "{progress}");
    let saved: serde_json::Value = serde_json::from_slice(&saved.stdout).unwrap();
    assert!(saved["pre_copy"]["predicted_outage_us"].as_u64().unwrap() > 0, "{saved}");
    busy.vmm.start(2).await.unwrap();
    let api = busy.path().join("second/api.sock");
    let disk = format!("path={},format=raw", busy.path().join("disk.raw").display());
    let (directory, api_text) = (busy.path().display().to_string(), api.display().to_string());
    let mut pulled = run(&["restore", "--tail", &socket, "--directory", &directory, "--consume"])
        .args(["--disk", &disk, "--api-socket", &api_text, "--lock-wait-ms", "1000"])
        .spawn()
        .unwrap();
    assert!(busy.vmm.wait_exit().await.success());
    let channel = bellwether_vmm::api::connect(&api).await.unwrap();
    busy.vmm.client = bellwether_proto::v1::vmm_client::VmmClient::new(channel);
    busy.vmm.wait_state("running", "").await;
    busy.assert_whole().await;
    busy.vmm.client.stop(bellwether_proto::v1::StopRequest {}).await.unwrap();
    assert!(pulled.wait().unwrap().success());
}
