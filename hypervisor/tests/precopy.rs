//! Pre-copy of a running guest, as an agent orders it, with the guest that checks its own memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::Duration;

use bellwether_proto::v1::{
    AbortPreCopyRequest, PreCopyProgress, PreCopyRequest, SaveReply, StateFile,
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
    let mut busy = Busy::new(64).await;
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
