//! The node's heartbeat on the shared storage, and what it does when it alone hears no controller.
//!
//! ```text
//!   renewal --pulse--> desk --every second--> <storage>/heartbeats/<node>
//!                                                     | the others', when no controller answers
//!                                                     v
//!                                        Isolation: InTouch, Blind, NoQuorum, CutOff
//!                                                     | cut off for handover_after_ms
//!                                                     v
//!                              each VM: Seal -> HandOver (claim) -> its VMM ends, the locks are free
//! ```
//!
//! The storage is looked at on a thread of its own: one that hangs delays nothing but the verdict.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bellwether_agent_core::{Isolation, Order, Pulse, Stamped, Verdict};
use bellwether_types::{BootId, Epoch, NodeId, VmId, VmState};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::clock;
use crate::node::Node;
use crate::owner::{Command, Details};
use crate::registry::Registry;

/// Between two heartbeats.
const PERIOD: Duration = Duration::from_secs(1);
/// Storage that takes longer for a heartbeat counts as silent.
const STORAGE_MAX: Duration = Duration::from_secs(5);
/// A heartbeat is one write of this many bytes, padded with spaces.
const HEARTBEAT_BYTES: usize = 512;
/// The most heartbeats that are looked at.
const NODES_MAX: usize = 10_000;
/// The pause before a hand-over that failed is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// What a node writes onto the storage again and again.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Heartbeat {
    /// Grows with every write of one agent.
    beat: u64,
    node: NodeId,
    boot_id: BootId,
    /// The last that the node heard of a quorum.
    pulse: Option<Pulse>,
    /// `beat` again: one that differs was read while it was written.
    end: u64,
}

/// Where the nodes of a cluster write their heartbeats.
pub fn heartbeat_dir(storage: &Path) -> PathBuf {
    storage.join("heartbeats")
}

/// Writes heartbeats for as long as the agent runs, and hands VMs over when it has to.
pub struct Watch {
    node: Arc<Node>,
    registry: Arc<Registry>,
    /// None: never.
    handover_after: Option<Duration>,
    isolation: Isolation,
    verdict: Verdict,
    beat: u64,
    /// What was handed over since this node was in touch last.
    done: BTreeSet<(VmId, Epoch)>,
    handing_over: Option<JoinHandle<BTreeSet<(VmId, Epoch)>>>,
    /// Why the last heartbeat was none.
    fault: String,
}

impl Watch {
    pub fn new(node: Arc<Node>, registry: Arc<Registry>, handover_after: Option<Duration>) -> Self {
        Self {
            node,
            registry,
            handover_after,
            isolation: Isolation::default(),
            verdict: Verdict::InTouch,
            beat: 0,
            done: BTreeSet::new(),
            handing_over: None,
            fault: String::new(),
        }
    }

    pub async fn run(mut self) {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // Before the first registration there is nothing to be cut off from.
            let Some(storage) = self.node.desk.storage() else { continue };
            let verdict = self.look(&storage).await;
            self.tell(verdict);
            if let (Verdict::CutOff { for_ns }, Some(after)) = (verdict, self.handover_after)
                && Duration::from_nanos(for_ns) >= after
            {
                self.hand_over(&storage).await;
            }
        }
    }

    async fn look(&mut self, storage: &Path) -> Verdict {
        self.beat += 1;
        let ours = Heartbeat {
            beat: self.beat,
            node: self.node.id,
            boot_id: self.node.boot_id,
            pulse: self.node.desk.pulse(),
            end: self.beat,
        };
        let (dir, node) = (heartbeat_dir(storage), self.node.id);
        let exchange = tokio::task::spawn_blocking(move || exchange(&dir, node, &ours));
        let pulse = match tokio::time::timeout(STORAGE_MAX, exchange).await {
            Ok(Ok(exchanged)) => exchanged.map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer for {} s", STORAGE_MAX.as_secs())),
        };
        let pulse = pulse.map_err(|fault| self.note_fault(storage, fault));
        let (contact, silent_ms) = self.node.desk.contact();
        self.isolation.look(clock::now(), contact, silent_ms.saturating_mul(1_000_000), pulse)
    }

    fn note_fault(&mut self, storage: &Path, fault: String) {
        if self.fault != fault {
            let dir = heartbeat_dir(storage);
            tracing::warn!(dir = %dir.display(), fault, "no heartbeat on the storage");
            self.fault = fault;
        }
    }

    /// Says what is new.
    fn tell(&mut self, verdict: Verdict) {
        let old = std::mem::replace(&mut self.verdict, verdict);
        if std::mem::discriminant(&old) == std::mem::discriminant(&verdict) {
            return;
        }
        let after = self.handover_after.map(|after| after.as_secs());
        match verdict {
            Verdict::InTouch => tracing::info!("a controller answers again"),
            Verdict::Blind => tracing::warn!("neither a controller nor the storage answers"),
            Verdict::NoQuorum => tracing::warn!(
                "no controller answers, and no node's heartbeat shows that one answers others; the \
                 VMs go on"
            ),
            Verdict::CutOff { .. } => tracing::warn!(
                handover_after_s = after,
                "cut off: the controllers answer other nodes and not this one; its VMs are handed \
                 over with their memory if that lasts"
            ),
        }
    }

    async fn hand_over(&mut self, storage: &Path) {
        match self.handing_over.take() {
            Some(task) if !task.is_finished() => {
                self.handing_over = Some(task);
                return;
            }
            Some(task) => self.done = task.await.unwrap_or_default(),
            None => {}
        }
        let mut done = std::mem::take(&mut self.done);
        let (node, registry) = (Arc::clone(&self.node), Arc::clone(&self.registry));
        let storage = storage.to_owned();
        self.handing_over = Some(tokio::spawn(async move {
            if !hand_over_all(&node, &registry, &storage, &mut done).await {
                tokio::time::sleep(AGAIN).await;
            }
            done
        }));
    }
}

