//! Saved VMs: their memory comes back intact on any node, and a state file that is not the one that
//! was sealed is refused with the reason, while the VM stays saved.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bellwether_cluster_tests::{Cases, Cluster, Options, Watch, wait_for};
use bellwether_proto::v1;
use xxhash_rust::xxh3::xxh3_64;

const SOON: Duration = Duration::from_secs(40);

/// Places in the header, which docs/formats.md gives: the slot that a seal writes, the version and
/// the checksum in it, and the offset of the memory.
const SEALED_SLOT: u64 = 4096;
const SLOT_BYTES: usize = 4096;
const VERSION_AT: usize = 8;
const CHECKSUM_AT: usize = SLOT_BYTES - 8;
const MEMORY_OFFSET_AT: u64 = SEALED_SLOT + 120;

#[tokio::test]
async fn state_files_come_back_whole_or_not_at_all() -> Result<()> {
    let cluster = Cluster::start(Options::patient(2)).await?;
    let saved = Saved::create(&cluster).await?;
    let mut cases = Cases::new();
    cases.run("truncated", saved.refused(truncate, "truncated|instead of")).await;
    cases.run("empty", saved.refused(empty, "truncated|instead of|state file")).await;
    cases.run("a bit flipped in the header", saved.refused(flip_header, "hash|damaged|seal")).await;
    cases
        .run("a bit flipped in a device's state", saved.refused(flip_end, "damaged|checksum|hash"))
        .await;
    cases.run("of a newer version", saved.refused(newer, "newer|version")).await;
    cases.run("of another VM", saved.of_another_vm()).await;
    cases.run("restored on another node", saved.restored()).await;
    cases.run("missing", missing(&cluster)).await;
    cases.run("a bit flipped in memory", flipped_memory(&cluster)).await;
    cases.finish()?;
    drop(saved);
    cluster.finish()
}

/// Two saved VMs, with good copies of their files.
struct Saved<'a> {
    cluster: &'a Cluster,
    watch: Watch,
    file: PathBuf,
    good: PathBuf,
    other: PathBuf,
    home: usize,
    boots: usize,
}

impl<'a> Saved<'a> {
    async fn create(cluster: &'a Cluster) -> Result<Self> {
        let watch = cluster.run(&cluster.guest("alpha")?).await?;
        watch.verifies_again(SOON).await?;
        let home = cluster.home_of("alpha").await?;
        let file = save(cluster, "alpha").await?;
        let good = copy(&file)?;
        drop(cluster.run(&cluster.guest("beta")?).await?);
        let other = copy(&save(cluster, "beta").await?)?;
        let boots = watch.record().boots();
        Ok(Self { cluster, watch, file, good, other, home, boots })
    }

    /// Spoils the file, and expects the restore to be refused with one of these words.
    async fn refused(&self, spoil: fn(&Path) -> Result<()>, words: &str) -> Result<()> {
        spoil(&self.file)?;
        let refused = self.try_restore(words).await;
        std::fs::copy(&self.good, &self.file).context("put the good file back")?;
        refused
    }

    async fn of_another_vm(&self) -> Result<()> {
        std::fs::copy(&self.other, &self.file)?;
        let refused = self.try_restore("belongs to|hash").await;
        std::fs::copy(&self.good, &self.file).context("put the good file back")?;
        refused
    }

    async fn try_restore(&self, words: &str) -> Result<()> {
        let task = self.cluster.admin().restore("alpha", "").await?;
        let task = self.cluster.admin().task_ended(task, SOON).await?;
        ensure!(task.outcome == "failed", "it was restored: {:?}", task.log);
        let said = format!("{} {:?}", task.error, task.log).to_lowercase();
        ensure!(
            words.split('|').any(|word| said.contains(word)),
            "no word of `{words}` in: {said}"
        );
        let vm = self.cluster.admin().settled("alpha", &["saved"], SOON).await?;
        ensure!(vm.state_file.is_some(), "the VM has no state file any more");
        let running = self.cluster.running_instances(self.watch.vm_id()).await;
        ensure!(running.is_empty(), "it runs all the same: {running:?}");
        ensure!(self.file.exists(), "the file was removed");
        self.watch.check()
    }

    async fn restored(&self) -> Result<()> {
        let to = format!("node{}", self.cluster.other_than(&[self.home])?);
        self.cluster.bell().text(&["vm", "restore", "alpha", "--on", &to]).await?;
        self.watch.ticks_on(SOON).await?;
        self.watch.verifies_again(SOON).await?;
        ensure!(self.watch.record().boots() == self.boots, "the guest booted anew");
        ensure!(self.cluster.admin().vm("alpha").await?.node == to, "it is not on {to}");
        self.watch.check()?;
        wait_for("the consumed file to be removed", SOON, async || {
            Ok((!self.file.exists()).then_some(()))
        })
        .await?;
        std::fs::copy(&self.good, &self.file).context("lay the consumed file there again")?;
        let again = self.cluster.bell().run(&["vm", "restore", "alpha"]).await?;
        let running = self.cluster.running_instances(self.watch.vm_id()).await.len();
        ensure!(running == 1, "restored twice: {running} run; bell said {again:?}");
        self.watch.check()
    }
}

