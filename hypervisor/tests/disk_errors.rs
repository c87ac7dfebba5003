//! Storage that fails beneath a running guest.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Config, Vmm, disk};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tempfile::tempdir;

const MIB: u64 = 1 << 20;
/// VIRTIO_BLK_S_IOERR
const IO_ERROR: &str = "status=1";

#[tokio::test]
async fn a_failed_write_reaches_the_guest_and_a_later_one_succeeds() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    let mut vmm = Vmm::running(directory.path(), &Config::new().with_disk(&disk), 1).await;
    let mut console = vmm.console().await;
    console.wait_for("journal 2").await;
    let pid = Pid::from_child(&vmm.child);
    let limit = |bytes| {
        prlimit(Some(pid), Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap()
    };
    limit(Some(512));
    let error = console.wait_for("ioerror write").await;
    assert!(error.contains(IO_ERROR), "{error}");
    console.number("tick").await;
    assert_eq!(vmm.status().await.state, "running");
    limit(None);
    let next = console.number("journal").await;
    console.wait_for(&format!("journal {}", next + 3)).await;
}

#[tokio::test]
async fn a_disk_that_shrinks_fails_reads_and_not_the_vmm() {
    let directory = tempdir().unwrap();
    let disk = disk(directory.path(), "disk.raw", 8 * MIB);
    // The machine is built with the whole disk; the guest scans it after it was cut.
    let mut vmm = Vmm::created(directory.path(), &Config::new().with_disk(&disk)).await;
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(MIB).unwrap();
    vmm.start(1).await.unwrap();
    let mut console = vmm.console().await;
    let error = console.wait_for("ioerror read").await;
    assert!(error.contains(IO_ERROR), "{error}");
    console.number("tick").await;
}
