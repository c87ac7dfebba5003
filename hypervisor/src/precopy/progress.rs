//! What others see of a pre-copy: numbers, and the pieces of the file that are complete.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bellwether_memory::Piece;
use tokio::sync::watch;

/// Where a pre-copy stands.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Phase {
    #[default]
    Copying,
    /// A save now would take the predicted outage. `converged` says that this is within the budget.
    Ready { converged: bool },
    /// A save has taken the file over.
    Saving,
    /// Ended without a file: it could not converge, was aborted, or failed; the text says why.
    Ended(String),
}

impl Phase {
    /// Whether nothing follows.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Saving | Self::Ended(_))
    }
}

/// The numbers of a pre-copy.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Progress {
    pub phase: Phase,
    /// The unsealed file.
    pub path: PathBuf,
    pub epoch: u64,
    pub generation: u64,
    /// The round that is being written, or was last.
    pub round: u32,
    /// What was written in all rounds.
    pub bytes_written: u64,
    /// What was dirty at the end of the last round.
    pub residue_bytes: u64,
    pub dirty_bytes_per_s: u64,
    pub bandwidth_bytes_per_s: u64,
    /// How long the guest would stand still if it were saved now.
    pub outage_us: u64,
    pub memory_bytes: u64,
    pub elapsed_us: u64,
    /// How many pieces of the file are complete.
    pub pieces: usize,
}

/// A progress that one thread writes and others watch.
#[derive(Debug)]
pub struct Watched {
    sender: watch::Sender<Progress>,
    /// All pieces in the order in which they became complete, for readers that come late.
    pieces: Mutex<Vec<Piece>>,
}

impl Default for Watched {
    fn default() -> Self {
        Self { sender: watch::Sender::new(Progress::default()), pieces: Mutex::default() }
    }
}

impl Watched {
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        self.sender.send_modify(change);
    }

    pub fn add_piece(&self, piece: Piece) {
        let pieces = {
            let mut pieces = self.pieces();
            pieces.push(piece);
            pieces.len()
        };
        self.update(|progress| progress.pieces = progress.pieces.max(pieces));
    }

    pub fn now(&self) -> Progress {
        self.sender.borrow().clone()
    }

    pub fn watch(self: &Arc<Self>) -> watch::Receiver<Progress> {
        self.sender.subscribe()
    }

    /// Pieces from this one on, at most so many.
    pub fn pieces_from(&self, from: usize, most: usize) -> Vec<Piece> {
        let pieces = self.pieces();
        pieces.iter().skip(from).take(most).cloned().collect()
    }

    fn pieces(&self) -> MutexGuard<'_, Vec<Piece>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
