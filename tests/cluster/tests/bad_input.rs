//! What an administrator can get wrong: refused, with the thing and the reason in the answer, and
//! without a trace in the cluster.
#![forbid(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bellwether_cluster_tests::{Cases, Cluster, Options, wait_for};
use bellwether_proto::v1;
use tonic::Code;

const SOON: Duration = Duration::from_secs(30);
/// The exit codes of `bell`.
const REFUSED: i32 = 1;
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const CONFLICT: i32 = 4;

#[tokio::test]
async fn bad_input_is_refused_with_its_reason() -> Result<()> {
    let options = Options { failpoints: true, ..Options::patient(2) };
    let cluster = Cluster::start(options).await?;
    let mut cases = Cases::new();
    cases.run("kernels", kernels(&cluster)).await;
    cases.run("disks", disks(&cluster)).await;
    cases.run("a disk that another process has locked", locked_disk(&cluster)).await;
    cases.run("sizes", sizes(&cluster)).await;
    cases.run("a kernel whose segments do not fit", huge_segments(&cluster)).await;
    cases.run("a running VM", running_vm(&cluster)).await;
    cases.run("a VMM that dies", dying_vmm(&cluster)).await;
    cases.finish()?;
    cluster.finish()
}

/// The words in which `bell vm create` describes a VM.
struct Described {
    name: String,
    kernel: PathBuf,
    disk: Option<PathBuf>,
    memory: &'static str,
}

impl Described {
    fn new(cluster: &Cluster, name: &str) -> Self {
        let kernel = cluster.binaries().guest.clone();
        Self { name: name.to_owned(), kernel, disk: None, memory: "64M" }
    }

    async fn refused(&self, cluster: &Cluster, code: i32, words: &[&str]) -> Result<()> {
        let kernel = self.kernel.display().to_string();
        let disk = self.disk.as_ref().map(|disk| format!("path={},format=raw", disk.display()));
        let mut line = vec!["vm", "create", self.name.as_str(), "--memory", self.memory];
        line.extend(["--kernel", kernel.as_str(), "--start"]);
        if let Some(disk) = &disk {
            line.extend(["--disk", disk.as_str()]);
        }
        let refused = cluster.bell().refused(&line, code, words).await;
        // Should it have been created after all, the next case must not stumble over it.
        let there = cluster.admin().vm(&self.name).await.is_ok();
        if there {
            cluster.remove(&self.name).await?;
        }
        refused?;
        ensure!(!there, "VM {} was refused and is there all the same", self.name);
        Ok(())
    }
}

async fn kernels(cluster: &Cluster) -> Result<()> {
    let described = |kernel: PathBuf| Described { kernel, ..Described::new(cluster, "bad-kernel") };
    let missing = cluster.storage().join("no-such-kernel");
    described(missing).refused(cluster, REFUSED, &["no-such-kernel", "not there"]).await?;

    let text = cluster.storage().join("text");
    std::fs::write(&text, "this is no kernel\n")?;
    described(text).refused(cluster, REFUSED, &["text", "ELF"]).await?;

    let large = cluster.storage().join("large.elf");
    std::fs::copy(&cluster.binaries().guest, &large)?;
    File::options().write(true).open(&large)?.set_len(65 << 20)?;
    described(large).refused(cluster, REFUSED, &["large.elf", "memory"]).await
}

async fn disks(cluster: &Cluster) -> Result<()> {
    let described =
        |disk: PathBuf| Described { disk: Some(disk), ..Described::new(cluster, "bad-disk") };
    let missing = cluster.storage().join("no-such-disk.raw");
    described(missing).refused(cluster, REFUSED, &["no-such-disk.raw", "not there"]).await?;

    let odd = cluster.storage().join("odd.raw");
    File::create(&odd)?.set_len(1000)?;
    described(odd).refused(cluster, REFUSED, &["odd.raw", "512"]).await?;

    let empty = cluster.storage().join("empty.raw");
    File::create(&empty)?;
    described(empty).refused(cluster, REFUSED, &["empty.raw", "512"]).await?;
    described(cluster.storage().to_owned()).refused(cluster, REFUSED, &["not a regular file"]).await
}

