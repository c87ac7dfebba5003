//! All VMs of this node: finds the owner of each, and takes up what an earlier agent left.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bellwether_agent_core::{Durable, Leftover, Order, Refusal, Stamped};
use bellwether_types::{BootId, ClusterId, Epoch, VmId};
use futures::StreamExt;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;

use crate::node::Node;
use crate::owner::{Body, Command, Message, Owner, Reply, reap, refuse};
use crate::runtime_dir::RuntimeError;
use crate::vmm::LastRelease;

/// Orders that may wait for one VM. A saga gives one at a time; more are repeats.
const INBOX_MAX: usize = 32;
/// VMMs that are taken up at one time after a restart of the agent.
const ADOPT_AT_ONCE: usize = 16;

/// What keeps an agent from taking up what an earlier one left.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("look for VMMs in /proc: {0}")]
    Proc(#[from] std::io::Error),
    #[error("a VMM that must not live any more cannot be ended: {0}; end it and start again")]
    Stuck(String),
}

/// The owners of all VMs.
#[derive(Debug)]
pub struct Registry {
    node: Arc<Node>,
    owners: Mutex<HashMap<VmId, Handle>>,
}

#[derive(Clone, Debug)]
struct Handle {
    inbox: mpsc::Sender<Message>,
    /// Raised when a release is queued, so that what it waits for is called off.
    releases: Arc<watch::Sender<LastRelease>>,
}

impl Registry {
    /// Takes up every incarnation in the runtime directory, and ends those that must not live.
    pub async fn adopt(node: Arc<Node>) -> Result<Arc<Self>, AdoptError> {
        let registry = Arc::new(Self { node, owners: Mutex::new(HashMap::new()) });
        let floors: BTreeMap<VmId, Durable> = registry.node.runtime.floors()?.into_iter().collect();
        let mut bodies = registry.scan(&floors).await?;
        let mut all: BTreeMap<VmId, Option<Body>> = floors.keys().map(|vm| (*vm, None)).collect();
        while let Some((vm, body)) = bodies.pop_first() {
            all.insert(vm, Some(body));
        }
        let adoptions = all.into_iter().map(|(vm, body)| {
            let durable = floors.get(&vm).cloned().unwrap_or_default();
            registry.start(vm, durable, body)
        });
        futures::stream::iter(adoptions).buffer_unordered(ADOPT_AT_ONCE).count().await;
        Ok(registry)
    }

    /// Reads all incarnations and keeps one for each VM.
    async fn scan(
        &self,
        floors: &BTreeMap<VmId, Durable>,
    ) -> Result<BTreeMap<VmId, Body>, AdoptError> {
        let mut kept: BTreeMap<VmId, Body> = BTreeMap::new();
        for (home, record) in self.node.runtime.incarnations()? {
            let vm = record.vm_id;
            let body = Body::adopt(home, record)?;
            if body.record().boot_id != self.node.boot_id {
                // The boot id is the proof that nothing of the old boot runs: make it true.
                self.end(body, "it is of another boot").await?;
                continue;
            }
            let Some(other) = kept.remove(&vm) else {
                kept.insert(vm, body);
                continue;
            };
            let floor = floors.get(&vm).map_or(Epoch(0), |durable| durable.floor);
            let (keep, give_up) = choose(body, other, floor);
            self.end(give_up, "its VM has another incarnation here").await?;
            kept.insert(vm, keep);
        }
        Ok(kept)
    }

    async fn end(&self, body: Body, why: &str) -> Result<(), AdoptError> {
        let (vm, epoch) = (body.record().vm_id, body.record().epoch);
        if let Some(process) = body.process() {
            tracing::warn!(vm_id = %vm, %epoch, pid = process.pid(), why, "ending a VMM");
            let ended = reap(process, Duration::ZERO).await;
            ended.map_err(|failure| AdoptError::Stuck(failure.status.message().to_owned()))?;
        }
        Ok(body.home().remove()?)
    }

