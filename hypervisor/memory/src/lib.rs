//! Guest memory: how a VM gets it, how it is saved, and how it comes back on demand.
//!
//! ```text
//!                 memfd (sealed: cannot shrink or grow)
//!                    | MAP_SHARED, one mapping per region
//!   KVM slots -------+------- devices (vm-memory)      both fault through the same mapping
//!                    |
//!      save_memory --+-- LazyRestore (userfaultfd)
//!             |              |  a fault: read the chunk, check it, hand it out
//!          state file     state file
//! ```
//!
//! - [`GuestRam`] owns the memory.
//! - [`save_memory`] writes it into a state file, several threads at once, past the page cache.
//! - [`Copier`] does so while the guest runs, in rounds; a [`DirtyLog`] tells what changed.
//! - [`Ahead`] loads what a source tells of before its file is sealed.
//! - [`LazyRestore`] gives it back: the VM starts at once, pages come when they are touched, the
//!   rest in the background. A page that cannot be read never becomes zeros.
//!
//! This is one of the crates that may use `unsafe`; each block says why it is sound.

mod ahead;
mod dirty;
mod faults;
mod loader;
mod pace;
mod precopy;
mod ram;
mod restore;
mod save;
mod userfault;

pub use ahead::{Ahead, AheadError, AheadStats};
pub use dirty::{DirtyBitmap, DirtyLog, PageSet, collect_dirty};
pub use pace::{RateLimit, StopSignal};
pub use precopy::{Copier, Piece, PieceSink, PreCopyError, RoundStats};
pub use ram::{
    GuestMemory, GuestRam, MEMORY_STEP, RAM_ABOVE_4G_START, RAM_BELOW_4G_MAX, RamError, ram_regions,
};
pub use restore::{
    EventSink, LazyEvent, LazyOptions, LazyRestore, LoadError, LoadPhase, Progress, RestoreError,
    RestoreMode, UserfaultSource,
};
pub use save::{SaveError, SaveOptions, SaveStats, save_memory};
pub use userfault::Userfaultfd;
