//! The storage has no room for the state: the guest goes on where it is.
#![forbid(unsafe_code)]
// Whoever reads the log should know that nothing was tested.
#![allow(clippy::print_stderr)]

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bellwether_cluster_tests::lines::Line;
use bellwether_cluster_tests::storage::Storage;
use bellwether_cluster_tests::{Cluster, Options, StorageKind, Watch};

const SOON: Duration = Duration::from_secs(60);
const VM: &str = "big";

#[tokio::test]
async fn a_full_storage_stops_no_guest() -> Result<()> {
    if !Storage::can_mount() {
        eprintln!("skipped: this process may not mount a file system of its own");
        return Ok(());
    }
    let storage = StorageKind::Tmpfs { mib: 64 };
    let cluster = Cluster::start(Options { storage, ..Options::patient(2) }).await?;
    let guest = cluster.guest(VM)?.memory_mib(128);
    let guest = guest.cmdline("tick_ms=10 mem_mib=16 verify_mib_s=64 journal_ms=50 fill=100");
    let watch = cluster.run(&guest).await?;
    watch
        .heard_since(0, "the guest to fill its memory", SOON, |line| *line == Line::Filled)
        .await?;

    let home = cluster.home_of(VM).await?;
    let save = cluster.admin().save(VM).await?;
    fails_for_space(&cluster, &watch, save, home).await.context("save")?;
    let to = cluster.other_than(&[home])?;
    let migrate = cluster.admin().migrate(VM, &format!("node{to}")).await?;
    fails_for_space(&cluster, &watch, migrate, home).await.context("migrate")?;

    grow(cluster.storage())?;
    cluster.migrate(VM, to).await.context("with room the same move works")?;
    watch.ticks_on(SOON).await?;
    watch.verifies_again(SOON).await?;
    ensure!(watch.record().boots() == 1, "the guest booted anew");
    watch.check()?;
    drop(watch);
    cluster.finish()
}

/// The task fails and says why; nothing of it stays on the storage; the guest has not stopped.
async fn fails_for_space(cluster: &Cluster, watch: &Watch, task: u64, home: usize) -> Result<()> {
    let task = cluster.admin().task_ended(task, SOON).await?;
    ensure!(task.outcome == "failed", "there was room: {:?}", task.log);
    ensure!(task.error.to_lowercase().contains("space"), "the reason is: {}", task.error);
    let vm = cluster.admin().settled(VM, &["running"], SOON).await?;
    ensure!(cluster.number_of(&vm.node)? == home, "it is on {} now", vm.node);
    watch.ticks_on(SOON).await?;
    ensure!(watch.record().boots() == 1, "the guest booted anew");
    let left = state_files(cluster.storage())?;
    ensure!(left.is_empty(), "files that nobody can use are left: {left:?}");
    ensure!(cluster.running_instances(watch.vm_id()).await.len() == 1);
    watch.check()
}

fn state_files(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(state_files(&path)?);
        } else if path.to_string_lossy().contains(".state") {
            found.push(path.display().to_string());
        }
    }
    Ok(found)
}

fn grow(storage: &Path) -> Result<()> {
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount_remount(storage, flags, c"size=512m").context("make the storage larger")
}
