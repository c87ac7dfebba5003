//! What everybody may see of a VMM at any time, although its owner is busy: the driver writes it,
//! the API reads it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bellwether_memory::LazyRestore;
use bellwether_types::{Handover, StateFileRef};

use crate::exit;
use crate::gate::Hold;
use crate::lease::LeaseGuard;
use crate::lifecycle::Phase;
use crate::machine::Machine;
use crate::precopy::Watched;
use crate::snapshot::SaveTimes;

/// A sealed file as the API names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    pub file: StateFileRef,
    pub times: SaveTimes,
    pub bytes_written: u64,
    pub generation: u64,
}

/// The visible state.
pub struct View {
    pub vm_id: String,
    pub epoch: u64,
    pub phase: Phase,
    /// Why the guest ended or its memory failed; empty otherwise.
    pub reason: String,
    /// Why the guest is held for its claim, or waits for its locks, while it is.
    pub claim_fault: String,
    pub locked: bool,
    pub sealed: Option<Sealed>,
    /// What the claim says that was handed over.
    pub handover: Option<Handover>,
    pub machine: Option<Arc<Machine>>,
    pub lease: Option<Arc<LeaseGuard>>,
    pub memory: Option<Arc<LazyRestore>>,
    /// Bytes of memory that were loaded before their file was sealed.
    pub ahead_bytes: u64,
    /// The last pre-copy, under way or ended.
    pub pre_copy: Option<Arc<Watched>>,
}

impl View {
    /// State and reason in the words of the API.
    pub fn shown(&self) -> (&'static str, String) {
        let phase = match self.phase {
            Phase::Empty => "empty",
            Phase::Created => "created",
            Phase::Loaded => "loaded",
            Phase::Sealed => "sealed",
            Phase::Exited => "exited",
            Phase::Running => return self.shown_running(),
        };
        (phase, self.reason.clone())
    }

    fn shown_running(&self) -> (&'static str, String) {
        let held =
            |reason| self.machine.as_ref().is_some_and(|machine| machine.gate.is_held(reason));
        let why = if held(Hold::IoError) {
            self.reason.clone()
        } else if held(Hold::Claim) {
            self.claim_fault.clone()
        } else if held(Hold::Superseded) {
            "superseded".into()
        } else if held(Hold::Lease) {
            "lease".into()
        } else if held(Hold::Unlocked) {
            self.claim_fault.clone()
        } else if held(Hold::Administrator) {
            "administrator".into()
        } else {
            // A save in progress is still running: it ends in sealed or as if nothing had been.
            return ("running", String::new());
        };
        ("paused", why)
    }
}

/// The view, shared.
pub struct Board(Mutex<View>);

impl Default for Board {
    fn default() -> Self {
        Self(Mutex::new(View {
            vm_id: String::new(),
            epoch: 0,
            phase: Phase::Empty,
            reason: String::new(),
            claim_fault: String::new(),
            locked: false,
            sealed: None,
            handover: None,
            machine: None,
            lease: None,
            memory: None,
            ahead_bytes: 0,
            pre_copy: None,
        }))
    }
}

impl Board {
    pub fn view(&self) -> MutexGuard<'_, View> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the view, and what an exit record would say.
    pub fn update(&self, change: impl FnOnce(&mut View)) {
        let mut view = self.view();
        change(&mut view);
        exit::note(&view.vm_id, view.epoch, view.shown().0);
    }
}