/// The storage may only be away for a while: the VM stays saved, and comes back with its file.
async fn missing(cluster: &Cluster) -> Result<()> {
    let vm = cluster.admin().vm("beta").await?;
    let file = PathBuf::from(vm.state_file.context("beta is saved")?.path);
    let away = file.with_extension("away");
    std::fs::rename(&file, &away)?;
    let task = cluster.admin().restore("beta", "").await?;
    let task = cluster.admin().task_ended(task, SOON).await?;
    let told = task.error.to_lowercase();
    ensure!(task.outcome == "failed" && told.contains("no such file"), "it ended: {}", task.error);
    let vm = cluster.admin().settled("beta", &["saved"], SOON).await?;
    ensure!(vm.desired == "saved", "it is still wanted {}", vm.desired);
    std::fs::rename(&away, &file)?;
    cluster.bell().text(&["vm", "restore", "beta"]).await?;
    cluster.admin().settled("beta", &["running"], SOON).await.map(|_| ())
}

/// Saves a VM, and gives the path of its state file.
async fn save(cluster: &Cluster, name: &str) -> Result<PathBuf> {
    cluster.bell().text(&["vm", "save", name]).await?;
    let vm = cluster.admin().settled(name, &["saved"], SOON).await?;
    let file = vm.state_file.context("a saved VM has a state file")?;
    ensure!(file.bytes > 0 && Path::new(&file.path).is_file(), "there is no {}", file.path);
    Ok(file.path.into())
}

fn copy(file: &Path) -> Result<PathBuf> {
    let good = file.with_extension("good");
    std::fs::copy(file, &good).with_context(|| format!("copy {}", file.display()))?;
    Ok(good)
}

fn open(file: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open(file)
        .with_context(|| format!("open {}", file.display()))
}

fn truncate(file: &Path) -> Result<()> {
    let file = open(file)?;
    let half = file.metadata()?.len() / 2;
    file.set_len(half).context("truncate")
}

fn empty(file: &Path) -> Result<()> {
    open(file)?.set_len(0).context("empty")
}

fn flip(file: &File, at: u64) -> Result<()> {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 0x10], at).context("flip a bit")
}

fn flip_header(file: &Path) -> Result<()> {
    flip(&open(file)?, SEALED_SLOT + 64)
}

/// The devices' sections lie at the end.
fn flip_end(file: &Path) -> Result<()> {
    let file = open(file)?;
    let length = file.metadata()?.len();
    flip(&file, length - 20)
}

/// A header of a version to come, with a right checksum.
fn newer(file: &Path) -> Result<()> {
    let file = open(file)?;
    let mut slot = [0; SLOT_BYTES];
    file.read_exact_at(&mut slot, SEALED_SLOT)?;
    slot[VERSION_AT] = u8::MAX;
    let checksum = xxh3_64(&slot[..CHECKSUM_AT]);
    slot[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    file.write_all_at(&slot, SEALED_SLOT).context("write the header")
}

/// Memory is loaded on demand, so the damage is found when the guest needs the page, or before: the
/// guest must never see it, the administrator must learn of it, and the VM can be started anew.
async fn flipped_memory(cluster: &Cluster) -> Result<()> {
    let guest = cluster.guest("gamma")?.cmdline("mem_mib=16 verify_mib_s=64 fill=100");
    let watch = cluster.run(&guest).await?;
    let filled = |line: &bellwether_cluster_tests::lines::Line| {
        *line == bellwether_cluster_tests::lines::Line::Filled
    };
    watch.heard_since(0, "the guest to fill its memory", SOON, filled).await?;
    // Without rounds all memory is loaded on demand; damage in a later round is found by the load,
    // like that in a device's state.
    cluster.bell().text(&["vm", "set", "gamma", "--pre-copy", "never"]).await?;
    let path = save(cluster, "gamma").await?;
    let file = open(&path)?;
    let mut offset = [0; 8];
    file.read_exact_at(&mut offset, MEMORY_OFFSET_AT)?;
    let start = u64::from_le_bytes(offset);
    // Everywhere, so that it does not matter which pages the guest needs first.
    for at in (start..file.metadata()?.len() - (1 << 20)).step_by(64 << 10) {
        flip(&file, at + 100)?;
    }
    let boots = watch.record().boots();
    let task = cluster.admin().restore("gamma", "").await?;
    let task = cluster.admin().task_ended(task, SOON).await?;
    told(cluster, &task).await?;
    watch.check().context("the guest saw the damage")?;
    // Its memory is lost, and a person has to decide that; its disk is not.
    if cluster.admin().settled("gamma", &["paused", "saved", "running"], SOON).await?.state
        != "running"
    {
        cluster
            .bell()
            .text(&["vm", "stop", "gamma", "--yes"])
            .await
            .context("give the memory up")?;
        cluster.bell().text(&["vm", "start", "gamma"]).await.context("start it anew")?;
    }
    wait_for("the VM to boot anew", SOON, async || {
        Ok((watch.record().boots() > boots).then_some(()))
    })
    .await?;
    watch.ticks_on(SOON).await?;
    watch.check()
}

/// The reason must reach the administrator: in the task, in the VM, or in the events.
async fn told(cluster: &Cluster, task: &v1::Task) -> Result<()> {
    let is_it = |text: &str| {
        let text = text.to_lowercase();
        ["damaged", "checksum"].iter().any(|word| text.contains(word))
    };
    wait_for("the damage to be told", SOON, async || {
        let vm = cluster.admin().vm("gamma").await?;
        let events = cluster.bell().text(&["event", "list"]).await?;
        let told = [&task.error, &vm.reason, &vm.pending, &events].iter().any(|text| is_it(text));
        match told {
            true => Ok(Some(())),
            false => {
                bail!("VM: {} {}; task: {}; events: {events}", vm.reason, vm.pending, task.error)
            }
        }
    })
    .await
}