async fn locked_disk(cluster: &Cluster) -> Result<()> {
    let guest = cluster.guest("locked")?;
    let disk = guest.disk.clone().context("the guest has a disk")?;
    let file = File::options().read(true).write(true).open(&disk)?;
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    cluster.admin().create_vm(&guest.spec(), false).await?;
    let answer = cluster.bell().run(&["vm", "start", "locked", "--timeout", "60s"]).await?;
    ensure!(answer.code != 0, "a VM whose disk is locked was started");
    ensure!(
        answer.err.contains("locked.raw") && answer.err.to_lowercase().contains("lock"),
        "the answer does not say what is wrong with which disk: {}",
        answer.err
    );
    is_left_alone(cluster, "locked").await?;
    drop(file);
    cluster.bell().text(&["vm", "start", "locked"]).await.context("after the lock is gone")?;
    cluster.remove("locked").await
}

async fn sizes(cluster: &Cluster) -> Result<()> {
    let described = |memory| Described { memory, ..Described::new(cluster, "bad-size") };
    described("0M").refused(cluster, USAGE, &["memory"]).await?;
    described("1000G").refused(cluster, REFUSED, &["memory", "MiB"]).await?;
    // The same past `bell`, which refuses some things by itself.
    let spec = cluster.guest("bad-size")?.memory_mib(0).spec();
    match cluster.admin().create_vm(&spec, true).await {
        Err(status) if status.code() == Code::InvalidArgument => {}
        other => bail!("a VM without memory: {other:?}"),
    }
    let spec = v1::VmSpec { vcpus: 65, ..cluster.guest("bad-size")?.spec() };
    match cluster.admin().create_vm(&spec, true).await {
        Err(status) if status.message().contains("vCPUs") => {}
        other => bail!("a VM with 65 vCPUs: {other:?}"),
    }
    Ok(())
}

/// A person's start that failed is over: the person was told, and nothing goes on by itself.
async fn is_left_alone(cluster: &Cluster, name: &str) -> Result<()> {
    wait_for("the VM to be left stopped", Duration::from_secs(10), async || {
        let vm = cluster.admin().vm(name).await?;
        match vm.task == 0 && vm.state == "stopped" && vm.desired == "stopped" {
            true => Ok(Some(())),
            false => bail!("it is {}, wanted {}, task {}", vm.state, vm.desired, vm.task),
        }
    })
    .await
}

/// A kernel whose file is small and whose segments are larger than the memory: only the VMM can see
/// that, so that it comes out when the VM is started.
async fn huge_segments(cluster: &Cluster) -> Result<()> {
    let kernel = cluster.storage().join("segments.elf");
    enlarge_segment(&cluster.binaries().guest, &kernel, 1 << 30)?;
    let mut guest = cluster.guest("segments")?;
    guest.kernel = kernel;
    let answer = cluster.admin().create_vm(&guest.spec(), true).await;
    let text = match answer {
        Err(status) => status.message().to_owned(),
        Ok(reply) => {
            let task = cluster.admin().task_ended(reply.task, SOON).await?;
            ensure!(task.outcome == "failed", "a kernel of 1 GiB was started in 64 MiB");
            is_left_alone(cluster, "segments").await?;
            cluster.remove("segments").await?;
            task.error
        }
    };
    ensure!(text.contains("segments.elf") && text.contains("memory"), "the reason is: {text}");
    Ok(())
}

