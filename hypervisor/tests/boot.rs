//! A VM's plain life: boot, run, pause, end; and what is refused with which words.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use bellwether_proto::v1::{Nic, PauseRequest, ResumeRequest};
use common::{Config, Vmm, assert_refused, disk, guest};
use tempfile::tempdir;
use tonic::Code;

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn the_guest_boots_ticks_and_journals() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let mut vmm = Vmm::running(directory.path(), &Config::new().with_disk(&disk), 3).await;
    let mut console = vmm.console().await;
    let found = console.wait_for("disk sectors=").await;
    assert!(found.contains("sectors=16384 ro=0 records=0"), "{found}");
    let first = console.number("tick").await;
    console
        .wait_until("ten ticks more", |line| line.starts_with(&format!("tick {} ", first + 10)))
        .await;
    console.wait_for("journal 3").await;
    console.wait_for("pattern ").await;
    assert!(!console.lines.iter().any(|line| line.starts_with("warn")), "{:#?}", console.lines);
    let status = vmm.status().await;
    assert_eq!((status.state.as_str(), status.epoch, status.locked), ("running", 3, true));
    assert!(status.vcpu_exits > 100);
}

#[tokio::test]
async fn a_guest_with_64_vcpus_boots_and_is_restored() {
    let directory = tempdir().unwrap();
    let mut config = Config::new();
    config.spec().vcpus = 64;
    let mut source = Vmm::running(directory.path(), &config, 1).await;
    source.console().await.wait_for("tick 3 ").await;
    let file = source.save(directory.path(), 1).await.unwrap().file.unwrap();
    let mut target = Vmm::created(directory.path(), &config).await;
    target.load(&file).await.unwrap();
    source.stop().await;
    target.start(2).await.unwrap();
    target.console().await.wait_for("pattern ").await;
    target.client.pause(PauseRequest {}).await.unwrap();
    assert_eq!(target.status().await.state, "paused");
}

#[tokio::test]
async fn a_paused_guest_says_nothing_and_goes_on_when_resumed() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let mut vmm = Vmm::running(directory.path(), &Config::new().with_disk(&disk), 1).await;
    let mut console = vmm.console().await;
    console.wait_for("journal 2").await;
    let paused = vmm.client.pause(PauseRequest {}).await.unwrap().into_inner();
    assert_eq!((paused.state.as_str(), paused.reason.as_str()), ("paused", "administrator"));
    // What was written before the pause is still on its way.
    while !console.is_silent_for(Duration::from_millis(150)).await {}
    let exits = vmm.status().await.vcpu_exits;
    assert!(console.is_silent_for(Duration::from_millis(150)).await);
    assert_eq!(vmm.status().await.vcpu_exits, exits);
    vmm.client.resume(ResumeRequest {}).await.unwrap();
    console.number("tick").await;
    console.number("journal").await;
}

#[tokio::test]
async fn each_end_of_a_guest_is_recorded_with_its_exit_status() {
    for (command, reason, code) in [
        ("poweroff", "guest-shutdown", 0),
        ("reset", "guest-reset", 3),
        ("crash", "triple-fault", 4),
    ] {
        let directory = tempdir().unwrap();
        let mut vmm = Vmm::running(directory.path(), &Config::new(), 7).await;
        let mut console = vmm.console().await;
        console.wait_for("tick 1 ").await;
        console.send(command).await;
        let status = vmm.wait_exit().await;
        assert_eq!(status.code(), Some(code), "{command}");
        let record = vmm.exit_record();
        assert_eq!(record["reason"], reason);
        assert_eq!(
            (record["epoch"].as_u64(), record["state"].as_str()),
            (Some(7), Some("running"))
        );
        assert!(!vmm.socket().exists(), "the socket stays behind");
    }
}

