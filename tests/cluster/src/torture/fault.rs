//! The faults, how they strike and how they are mended.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FallocateFlags, fallocate};

use crate::Cluster;
use crate::migration::{Move, Victim};
use crate::process::{self, Found, processes_of};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// None: the move alone must go well, too.
    Nothing,
    /// SIGKILL; started again at once, as a service manager does.
    Kill(Victim),
    /// SIGSTOP, and SIGCONT later. A VMM that stands is a write that stalls.
    Stop(Victim),
    /// The storage has no byte left.
    Full,
    /// The writer dies, and the end of its file with it.
    TornTail,
    /// The directory of state files is not there, as when a mount goes away.
    DirectoryGone,
}

use Victim::{DestinationAgent, DestinationVmm, Leader, SourceAgent, SourceVmm};

/// What is chosen from.
pub const MENU: [Fault; 14] = [
    Fault::Nothing,
    Fault::Kill(SourceAgent),
    Fault::Kill(DestinationAgent),
    Fault::Kill(SourceVmm),
    Fault::Kill(DestinationVmm),
    Fault::Kill(Leader),
    Fault::Stop(SourceAgent),
    Fault::Stop(DestinationAgent),
    Fault::Stop(SourceVmm),
    Fault::Stop(DestinationVmm),
    Fault::Stop(Leader),
    Fault::Full,
    Fault::TornTail,
    Fault::DirectoryGone,
];

/// How to mend what was done.
#[derive(Debug, Default)]
pub struct Struck {
    stopped: Vec<Found>,
    ballast: Option<PathBuf>,
    hidden: Option<(PathBuf, PathBuf)>,
}

impl Fault {
    /// Whether the guest's memory may be lost by it.
    pub fn kills_a_vmm(self) -> bool {
        matches!(self, Self::Kill(SourceVmm | DestinationVmm) | Self::TornTail)
    }

    pub async fn strike(self, cluster: &mut Cluster, at: &Move) -> Result<Struck> {
        let mut struck = Struck::default();
        match self {
            Self::Nothing => {}
            Self::Kill(victim) => {
                at.kill(cluster, victim).await?;
                cluster.ensure_running()?;
            }
            Self::Stop(victim) => {
                struck.stopped = processes(victim, cluster, at).await?;
                struck.stopped.iter().for_each(process::freeze);
            }
            Self::Full => struck.ballast = Some(fill(cluster.storage())?),
            Self::TornTail => {
                cluster.kill_vmm(at.home, &at.vm_id);
                tear(&cluster.storage().join("state"))?;
            }
            Self::DirectoryGone => {
                let dir = cluster.storage().join("state");
                let away = cluster.storage().join("state.away");
                std::fs::rename(&dir, &away).context("take the directory away")?;
                struck.hidden = Some((away, dir));
            }
        }
        Ok(struck)
    }
}

impl Struck {
    pub async fn heal(self, cluster: &mut Cluster) -> Result<()> {
        self.stopped.iter().for_each(process::thaw);
        if let Some(ballast) = self.ballast {
            std::fs::remove_file(ballast).context("make room")?;
        }
        if let Some((away, dir)) = self.hidden {
            std::fs::rename(away, dir).context("bring the directory back")?;
        }
        cluster.ensure_running()
    }
}

async fn processes(victim: Victim, cluster: &Cluster, at: &Move) -> Result<Vec<Found>> {
    let (number, program) = match victim {
        SourceAgent => (at.home, "bellwether-agent"),
        DestinationAgent => (at.to, "bellwether-agent"),
        SourceVmm => (at.home, "bellwether-vmm"),
        DestinationVmm => (at.to, "bellwether-vmm"),
        Leader => (cluster.leader().await?, "bellwether-controller"),
    };
    let mut found = processes_of(cluster.nodes()[number - 1].dir());
    found.retain(|found| found.program == program);
    Ok(found)
}

/// A file that takes all the room there is. On a storage of the machine's own that would hit
/// others, so that only a small file system is filled.
fn fill(storage: &Path) -> Result<PathBuf> {
    const SMALL: u64 = 4 << 30;
    let path = storage.join("ballast");
    let file = File::create(&path).context("make the ballast")?;
    let stat = rustix::fs::statvfs(storage)?;
    if stat.f_blocks * stat.f_frsize <= SMALL {
        fallocate(&file, FallocateFlags::empty(), 0, stat.f_bavail * stat.f_frsize)
            .context("fill the storage")?;
    }
    Ok(path)
}

/// Cuts a third off every state file that nobody has sealed: its writer is dead.
fn tear(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let file = OpenOptions::new().write(true).read(true).open(&path)?;
        if !is_sealed(&file)? {
            file.set_len(file.metadata()?.len() / 3 * 2)?;
        }
    }
    Ok(())
}

/// The second header slot is written by the seal alone (docs/formats.md).
fn is_sealed(file: &File) -> Result<bool> {
    use std::os::unix::fs::FileExt;
    let mut magic = [0; 8];
    Ok(file.read_exact_at(&mut magic, 4096).is_ok() && magic == *b"BWSTATE\n")
}
