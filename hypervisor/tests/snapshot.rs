//! Save, restore, and everything that can be wrong with a state file.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bellwether_proto::v1::{SaveReply, StateFile};
use common::{Config, Console, Vmm, assert_refused, disk, number};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tempfile::{TempDir, tempdir};
use tonic::Code;

const MIB: u64 = 1 << 20;

/// A guest with a disk that has journalled, sealed into `directory`.
struct Sealed {
    directory: TempDir,
    config: Config,
    source: Vmm,
    reply: SaveReply,
    /// Everything that the guest said before.
    lines: Vec<String>,
}

impl Sealed {
    async fn new() -> Self {
        let directory = tempdir().unwrap();
        let disk = disk(directory.path(), "disk.raw", 8 * MIB);
        let config = Config::new().with_disk(&disk);
        let mut source = Vmm::running(directory.path(), &config, 5).await;
        let mut console = source.console().await;
        console.wait_for("journal 5").await;
        console.wait_for("pattern ").await;
        let reply = source.save(directory.path(), 1).await.unwrap();
        let status = source.status().await;
        assert_eq!((status.state.as_str(), status.locked), ("sealed", true));
        let lines = drain(&mut console).await;
        Self { directory, config, source, reply, lines }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn file(&self) -> StateFile {
        self.reply.file.clone().unwrap()
    }

    fn last(&self, kind: &str) -> u64 {
        let kind = format!("{kind} ");
        number(self.lines.iter().rfind(|line| line.starts_with(&kind)).unwrap())
    }

    /// The source claims its VM back and the guest goes on.
    async fn assert_source_goes_on(&mut self, epoch: u64) {
        self.source.start(epoch).await.unwrap();
        let mut console = self.source.console().await;
        let journal = self.last("journal");
        console.wait_for(&format!("journal {}", journal + 3)).await;
    }
}

/// What is still on its way after the guest was stopped.
async fn drain(console: &mut Console) -> Vec<String> {
    while !console.is_silent_for(std::time::Duration::from_millis(100)).await {}
    console.lines.clone()
}

#[tokio::test]
async fn a_saved_guest_goes_on_in_a_new_process() {
    let mut sealed = Sealed::new().await;
    let file = sealed.file();
    assert_eq!(file.hash.len(), 32);
    assert!(sealed.reply.timings.unwrap().bytes_written > 8 * MIB);
    let mut target = Vmm::created(sealed.path(), &sealed.config).await;
    let loaded = target.load(&file).await.unwrap();
    assert_eq!(loaded.status.unwrap().state, "loaded");
    assert_refused(target.start(6).await, Code::FailedPrecondition, &["disk.raw", "in use"]);
    assert!(sealed.source.stop().await.success());
    target.start_within(6, 0, true).await.unwrap();
    let mut console = target.console().await;
    let (tick, journal) = (sealed.last("tick"), sealed.last("journal"));
    // The line that was being printed when the guest was stopped may be cut in two.
    let next = console.number("tick").await;
    assert!((tick + 1..=tick + 2).contains(&next), "tick {next} after {tick}");
    console.wait_for(&format!("journal {}", journal + 5)).await;
    console.wait_for("pattern ").await;
    console.wait_for("pattern ").await;
    target.wait_memory().await;
    target.wait_state("running", "").await;
    wait_gone(Path::new(&file.path)).await;
}

async fn wait_gone(path: &Path) {
    let gone = async {
        while path.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(common::LONG, gone).await.expect("the consumed file stays behind");
}

#[tokio::test]
async fn a_guest_moves_many_times_and_never_notices() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let config = Config::new().with_disk(&disk);
    let mut vmm = Vmm::running(directory.path(), &config, 1).await;
    let mut console = vmm.console().await;
    let mut journal = console.number("journal").await;
    for epoch in 2..8 {
        let mut target = Vmm::created(directory.path(), &config).await;
        let file = vmm.save(directory.path(), epoch).await.unwrap().file.unwrap();
        target.load(&file).await.unwrap();
        vmm.stop().await;
        target.start_within(epoch, 1000, true).await.unwrap();
        vmm = target;
        console = vmm.console().await;
        journal += 3;
        console
            .wait_until("the journal goes on", |line| {
                line.starts_with("journal ") && number(line) >= journal
            })
            .await;
    }
    console.send("stats").await;
    let stats = console.wait_for("stats ").await;
    assert!(stats.contains("ioerrors=0"), "{stats}");
}

#[tokio::test]
async fn a_save_is_repeated_with_the_same_answer_and_claimed_back_with_a_higher_epoch() {
    let mut sealed = Sealed::new().await;
    let again = sealed.source.save(sealed.directory.path(), 1).await.unwrap();
    assert_eq!(again, sealed.reply);
    assert_eq!(sealed.source.status().await.sealed.unwrap().file, sealed.reply.file);
    let other = sealed.source.save(sealed.directory.path(), 2).await;
    assert_refused(other, Code::FailedPrecondition, &["sealed as generation 1"]);
    for epoch in [4, 5] {
        let refused = sealed.source.start(epoch).await;
        assert_refused(refused, Code::Aborted, &["sealed at epoch 5", "higher"]);
    }
    sealed.assert_source_goes_on(6).await;
    // And it can be saved again, now as another epoch.
    let file = sealed.source.save(sealed.directory.path(), 1).await.unwrap().file.unwrap();
    assert_eq!(file.epoch, 6);
}

#[tokio::test]
async fn damaged_and_foreign_files_are_refused_and_the_source_goes_on() {
    let mut sealed = Sealed::new().await;
    let good = sealed.file();
    let bytes = std::fs::read(&good.path).unwrap();
    let mut refused = Vec::new();
    let mut variant =
        |name: &str, change: &dyn Fn(&mut Vec<u8>), words: &'static [&'static str]| {
            let mut copy = bytes.clone();
            change(&mut copy);
            let path = sealed.directory.path().join(name);
            std::fs::write(&path, copy).unwrap();
            refused.push((StateFile { path: path.display().to_string(), ..good.clone() }, words));
        };
    let tail = bytes.len() - 10;
    variant("truncated", &|copy| copy.truncate(copy.len() - 1), &["truncated"]);
    variant("empty", &|copy| copy.clear(), &["state file"]);
    let both =
        |at: usize| move |copy: &mut Vec<u8>| [at, 4096 + at].iter().for_each(|&at| copy[at] ^= 1);
    variant("headers", &both(40), &["both headers are damaged"]);
    variant("sealed-header", &|copy| copy[4096 + 60] ^= 1, &["sealed"]);
    variant("chunk-table", &|copy| copy[8192 + 3] ^= 1, &["chunk table"]);
    variant("sections", &|copy| copy[tail] ^= 1, &["section"]);
    variant("other-format", &both(0), &["not a state file"]);
    for (file, words) in refused {
        let mut target = Vmm::created(sealed.path(), &sealed.config).await;
        assert_refused(target.load(&file).await, Code::DataLoss, words);
        assert_eq!(target.status().await.state, "created");
        assert_refused(
            target.load(&StateFile { hash: vec![7; 32], ..good.clone() }).await,
            Code::DataLoss,
            &["hash"],
        );
        // A refusal changes nothing: the good file still loads.
        target.load(&good).await.unwrap();
    }
    let mut stranger = sealed.config.clone();
    stranger.request.vm_id = uuid::Uuid::new_v4().to_string();
    let mut target = Vmm::created(sealed.path(), &stranger).await;
    assert_refused(target.load(&good).await, Code::DataLoss, &["VM"]);
    let missing = StateFile { path: "/nowhere/x.state".into(), ..good.clone() };
    assert_refused(target.load(&missing).await, Code::NotFound, &["/nowhere/x.state"]);
    sealed.assert_source_goes_on(6).await;
}