    async fn start(&self, vm: VmId, durable: Durable, body: Option<Body>) {
        let (handle, mut owner, inbox) = self.make(vm, durable);
        if let Some(body) = body {
            owner.adopt(body).await;
        }
        self.lock().insert(vm, handle);
        tokio::spawn(owner.run(inbox));
    }

    fn make(&self, vm: VmId, durable: Durable) -> (Handle, Owner, mpsc::Receiver<Message>) {
        let (sender, inbox) = mpsc::channel(INBOX_MAX);
        let (releases, recall) = watch::channel(LastRelease { term: 0, epoch: Epoch(0) });
        let owner = Owner::new(Arc::clone(&self.node), vm, durable, recall);
        (Handle { inbox: sender, releases: Arc::new(releases) }, owner, inbox)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, Handle>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, vm: VmId) -> Handle {
        let mut owners = self.lock();
        if let Some(handle) = owners.get(&vm) {
            return handle.clone();
        }
        let (handle, owner, inbox) = self.make(vm, Durable::default());
        owners.insert(vm, handle.clone());
        drop(owners);
        tokio::spawn(owner.run(inbox));
        handle
    }

    pub fn cluster(&self) -> ClusterId {
        self.node.cluster
    }

    pub fn boot_id(&self) -> BootId {
        self.node.boot_id
    }

    /// Gives an order to the owner of its VM, and waits for the answer.
    pub async fn order(&self, vm: VmId, command: Command) -> Result<Reply, Status> {
        self.ask(vm, command).await.map_err(|status| {
            let text = format!("node {}: {}", self.node.name, status.message());
            Status::new(status.code(), text)
        })
    }

    async fn ask(&self, vm: VmId, command: Command) -> Result<Reply, Status> {
        command.stamped.check_boot(vm, self.boot_id()).map_err(refuse)?;
        self.check_term(vm, &command.stamped)?;
        let Stamped { term, epoch, .. } = command.stamped;
        let release =
            (command.stamped.order == Order::Release).then_some(LastRelease { term, epoch });
        let handle = self.handle(vm);
        let (reply, answer) = oneshot::channel();
        handle.inbox.try_send(Message { command, reply }).map_err(|error| match error {
            TrySendError::Full(_) => Status::unavailable(format!(
                "VM {vm}: {INBOX_MAX} orders are waiting already; ask again"
            )),
            TrySendError::Closed(_) => lost(vm),
        })?;
        // Only now: a release that was refused calls nothing off.
        if let Some(release) = release {
            handle.releases.send_if_modified(|last| {
                let newer = release > *last;
                *last = release.max(*last);
                newer
            });
        }
        answer.await.map_err(|_| lost(vm))?
    }

    /// A deposed leader is refused before its order has any effect. The owner of the VM looks at
    /// the term again when the order's turn comes.
    fn check_term(&self, vm: VmId, stamped: &Stamped) -> Result<(), Status> {
        let (term, order) = (stamped.term, stamped.order.word());
        let seen = self.node.terms.hear(term).map_err(|error| {
            tracing::error!(vm_id = %vm, term, %error, "cannot make the term durable");
            Status::unavailable(format!("{error}; nothing was done, ask again"))
        })?;
        match term < seen {
            true => Err(refuse(Refusal::OldTerm { vm, order, term, seen })),
            false => Ok(()),
        }
    }
}

fn lost(vm: VmId) -> Status {
    Status::unavailable(format!(
        "VM {vm}: its owner in the agent has failed; outcome unknown. Restart the agent, its VMs go on"
    ))
}

/// Two incarnations of one VM in one runtime directory: the one to keep, and the other.
fn choose(one: Body, other: Body, floor: Epoch) -> (Body, Body) {
    let rank = |body: &Body| {
        let (record, lives) = (body.record(), body.process().is_some());
        Leftover { epoch: record.epoch, lives, may_have_run: record.may_have_run }.rank(floor)
    };
    match rank(&one) >= rank(&other) {
        true => (one, other),
        false => (other, one),
    }
}
