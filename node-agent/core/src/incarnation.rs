//! One VMM process of one VM, as the agent knows it.

use std::fmt;

use bellwether_types::{Arbiter, Epoch, Handover};

use crate::order::{ActivateTimings, SealedState};

/// Where an incarnation stands; the drawing is at [`crate::machine`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// The process is being created.
    Preparing,
    /// The machine exists; nothing is locked, nothing ran.
    Prepared,
    /// The claim and the disks are locked; nothing ran.
    Locked,
    /// A state file is loaded; nothing ran.
    Loaded,
    /// Start is on its way: from here on the guest may have run.
    Activating,
    /// The guest runs, or is paused.
    Active,
    Sealing,
    /// The state is sealed; the guest is stopped and its locks are still held.
    Sealed,
    /// It is being stopped and reaped; its epoch is at or below the floor.
    Releasing,
    /// The process is gone, without an order.
    Ended,
}

impl Phase {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Prepared => "prepared",
            Self::Locked => "locked",
            Self::Loaded => "loaded",
            Self::Activating => "activating",
            Self::Active => "active",
            Self::Sealing => "sealing",
            Self::Sealed => "sealed",
            Self::Releasing => "releasing",
            Self::Ended => "ended",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The states of a VMM; see `vmm.proto`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmmState {
    Empty,
    Created,
    Loaded,
    Running,
    Paused,
    Sealed,
    Exited,
}

impl VmmState {
    /// The state for the word on the wire, or none.
    pub fn from_word(word: &str) -> Option<Self> {
        Some(match word {
            "empty" => Self::Empty,
            "created" => Self::Created,
            "loaded" => Self::Loaded,
            "running" => Self::Running,
            "paused" => Self::Paused,
            "sealed" => Self::Sealed,
            "exited" => Self::Exited,
            _ => return None,
        })
    }
}

/// What a VMM said of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmmSight {
    pub state: VmmState,
    /// 0 until the VMM has been told one by Lock or Start.
    pub epoch: Epoch,
    pub locked: bool,
    pub reason: String,
    pub memory_loaded_bytes: u64,
    pub memory_total_bytes: u64,
    pub sealed: Option<SealedState>,
    /// What the claim says that was handed over, and no guest has run since.
    pub handover: Option<Handover>,
}

/// One VMM process of one VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Incarnation {
    pub epoch: Epoch,
    pub phase: Phase,
    pub arbiter: Arbiter,
    /// The claim and the disk locks are held.
    pub locked: bool,
    /// The hash of the state file that is loaded.
    pub loaded: Option<[u8; 32]>,
    /// The hash of the state file whose Load has been sent and has no answer that counts yet.
    pub loading: Option<[u8; 32]>,
    /// A Load went unanswered once, so that a later refusal proves nothing about it.
    pub load_lost: bool,
    /// Start has been sent at least once: the guest may have run and may have written.
    pub may_have_run: bool,
    /// A Start went unanswered once, so that a later refusal proves nothing about it.
    pub start_lost: bool,
    /// The higher epoch under which a Start of the sealed guest has been sent.
    pub claiming: Option<Epoch>,
    /// An order ended without an answer; the VMM's status has to be seen first.
    pub uncertain: bool,
    /// Why the process ended.
    pub reason: String,
    pub prepare_us: u64,
    pub load_us: u64,
    pub activated: Option<ActivateTimings>,
    /// What it sealed. It outlives the process: the guest has not run since, so the file is the VM.
    pub sealed: Option<SealedState>,
    /// The epoch that was sealed here and went on as this one.
    pub claimed_from: Option<Epoch>,
    /// What came with the claim.
    pub handover: Option<Handover>,
}

impl Incarnation {
    /// A new one, about to be created.
    pub const fn preparing(epoch: Epoch, arbiter: Arbiter) -> Self {
        Self {
            epoch,
            phase: Phase::Preparing,
            arbiter,
            locked: false,
            loaded: None,
            loading: None,
            load_lost: false,
            may_have_run: false,
            start_lost: false,
            claiming: None,
            uncertain: false,
            reason: String::new(),
            prepare_us: 0,
            load_us: 0,
            activated: None,
            sealed: None,
            claimed_from: None,
            handover: None,
        }
    }

    /// Whether a process may exist that could run the guest or write its disks.
    pub fn is_live(&self) -> bool {
        self.phase != Phase::Ended
    }

    /// Whether it is proven that this process has never run the guest under this epoch.
    pub fn never_ran(&self, epoch: Epoch) -> bool {
        match epoch == self.epoch {
            true => !self.may_have_run,
            false => epoch > self.epoch && self.claiming != Some(epoch),
        }
    }

    /// Whether its guest would go on from this state file, or boot if none is named.
    pub(crate) fn goes_on_from(&self, hash: Option<[u8; 32]>) -> bool {
        // A file that may still be loaded would be what it goes on from.
        self.loaded == hash && (hash.is_some() || self.loading.is_none())
    }

    /// The process has ended. What it sealed stays, unless the guest may have run again after it.
    pub fn end(&mut self, reason: &str) {
        let may_go_on = self.claiming.is_some() || self.phase == Phase::Releasing;
        self.sealed = self.sealed.take().filter(|_| !may_go_on);
        self.phase = Phase::Ended;
        self.locked = false;
        self.uncertain = false;
        self.reason = reason.to_owned();
    }

    /// Whether nobody can say what its guest does: it may have run, and the VMM has yet to tell.
    pub fn is_unknown(&self) -> bool {
        self.uncertain && self.may_have_run && self.is_live()
    }

    /// Whether it stands before its first Start.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Prepared | Phase::Locked | Phase::Loaded)
    }

    /// The phase before the first Start, from what is locked and loaded.
    pub(crate) fn idle_phase(&self) -> Phase {
        match (self.loaded.is_some(), self.locked) {
            (true, _) => Phase::Loaded,
            (false, true) => Phase::Locked,
            (false, false) => Phase::Prepared,
        }
    }

    /// Takes over what the VMM says: its word is nearer to the truth than our memory of what we
    /// asked of it. Only a release in progress is not called off by it.
    pub fn see(&mut self, sight: &VmmSight) {
        if self.phase == Phase::Releasing || self.phase == Phase::Ended {
            return;
        }
        self.uncertain = false;
        self.locked = sight.locked;
        self.handover = sight.handover;
        // A claim back may have reached the VMM although its answer did not reach us.
        if sight.epoch > self.epoch && self.may_have_run {
            self.claimed_from = Some(self.epoch);
            self.epoch = sight.epoch;
        }
        self.sealed = match sight.state {
            VmmState::Sealed => sight.sealed.clone().or(self.sealed.take()),
            _ => None,
        };
        match sight.state {
            VmmState::Empty => self.phase = Phase::Preparing,
            VmmState::Created => self.phase = self.idle_phase(),
            VmmState::Loaded => {
                // Only one file is ever on its way, so it is that one.
                self.loaded = self.loaded.or(self.loading.take());
                self.phase = Phase::Loaded;
            }
            VmmState::Running | VmmState::Paused => {
                self.may_have_run = true;
                self.phase = Phase::Active;
            }
            VmmState::Sealed => {
                self.may_have_run = true;
                self.phase = Phase::Sealed;
            }
            // The process is about to end; its exit is what counts.
            VmmState::Exited => self.reason = sight.reason.clone(),
        }
    }
}