#[tokio::test]
async fn a_machine_of_another_shape_is_refused() {
    let sealed = Sealed::new().await;
    let mut memory = sealed.config.clone();
    memory.spec().memory_mib = 128;
    let mut vcpus = sealed.config.clone();
    vcpus.spec().vcpus = 2;
    let mut no_disk = sealed.config.clone();
    no_disk.spec().disks.clear();
    for (config, words) in [
        (memory, ["64 MiB", "128 MiB"]),
        (vcpus, ["1 vCPUs", "2 and 1"]),
        (no_disk, ["1 disks", "1 and 0"]),
    ] {
        let mut target = Vmm::created(sealed.path(), &config).await;
        assert_refused(target.load(&sealed.file()).await, Code::FailedPrecondition, &words);
    }
    let mut other_disk = sealed.config.clone();
    other_disk.spec().disks.clear();
    let larger = disk(sealed.path(), "larger.raw", 16 * MIB);
    let mut target = Vmm::created(sealed.path(), &other_disk.with_disk(&larger)).await;
    assert_refused(
        target.load(&sealed.file()).await,
        Code::DataLoss,
        &["16384 sectors", "larger.raw"],
    );
}

#[tokio::test]
async fn memory_that_cannot_be_read_pauses_the_guest() {
    let mut sealed = Sealed::new().await;
    let file = sealed.file();
    // The last bytes of memory that the file has; the guest's own image is at 1 MiB and is needed.
    let state = File::options().read(true).write(true).open(&file.path).unwrap();
    let mut page = vec![0; 4096];
    let offset = (0..64 * MIB / 4096)
        .map(|page| 65536 + MIB + page * 4096)
        .find(|&offset| {
            state.read_exact_at(&mut page, offset).unwrap();
            page.iter().any(|&byte| byte != 0)
        })
        .unwrap();
    page[0] ^= 0xff;
    state.write_all_at(&page, offset).unwrap();
    let mut target = Vmm::created(sealed.path(), &sealed.config).await;
    target.load(&file).await.unwrap();
    sealed.source.stop().await;
    target.start(6).await.unwrap();
    let status = target.wait_state("paused", "io-error: ").await;
    assert!(status.reason.contains("chunk"), "{}", status.reason);
    assert_refused(target.save(sealed.path(), 2).await, Code::FailedPrecondition, &["memory"]);
    assert!(Path::new(&file.path).exists());
    assert!(target.stop().await.success());
}