#[tokio::test]
async fn a_stop_and_a_sigterm_leave_nothing_behind() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let config = Config::new().with_disk(&disk);
    let mut vmm = Vmm::running(directory.path(), &config, 1).await;
    assert_eq!(std::fs::metadata(vmm.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(&vmm.directory).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(vmm.stop().await.success());
    assert_eq!(vmm.exit_record()["reason"], "stopped");
    assert!(!vmm.socket().exists());
    // The disk is free at once.
    let mut vmm = Vmm::running(directory.path(), &config, 2).await;
    let pid = rustix::process::Pid::from_child(&vmm.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(vmm.wait_exit().await.success());
    assert_eq!(vmm.exit_record()["reason"], "signal");
    assert!(!vmm.socket().exists());
}

#[tokio::test]
async fn an_empty_vmm_refuses_what_needs_a_machine() {
    let directory = tempdir().unwrap();
    let mut vmm = Vmm::spawn(directory.path()).await;
    assert_eq!(vmm.status().await.state, "empty");
    assert_refused(vmm.start(1).await, Code::FailedPrecondition, &["start", "empty"]);
    assert_refused(
        vmm.save(directory.path(), 1).await,
        Code::FailedPrecondition,
        &["save", "empty"],
    );
    vmm.create(&Config::new()).await.unwrap();
    assert_refused(
        vmm.create(&Config::new()).await,
        Code::FailedPrecondition,
        &["one process runs one VM"],
    );
    assert_refused(vmm.start(0).await, Code::InvalidArgument, &["epoch"]);
}

/// Starts with this kernel; the VMM must refuse, stay as it was, and let go of what it took.
async fn assert_kernel_refused(kernel: &Path, memory_mib: u64, code: Code, words: &[&str]) {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let mut config = Config::new().with_disk(&disk);
    config.spec().kernel = kernel.display().to_string();
    config.spec().memory_mib = memory_mib;
    let mut vmm = Vmm::created(directory.path(), &config).await;
    assert_refused(vmm.start(1).await, code, words);
    let status = vmm.status().await;
    assert_eq!((status.state.as_str(), status.locked), ("created", false));
    assert!(vmm.stop().await.success());
}

#[tokio::test]
async fn bad_kernels_are_refused_with_the_reason() {
    let directory = tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    assert_kernel_refused(&path("none"), 64, Code::NotFound, &["open kernel", "none"]).await;
    std::fs::write(path("text"), "#!/bin/sh\nexit 0\n".repeat(10)).unwrap();
    assert_kernel_refused(
        &path("text"),
        64,
        Code::InvalidArgument,
        &["neither a 64-bit x86 ELF", "nor a bzImage"],
    )
    .await;
    std::fs::write(path("short"), b"\x7fELF").unwrap();
    assert_kernel_refused(&path("short"), 64, Code::InvalidArgument, &["ends in the middle"]).await;
    // This test itself is an ELF executable without a PVH note.
    let ordinary = std::env::current_exe().unwrap();
    assert_kernel_refused(&ordinary, 64, Code::InvalidArgument, &["no PVH entry point"]).await;
    // The guest's image with the size in memory of its last segment made enormous.
    let mut image = std::fs::read(guest()).unwrap();
    let headers = u64::from_le_bytes(image[32..40].try_into().unwrap()) as usize;
    let count = usize::from(u16::from_le_bytes(image[56..58].try_into().unwrap()));
    let last_load =
        (0..count).map(|index| headers + index * 56).rfind(|&at| image[at] == 1).unwrap();
    image[last_load + 40..last_load + 48].copy_from_slice(&(1u64 << 30).to_le_bytes());
    std::fs::write(path("large"), image).unwrap();
    assert_kernel_refused(
        &path("large"),
        64,
        Code::InvalidArgument,
        &["does not fit", "more memory"],
    )
    .await;
}

#[tokio::test]
async fn bad_machines_are_refused_at_creation() {
    let directory = tempdir().unwrap();
    let odd = disk(directory.path(), "odd.raw", 1000);
    let empty = disk(directory.path(), "empty.raw", 0);
    let missing = directory.path().join("missing.raw");
    let disks: [(&Path, Code, &[&str]); 4] = [
        (&odd, Code::InvalidArgument, &["odd.raw", "1000 bytes", "multiple of 512"]),
        (&empty, Code::InvalidArgument, &["empty.raw", "empty"]),
        (&missing, Code::NotFound, &["missing.raw", "open disk"]),
        (directory.path(), Code::Internal, &["open disk"]),
    ];
    let mut vmm = Vmm::spawn(directory.path()).await;
    for (path, code, words) in disks {
        assert_refused(vmm.create(&Config::new().with_disk(path)).await, code, words);
    }
    let mut config = Config::new();
    for memory_mib in [0, 3] {
        config.spec().memory_mib = memory_mib;
        assert_refused(vmm.create(&config).await, Code::InvalidArgument, &["MiB of memory"]);
    }
    let mut config = Config::new();
    for vcpus in [0, 65] {
        config.spec().vcpus = vcpus;
        let words = format!("{vcpus} vCPUs");
        assert_refused(vmm.create(&config).await, Code::InvalidArgument, &[&words, "1 to 64"]);
    }
    let mut config = Config::new();
    config.spec().nics = vec![Nic { bridge: "bw-nowhere".into(), ..Default::default() }];
    let words = ["no bridge `bw-nowhere`", "ip link add"];
    assert_refused(vmm.create(&config).await, Code::NotFound, &words);
    let mut config = Config::new();
    config.request.arbiter = "lease".into();
    assert_refused(vmm.create(&config).await, Code::InvalidArgument, &["lease page"]);
    // After all of that it still does its work.
    vmm.create(&Config::new()).await.unwrap();
    vmm.start(1).await.unwrap();
    vmm.console().await.wait_for("tick 1 ").await;
}

#[tokio::test]
async fn an_image_of_another_format_is_refused_before_the_guest_starts() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("disk.img");
    let mut vmm = Vmm::spawn(directory.path()).await;
    let mut image = vec![0; MIB as usize];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    std::fs::write(&path, &image).unwrap();
    vmm.create(&Config::new().with_disk(&path)).await.unwrap();
    let words = ["disk.img", "given as raw", "qcow2", "qemu-img convert"];
    assert_refused(vmm.start(1).await, Code::InvalidArgument, &words);
    let status = vmm.status().await;
    assert_eq!((status.state.as_str(), status.locked), ("created", false));
    assert_eq!(std::fs::read(&path).unwrap(), image);
    // What it says as a remedy works.
    image[..8].fill(0);
    std::fs::write(&path, &image).unwrap();
    vmm.start(1).await.unwrap();
    vmm.console().await.wait_for("journal 2").await;
}

#[tokio::test]
async fn the_command_line_runs_a_guest_and_passes_its_end_on() {
    let directory = tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let run = |serial: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_bellwether-vmm"));
        command.args([
            "run",
            "--memory",
            "64M",
            "--cmdline",
            "tick_ms=10 mem_mib=900 on_fatal=poweroff",
        ]);
        command.arg("--kernel").arg(guest()).args(["--serial", serial]);
        command.stdin(std::process::Stdio::null());
        command
    };
    // The guest finds too little memory and switches itself off.
    let output = run("stdio").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("FATAL memory"), "{text}");
    let to_file = run(&format!("file={}", path("serial.log").display())).status().unwrap();
    assert!(to_file.success());
    assert!(std::fs::read_to_string(path("serial.log")).unwrap().contains("exit fatal"));
    let wrong = run("stdio").args(["--disk", "path=/nowhere.raw,format=raw"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("open disk /nowhere.raw"));
    let usage = run("stdio").args(["--disk", "path=/nowhere.raw"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
}