/// Copies an ELF image and makes its last loadable segment as large as this in memory.
fn enlarge_segment(from: &Path, to: &Path, bytes: u64) -> Result<()> {
    let mut image = std::fs::read(from)?;
    let number = |image: &[u8], at: usize, len: usize| {
        image[at..at + len].iter().rev().fold(0_usize, |n, byte| n << 8 | usize::from(*byte))
    };
    let (table, size, count) =
        (number(&image, 32, 8), number(&image, 54, 2), number(&image, 56, 2));
    let mut headers = (0..count).map(|index| table + index * size);
    let load = headers.rfind(|at| number(&image, *at, 4) == 1);
    let at = load.context("the guest has a loadable segment")? + 40;
    image[at..at + 8].copy_from_slice(&bytes.to_le_bytes());
    std::fs::write(to, image).context("write the image")
}

async fn running_vm(cluster: &Cluster) -> Result<()> {
    let bell = cluster.bell();
    let watch = cluster.run(&cluster.guest("web")?).await?;
    let home = cluster.home_of("web").await?;
    let home_name = format!("node{home}");
    let other = format!("node{}", cluster.other_than(&[home])?);

    bell.refused(&["vm", "show", "nobody"], NOT_FOUND, &["nobody"]).await?;
    bell.refused(&["vm", "migrate", "web", "--to", "nowhere"], NOT_FOUND, &["nowhere"]).await?;
    bell.refused(&["vm", "start", "web", "--on", "nowhere"], NOT_FOUND, &["nowhere"]).await?;
    bell.refused(&["node", "drain", "nowhere"], NOT_FOUND, &["nowhere"]).await?;
    bell.refused(&["vm", "migrate", "web", "--to", &home_name], CONFLICT, &["web", &home_name])
        .await?;
    bell.refused(&["vm", "delete", "web"], CONFLICT, &["web", "running|stop"]).await?;
    bell.refused(
        &["node", "confirm-down", &home_name, "--confirm", &home_name],
        CONFLICT,
        &[&home_name],
    )
    .await?;

    let hold = cluster.failpoints()?.hold("task.migrate.seal.before")?;
    let first = bell.json(&["vm", "migrate", "web", "--to", &other, "--no-wait"]).await?;
    hold.wait_reached(SOON).await?;
    bell.refused(&["vm", "migrate", "web", "--to", &other], CONFLICT, &["migrate", "working"])
        .await?;
    bell.refused(&["vm", "save", "web"], CONFLICT, &["working"]).await?;
    hold.let_go();
    let task = first["task_id"].as_u64().context("`bell vm migrate --no-wait` names no task")?;
    cluster.admin().task_done(task, SOON).await?;
    ensure!(format!("node{}", cluster.home_of("web").await?) == other);

    let twin = cluster.guest("web2")?;
    let spec = v1::VmSpec { disks: cluster.guest("web")?.spec().disks, ..twin.spec() };
    match cluster.admin().create_vm(&spec, true).await {
        Err(status) if status.message().contains("web") => {}
        answer => bail!("a second VM on one disk: {answer:?}"),
    }
    watch.ticks_on(SOON).await?;
    watch.check()?;
    drop(watch);
    cluster.remove("web").await
}

/// A VM that is not to be restarted stays stopped when its VMM dies, until somebody starts it.
async fn dying_vmm(cluster: &Cluster) -> Result<()> {
    let mut guest = cluster.guest("crash")?;
    guest.never_restart = true;
    let watch = cluster.run(&guest).await?;
    let vmm = cluster.home_of("crash").await?;
    ensure!(cluster.kill_vmm(vmm, watch.vm_id()) == 1, "there is one VMM to kill");
    wait_for("the VM to be left stopped", SOON, async || {
        let vm = cluster.admin().settled("crash", &["stopped"], SOON).await?;
        Ok((vm.desired == "stopped").then_some(()))
    })
    .await?;
    cluster.bell().text(&["vm", "start", "crash"]).await?;
    watch.ticks_on(SOON).await?;
    watch.check()?;
    drop(watch);
    cluster.remove("crash").await
}