/// A save into `directory` fails for want of room; the guest goes on, and a save elsewhere works.
async fn assert_survives_full_storage(vmm: &mut Vmm, full: &Path, room: &Path, words: &[&str]) {
    let mut console = vmm.console().await;
    console.wait_for("pattern ").await;
    assert_refused(vmm.save(full, 1).await, Code::ResourceExhausted, words);
    let status = vmm.status().await;
    assert_eq!((status.state.as_str(), status.reason.as_str()), ("running", ""));
    assert_eq!(std::fs::read_dir(full).unwrap().count(), 0, "a part of a file stays behind");
    console.number("tick").await;
    let before = console.number("journal").await;
    console.wait_for(&format!("journal {}", before + 3)).await;
    vmm.save(room, 2).await.unwrap();
}

#[tokio::test]
async fn the_guest_goes_on_when_a_file_cannot_grow() {
    let directory = tempdir().unwrap();
    let full = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", MIB);
    let mut vmm = Vmm::running(directory.path(), &Config::new().with_disk(&disk), 1).await;
    let pid = Pid::from_child(&vmm.child);
    let limit = |bytes| {
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(Some(pid), Resource::Fsize, limit).unwrap();
    };
    limit(Some(4 * MIB));
    let mut console = vmm.console().await;
    console.wait_for("pattern ").await;
    assert_refused(
        vmm.save(full.path(), 1).await,
        Code::ResourceExhausted,
        &["state file", "too large"],
    );
    assert_eq!(std::fs::read_dir(full.path()).unwrap().count(), 0);
    console.number("journal").await;
    limit(None);
    vmm.wait_state("running", "").await;
    vmm.save(directory.path(), 2).await.unwrap();
}

/// A small file system of its own; unmounted when dropped.
struct SmallStorage(TempDir);

impl SmallStorage {
    fn new(bytes: u64) -> Option<Self> {
        let directory = tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(directory.path())
            .status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(directory))
    }
}

impl Drop for SmallStorage {
    fn drop(&mut self) {
        let _unmounted = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn the_guest_goes_on_when_the_storage_is_full() {
    // Mounting needs root, as KVM tests in CI have it; others have the limit on a file's size above.
    let Some(full) = SmallStorage::new(4 * MIB) else {
        assert!(!rustix::process::geteuid().is_root(), "root cannot mount a tmpfs");
        return;
    };
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", MIB);
    let mut vmm = Vmm::running(directory.path(), &Config::new().with_disk(&disk), 1).await;
    assert_survives_full_storage(&mut vmm, full.0.path(), directory.path(), &["No space left"])
        .await;
}

#[tokio::test]
async fn a_missing_directory_is_refused_and_the_guest_goes_on() {
    let directory = tempdir().unwrap();
    let mut vmm = Vmm::running(directory.path(), &Config::new(), 1).await;
    let mut console = vmm.console().await;
    console.wait_for("tick 2 ").await;
    assert_refused(vmm.save(Path::new("/nowhere"), 1).await, Code::NotFound, &["/nowhere"]);
    console.number("tick").await;
}

#[tokio::test]
async fn the_command_line_saves_and_restores() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let mut vmm = Vmm::running(directory.path(), &Config::new().with_disk(&disk), 1).await;
    vmm.console().await.wait_for("journal 3").await;
    let state = directory.path().join("vm.state");
    let client = |verb: &str, socket: &Path, more: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_bellwether-vmm"));
        command.arg(verb).arg("--api-socket").arg(socket).args(more);
        command.output().unwrap()
    };
    let text = state.display().to_string();
    let saved = client("save", &vmm.socket(), &["--state-file", &text, "--stop"]);
    assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    assert!(vmm.wait_exit().await.success());
    let socket = directory.path().join("second/api.sock");
    let serial = directory.path().join("serial.log");
    let mut restored = std::process::Command::new(env!("CARGO_BIN_EXE_bellwether-vmm"))
        .args(["restore", "--state-file", &text, "--api-socket"])
        .arg(&socket)
        .args(["--disk", &format!("path={},format=raw", disk.display())])
        .args(["--serial", &format!("file={}", serial.display())])
        .spawn()
        .unwrap();
    let goes_on = async {
        while !std::fs::read_to_string(&serial).is_ok_and(|log| log.contains("journal ")) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(common::LONG, goes_on).await.unwrap();
    let status = client("status", &socket, &[]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((status["state"].as_str(), status["epoch"].as_u64()), (Some("running"), Some(2)));
    assert!(client("stop", &socket, &[]).status.success());
    assert!(restored.wait().unwrap().success());
    let gone = client("status", &socket, &[]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&gone.stderr).contains("no VMM answers"));
}
