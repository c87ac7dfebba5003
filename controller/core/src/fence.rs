//! The proof `watchdog`: when it exists, and why it does not.
//!
//! ```text
//! renewal of the node ---> its promise differs from what is committed? commit it ---> grants
//!                          (so no grant is older than what the state says of its watchdog)
//! last renewal, or this leader's election, whichever is later
//!   |<---------------------------- W -------------------------->|  the proof exists
//! ```
//!
//! A grant of an earlier leader was confirmed by a quorum before this leader was elected, so its
//! stamp is older than that. W is checked against what the node's fencer has read back, with the
//! lease that is granted here ([`WatchdogTiming`]).
//!
//! The proof is about VMs under the lease arbiter: their VMMs stop at their deadline or are killed,
//! or the host is reset. A VM under the storage arbiter goes on without a lease, and its node's watchdog
//! is petted for it, so for such a VM the time that has passed proves nothing.

use bellwether_types::{Arbiter, BootId, FenceProof, WatchdogBound, WatchdogTiming};
use serde::{Deserialize, Serialize};

use crate::observe::Observed;
use crate::power::PowerSwitch;
use crate::state::{Node, Runner, State};

/// What a node's agent says of its watchdog.
pub type Promise = Result<WatchdogBound, String>;

/// What was committed of a node's watchdog before anything was granted on it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeWatchdog {
    pub boot_id: BootId,
    /// Of the renewal that said so: a later one says it anew.
    pub nonce: u64,
    /// The bound, or why the node yields no proof.
    pub promise: Promise,
}

/// A leader's own knowledge of time, in its memory alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vigil {
    /// None: the times of this controller allow no proof.
    pub timing: Option<WatchdogTiming>,
    pub lease_ms: u64,
    /// When this leadership began, by the clock of `heard_at`.
    pub leading_since: u64,
}

/// What becomes of the proof.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outlook {
    Proven(FenceProof),
    /// It exists from this time on, if the node stays silent.
    At(u64),
    /// It never will, for this reason.
    Never(String),
}

/// The proof for an old runner whose node is silent.
pub fn watchdog(state: &State, observed: &Observed, old: &Runner, now: u64) -> Outlook {
    let bound = match promise(state, old) {
        Ok(bound) => bound,
        Err(reason) => return Outlook::Never(reason),
    };
    let Some(vigil) = &observed.vigil else {
        return Outlook::Never("this controller has no watchdog times".into());
    };
    let wait_ms = match vigil.wait_ms(bound) {
        Ok(wait_ms) => wait_ms,
        Err(reason) => return Outlook::Never(reason),
    };
    let report = observed.nodes.get(&old.node);
    let heard_at = report.map_or(0, |report| report.heard_at);
    let since = heard_at.max(vigil.leading_since);
    match now.checked_sub(since) {
        Some(waited_ms) if waited_ms >= wait_ms => {
            Outlook::Proven(FenceProof::Watchdog { waited_ms })
        }
        _ => Outlook::At(since.saturating_add(wait_ms)),
    }
}

impl Vigil {
    /// W for a node with this bound, or why there is none.
    fn wait_ms(&self, bound: WatchdogBound) -> Result<u64, String> {
        let Some(timing) = self.timing else {
            return Err("the controllers' times allow no proof by watchdog: give [watchdog] in \
                        controller.toml, which has to fit lease_ms"
                .into());
        };
        match timing.validate_for(self.lease_ms, bound) {
            Ok(()) => Ok(timing.wait_ms),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// What was promised under the boot in which the runner ran.
fn promise(state: &State, old: &Runner) -> Promise {
    let Some(node) = state.nodes.get(&old.node) else {
        return Err(format!("node {} is no member any more", old.node));
    };
    let of_boot = node.watchdog.as_ref().filter(|known| known.boot_id == old.boot_id);
    match of_boot {
        Some(known) => known.promise.clone(),
        None => Err("its agent has promised no watchdog".into()),
    }
}

/// One proof that a node can yield, or cannot, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Yield {
    pub proof: &'static str,
    /// Whose VMs it helps.
    pub arbiter: Arbiter,
    /// From the node's last sign of life to the proof, if that is known and there is one.
    pub after_ms: Option<u64>,
    /// When it comes, or why it does not.
    pub text: String,
}

/// Which proofs a node can yield by itself, and after how long.
pub fn yields(observed: &Observed, node: &Node, suspect_after_ms: u64) -> Vec<Yield> {
    let storage = Yield {
        proof: "storage",
        arbiter: Arbiter::Storage,
        after_ms: Some(suspect_after_ms),
        text: "tried then, and again until the storage gives up the node's locks".into(),
    };
    let by_watchdog = by_watchdog(observed, node, suspect_after_ms);
    vec![storage, by_watchdog, by_power(observed, node, suspect_after_ms)]
}

fn by_watchdog(observed: &Observed, node: &Node, suspect_after_ms: u64) -> Yield {
    let known = node.watchdog.as_ref().filter(|known| Some(known.boot_id) == node.boot_id);
    let promise = known.map(|known| known.promise.clone());
    let wait_ms = match (promise, &observed.vigil) {
        (None, _) => Err("its agent has promised no watchdog".to_owned()),
        (Some(Err(reason)), _) => Err(reason),
        (Some(Ok(_)), None) => Err("ask the leader".to_owned()),
        (Some(Ok(bound)), Some(vigil)) => vigil.wait_ms(bound).map(|wait| (wait, bound)),
    };
    let (after_ms, text) = match wait_ms {
        Ok((wait_ms, bound)) => {
            let text = format!("its watchdog resets it after {} ms", bound.watchdog_ms);
            (Some(wait_ms.max(suspect_after_ms)), text)
        }
        Err(reason) => (None, reason),
    };
    Yield { proof: "watchdog", arbiter: Arbiter::Lease, after_ms, text }
}

fn by_power(observed: &Observed, node: &Node, suspect_after_ms: u64) -> Yield {
    let (after_ms, text) = match observed.switches.get(&node.id) {
        None => (None, "no power switch is configured for it on the leader".to_owned()),
        Some(PowerSwitch { device, said, .. }) => match said {
            None => (Some(suspect_after_ms), format!("{device}, not tested yet")),
            Some((_, Ok(true))) => (Some(suspect_after_ms), format!("{device} says that it is on")),
            Some((_, Ok(false))) => {
                (Some(suspect_after_ms), format!("{device} says that it is off"))
            }
            Some((_, Err(reason))) => (None, format!("{device}: {reason}")),
        },
    };
    Yield { proof: "power", arbiter: Arbiter::Lease, after_ms, text }
}

/// Whether a renewal says something new of its node's watchdog, so that it has to be committed
/// before anything is granted.
pub(crate) fn is_news(node: &Node, boot_id: BootId, nonce: u64, promise: &Promise) -> bool {
    match node.watchdog.as_ref().filter(|known| known.boot_id == boot_id) {
        Some(known) => known.nonce < nonce && known.promise != *promise,
        // Nothing is known of a boot that never promised anything: that is the same.
        None => promise.is_ok(),
    }
}
