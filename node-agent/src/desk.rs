//! This node's standing with the controllers: its lease, its grants, and the pages that carry them
//! to the VMMs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bellwether_agent_core::{
    Lease, LeaseAnswer, LeaseRequest, LeaseState, Pulse, Stamp, Standing, is_recent,
};
use bellwether_lease::{LeaseError, LeasePage};
use bellwether_types::{BootId, Epoch, VmId};
use tokio::sync::watch;

use crate::clock;

/// The standing of the node. The renewal task writes it, the owners of the VMs ask it.
#[derive(Debug)]
pub struct Desk {
    inner: Mutex<Inner>,
    /// Counts the answers that were taken in, so that an owner can wait for the next.
    answers: watch::Sender<u64>,
}

#[derive(Debug)]
struct Inner {
    lease: Lease,
    last_contact: Option<Stamp>,
    lease_ms: u64,
    /// The newest request, and the one whose answer brought `grants`.
    asked: u64,
    answered: u64,
    /// The last that was heard of a quorum.
    pulse: Option<Pulse>,
    /// The cluster's storage, once it was told.
    storage: Option<PathBuf>,
    grants: HashMap<VmId, Epoch>,
    pages: HashMap<VmId, LeasePage>,
}

impl Desk {
    pub fn new(boot_id: BootId) -> Self {
        let lease = Lease::new(boot_id, clock::now().boot_ns);
        let inner = Inner {
            lease,
            last_contact: None,
            lease_ms: 0,
            asked: 0,
            answered: 0,
            pulse: None,
            storage: None,
            grants: HashMap::new(),
            pages: HashMap::new(),
        };
        Self { inner: Mutex::new(inner), answers: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A registration has succeeded.
    pub fn registered(&self, lease_ms: u64, storage: &str) {
        let mut inner = self.lock();
        inner.lease_ms = lease_ms;
        inner.storage = (!storage.is_empty()).then(|| storage.into());
        inner.last_contact = Some(clock::now());
    }

    /// The cluster's storage; none before the first registration.
    pub fn storage(&self) -> Option<PathBuf> {
        self.lock().storage.clone()
    }

    /// A leader has answered, confirmed by a quorum at this pulse.
    pub fn hear_pulse(&self, pulse: Pulse) {
        let mut inner = self.lock();
        inner.pulse = inner.pulse.max(Some(pulse));
    }

    /// The last that was heard of a quorum.
    pub fn pulse(&self) -> Option<Pulse> {
        self.lock().pulse
    }

    /// When a controller answered last, and for how long that counts, milliseconds.
    pub fn contact(&self) -> (Option<Stamp>, u64) {
        let inner = self.lock();
        (inner.last_contact, inner.lease_ms)
    }

    /// A new request, stamped before it is sent.
    pub fn request(&self) -> LeaseRequest {
        let mut inner = self.lock();
        let request = inner.lease.request(clock::now());
        inner.asked = request.nonce;
        request
    }

    /// The request before the next one.
    pub fn newest_request(&self) -> u64 {
        self.lock().asked
    }

    /// An answer has come: extends the lease and writes the pages of the VMs that are granted. A
    /// VM that is not granted keeps its page as it is: its deadline passes by itself.
    pub fn answer(&self, nonce: u64, lease_ms: u64, grants: HashMap<VmId, Epoch>) -> LeaseAnswer {
        let mut inner = self.lock();
        let answer = inner.lease.answer(nonce, lease_ms);
        if answer == LeaseAnswer::NotAsked {
            return answer;
        }
        inner.last_contact = Some(clock::now());
        inner.lease_ms = lease_ms;
        inner.grants = grants;
        inner.answered = nonce;
        if inner.lease.is_live(clock::now()) {
            inner.write_pages();
        }
        drop(inner);
        self.answers.send_modify(|count| *count += 1);
        answer
    }

    /// How an order finds the node, which has heard of a leader of this term.
    pub fn standing(&self, term: u64) -> Standing {
        let inner = self.lock();
        let now = clock::now();
        Standing {
            term,
            lease_live: inner.lease.is_live(now),
            contact_recent: is_recent(inner.last_contact, now, inner.lease_ms),
        }
    }

    /// Creates the page of a VMM, or takes up the one that an earlier agent left.
    pub fn add_page(&self, vm: VmId, path: &Path) -> Result<(), LeaseError> {
        let page = match path.exists() {
            true => LeasePage::open_for_grants(path),
            false => LeasePage::create(path),
        };
        self.lock().pages.insert(vm, page?);
        Ok(())
    }

    pub fn drop_page(&self, vm: VmId) {
        self.lock().pages.remove(&vm);
    }

    /// Shows a VMM its epoch before it starts. Under the storage arbiter this is all it looks at;
    /// the deadline is the node's, or long past when there is none.
    pub fn show_epoch(&self, vm: VmId, epoch: Epoch) {
        let inner = self.lock();
        let deadline_ns = inner.deadline_ns();
        inner.write_page(vm, epoch, deadline_ns);
    }

    /// Waits until a lease that names this VM and epoch is live and on its page, by the answer to a
    /// request after this one.
    pub async fn granted(&self, vm: VmId, epoch: Epoch, after: u64, at_most: Duration) -> bool {
        let mut answers = self.answers.subscribe();
        let granted = async {
            loop {
                if self.is_granted(vm, epoch, after) {
                    return;
                }
                if answers.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(at_most, granted).await.is_ok()
    }

    fn is_granted(&self, vm: VmId, epoch: Epoch, after: u64) -> bool {
        let inner = self.lock();
        inner.answered > after
            && inner.grants.get(&vm) == Some(&epoch)
            && inner.lease.is_live(clock::now())
    }
}

impl Inner {
    fn deadline_ns(&self) -> u64 {
        match self.lease.state(clock::now()) {
            LeaseState::GrantedUntil { deadline_ns } => deadline_ns,
            LeaseState::NeverGranted | LeaseState::Expired { .. } => 0,
        }
    }

    fn write_pages(&self) {
        let deadline_ns = self.deadline_ns();
        for (vm, epoch) in &self.grants {
            self.write_page(*vm, *epoch, deadline_ns);
        }
    }

    fn write_page(&self, vm: VmId, epoch: Epoch, deadline_ns: u64) {
        let Some(page) = self.pages.get(&vm) else { return };
        match page.grant(epoch.0, deadline_ns) {
            // A grant of an older epoch is about an incarnation that this page does not belong to.
            Ok(_) | Err(LeaseError::OlderEpoch { .. }) => {}
            Err(error) => tracing::error!(vm_id = %vm, %epoch, %error, "cannot grant"),
        }
    }
}