/// Hands over every VM that runs here or stands sealed; false if one is left.
async fn hand_over_all(
    node: &Node,
    registry: &Registry,
    storage: &Path,
    done: &mut BTreeSet<(VmId, Epoch)>,
) -> bool {
    let mut is_done = true;
    for (vm, seen) in node.board.all() {
        // Whoever is in touch again needs no hand-over; those that were sealed are told to the
        // controllers, and go on.
        let (contact, silent_ms) = node.desk.contact();
        let silent = Duration::from_millis(silent_ms);
        let heard = |at| Duration::from_nanos(clock::now().since(&at)) < silent;
        if contact.is_some_and(heard) {
            return true;
        }
        let is_due = matches!(seen.state, VmState::Running | VmState::Saved);
        if !is_due || done.contains(&(vm, seen.epoch)) {
            continue;
        }
        match hand_over(node, registry, vm, seen.epoch, storage).await {
            Ok(()) => drop(done.insert((vm, seen.epoch))),
            Err(status) => {
                is_done = false;
                let reason = status.message();
                tracing::error!(vm_id = %vm, epoch = %seen.epoch, reason, "cannot hand the VM over");
            }
        }
    }
    is_done
}

async fn hand_over(
    node: &Node,
    registry: &Registry,
    vm: VmId,
    epoch: Epoch,
    storage: &Path,
) -> Result<(), tonic::Status> {
    let (term, boot) = (node.terms.highest(), node.boot_id);
    let give = |order, details| {
        let stamped = Stamped { term, task: 0, epoch, boot, order };
        registry.order(vm, Command { stamped, details })
    };
    tracing::warn!(vm_id = %vm, %epoch, "handing the VM over");
    give(Order::Seal, Details::Seal { storage: storage.to_owned() }).await?;
    give(Order::HandOver, Details::Plain).await?;
    tracing::warn!(vm_id = %vm, %epoch, "handed over: it is sealed, and its locks are free");
    Ok(())
}

/// Writes our heartbeat, and gives the highest pulse in those of the others.
fn exchange(dir: &Path, node: NodeId, ours: &Heartbeat) -> io::Result<Option<Pulse>> {
    write(&dir.join(node.to_string()), ours)?;
    let mut highest = None;
    for entry in std::fs::read_dir(dir)?.take(NODES_MAX) {
        let entry = entry?;
        if entry.file_name().to_str() == Some(&node.to_string()) {
            continue;
        }
        // Somebody else's damage is not ours to judge.
        let theirs = read(&entry.path()).ok().flatten();
        highest = highest.max(theirs.and_then(|it| it.pulse));
    }
    Ok(highest)
}

fn write(path: &Path, heartbeat: &Heartbeat) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(heartbeat)?;
    bytes.resize(HEARTBEAT_BYTES - 1, b' ');
    bytes.push(b'\n');
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc_nofollow());
    let file = options.open(path)?;
    file.write_all_at(&bytes, 0)?;
    file.sync_data()
}

/// The heartbeat, or none if it was read while it was written.
fn read(path: &Path) -> io::Result<Option<Heartbeat>> {
    // Opened anew each time: that is when NFS looks whether the file has changed.
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc_nofollow()).open(path)?;
    let mut bytes = Vec::with_capacity(HEARTBEAT_BYTES);
    file.take(HEARTBEAT_BYTES as u64).read_to_end(&mut bytes)?;
    let heartbeat: Heartbeat = serde_json::from_slice(bytes.trim_ascii_end())?;
    Ok(Some(heartbeat).filter(|it| it.beat == it.end))
}

fn libc_nofollow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heartbeat(node: u64, beat: u64, ms: u64) -> Heartbeat {
        Heartbeat {
            beat,
            node: NodeId(node),
            boot_id: BootId::from_uuid(uuid::Uuid::from_u128(u128::MAX)),
            pulse: Some(Pulse { term: u64::MAX, ms }),
            end: beat,
        }
    }

    #[test]
    fn a_heartbeat_fits_and_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1");
        for beat in [u64::MAX, 7] {
            let ours = heartbeat(u64::MAX, beat, u64::MAX);
            write(&path, &ours).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), HEARTBEAT_BYTES as u64);
            assert_eq!(read(&path).unwrap(), Some(ours), "nothing of a longer one is left");
        }
        let torn = Heartbeat { end: 8, ..heartbeat(1, 7, 1) };
        write(&path, &torn).unwrap();
        assert_eq!(read(&path).unwrap(), None);
    }

    #[test]
    fn the_highest_pulse_of_the_others_counts() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert_eq!(exchange(dir, NodeId(1), &heartbeat(1, 1, 99)).unwrap(), None, "only our own");
        write(&dir.join("2"), &heartbeat(2, 1, 5)).unwrap();
        write(&dir.join("3"), &heartbeat(3, 1, 6)).unwrap();
        std::fs::write(dir.join("4"), "damaged").unwrap();
        let pulse = exchange(dir, NodeId(1), &heartbeat(1, 2, 100)).unwrap();
        assert_eq!(pulse, Some(Pulse { term: u64::MAX, ms: 6 }));
        exchange(&dir.join("unmounted"), NodeId(1), &heartbeat(1, 3, 1)).unwrap_err();
    }
}
