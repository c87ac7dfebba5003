//! Moves and saves under faults at random moments, for as long as is asked.
//!
//! ```text
//!   begin a move or a save ── a random while ──> fault ── a random while ──> heal
//!        │                                                                    │
//!        └── the task ends, well or not ── check ── a new attempt succeeds ───┘── nothing is left
//! ```
//!
//! What is tried, and when, comes from a seed; what the processes make of it does not. After each
//! round exactly one VMM runs the guest, its memory is what it wrote, its journal lost nothing, and,
//! unless its VMM was killed, it has not booted anew.

mod chance;
mod fault;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

pub use chance::Chance;
pub use fault::{Fault, MENU};

use crate::journal::Journal;
use crate::lines::Line;
use crate::migration::{Move, nothing_left, runs_once};
use crate::storage::Storage;
use crate::{Cluster, Guest, Options, StorageKind, Watch};

const VM: &str = "tortured";
const MEMORY_MIB: u64 = 128;
const SOON: Duration = Duration::from_secs(90);
/// A file goes when the last page of it is loaded.
const REMOVED: Duration = Duration::from_secs(10);
/// Room for the memory twice, and for what is rewritten meanwhile.
const STORAGE_MIB: u64 = 768;

/// A cluster with one busy VM.
pub struct Torture {
    pub cluster: Cluster,
    guest: Guest,
    watch: Watch,
    chance: Chance,
}

/// What one round has tried, for a line of the log.
#[derive(Clone, Debug)]
pub struct Round {
    pub verb: &'static str,
    pub fault: Fault,
    pub after_ms: u64,
    pub for_ms: u64,
    /// How the task ended.
    pub outcome: String,
}

impl Torture {
    pub async fn start(seed: u64) -> Result<Self> {
        let storage = match Storage::can_mount() {
            true => StorageKind::Tmpfs { mib: STORAGE_MIB },
            false => StorageKind::Directory,
        };
        let cluster = Cluster::start(Options { storage, ..Options::default() }).await?;
        // Slow enough for a fault to meet the rounds, and fast enough for many.
        let limit = ["cluster", "set", "--pre-copy-mib-s", "256"];
        cluster.bell().text(&limit).await?;
        let guest = cluster
            .guest(VM)?
            .memory_mib(MEMORY_MIB)
            .cmdline("tick_ms=10 mem_mib=32 dirty_mib_s=16 verify_mib_s=64 journal_ms=20 fill=100");
        let watch = cluster.run(&guest).await?;
        let is_filled = |line: &Line| *line == Line::Filled;
        watch.heard_since(0, "the guest to fill its memory", SOON, is_filled).await?;
        Ok(Self { cluster, guest, watch, chance: Chance::new(seed) })
    }

    /// One round; an error says what is wrong, and with what it began.
    pub async fn round(&mut self) -> Result<Round> {
        let mut round = Round {
            verb: if self.chance.below(5) == 0 { "save" } else { "migrate" },
            fault: MENU[self.chance.below(MENU.len() as u64) as usize],
            after_ms: self.chance.below(1_200),
            for_ms: 50 + self.chance.below(2_500),
            outcome: String::new(),
        };
        let told = format!("{round:?}");
        self.try_round(&mut round).await.with_context(|| told)?;
        Ok(round)
    }

    async fn try_round(&mut self, round: &mut Round) -> Result<()> {
        self.cluster.wait_whole().await?;
        self.cluster.admin().settled(VM, &["running"], SOON).await?;
        let boots = self.watch.record().boots();
        let home = self.cluster.home_of(VM).await?;
        let to = self.cluster.other_than(&[home])?;
        let task = match round.verb {
            "save" => self.cluster.admin().save(VM).await?,
            _ => self.cluster.admin().migrate(VM, &format!("node{to}")).await?,
        };
        tokio::time::sleep(Duration::from_millis(round.after_ms)).await;
        let at = Move { home, to, vm_id: self.watch.vm_id().to_owned() };
        let done = round.fault.strike(&mut self.cluster, &at).await?;
        tokio::time::sleep(Duration::from_millis(round.for_ms)).await;
        done.heal(&mut self.cluster).await?;
        let task = self.cluster.admin().task_ended(task, SOON).await?;
        round.outcome = format!("{} {}", task.outcome, task.error);
        self.comes_back().await?;
        if !round.fault.kills_a_vmm() {
            let now = self.watch.record().boots();
            ensure!(now == boots, "the guest booted anew: {:?} {:?}", task.error, task.log);
        }
        self.new_attempt().await
    }

    /// Whatever became of the task, the VM runs once or is saved, and then runs.
    async fn comes_back(&self) -> Result<()> {
        let admin = self.cluster.admin();
        let vm = admin.settled(VM, &["running", "saved"], SOON).await?;
        if vm.state == "saved" {
            let task = admin.restore(VM, "").await?;
            admin.task_done(task, SOON).await.context("restore what was saved")?;
        }
        self.watch.ticks_on(SOON).await?;
        self.is_well().await
    }

    async fn is_well(&self) -> Result<()> {
        runs_once(&self.cluster, &self.watch, SOON).await?;
        self.watch.verifies_again(SOON).await?;
        let disk = self.guest.disk.as_ref().context("the guest has a disk")?;
        let acknowledged = self.watch.acknowledged();
        let lost = Journal::scan(disk)?.lost(acknowledged);
        ensure!(lost == 0, "{lost} of {acknowledged} records are lost");
        Ok(())
    }

    /// A move succeeds, and leaves no file. What could not be removed while the storage failed goes
    /// with the sweep after the next start, so that a second one may be needed.
    async fn new_attempt(&self) -> Result<()> {
        for attempt in 1..=2 {
            self.cluster.wait_whole().await?;
            self.cluster.admin().settled(VM, &["running"], SOON).await?;
            let to = self.cluster.other_than(&[self.cluster.home_of(VM).await?])?;
            self.cluster.migrate(VM, to).await.context("a new attempt")?;
            self.is_well().await.context("after a new attempt")?;
            match nothing_left(&self.cluster, REMOVED).await {
                Err(_) if attempt == 1 => {}
                outcome => return outcome,
            }
        }
        Ok(())
    }

    pub fn finish(self) -> Result<()> {
        drop(self.watch);
        self.cluster.finish()
    }
}

/// Rounds until the time is over; the line of each goes to standard error, where a failure is told
/// with what is needed to run it again.
pub async fn run(seed: u64, time: Duration) -> Result<usize> {
    eprintln!("seed {seed}");
    let begun = Instant::now();
    let mut torture = Torture::start(seed).await?;
    let mut rounds = 0;
    while begun.elapsed() < time {
        let started = Instant::now();
        let outcome = torture.round().await;
        let round = outcome.with_context(|| format!("round {rounds} of seed {seed}"))?;
        let Round { verb, fault, after_ms, for_ms, outcome } = round;
        eprintln!(
            "{rounds:4}  {verb:7} {fault:?} after {after_ms} ms for {for_ms} ms: {outcome} ({:.1} s)",
            started.elapsed().as_secs_f64()
        );
        rounds += 1;
    }
    torture.finish()?;
    eprintln!("{rounds} rounds in {:.0} s: all well", begun.elapsed().as_secs_f64());
    Ok(rounds)
}
