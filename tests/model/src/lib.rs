//! An exhaustive model of the protocols on which Bellwether rests: leases and fencing, failover,
//! quick migration, and the handover of a node that is cut off. `docs/model.md` says what is
//! modelled, what is left out, and how to read a counterexample.
#![forbid(unsafe_code)]

mod action;
mod agents;
mod clocks;
mod commits;
mod config;
pub mod configs;
mod explore;
mod faults;
mod marks;
mod model;
mod set;
mod state;
mod tidy;
mod words;

pub use action::{Action, Commit, Proof, VmmAct};
pub use config::{Arbiter, Config, FaultKind, Flaw};
pub use explore::{Counterexample, Report, explore};
pub use marks::{Mark, Marks};
pub use model::{INVARIANTS, MEMORY_KEPT, ONE_WRITER, Protocol, RESUMED_ONCE, UNKNOWN_IS_NOT_DEAD};
pub use state::State;
pub use words::{Boot, Epoch, NodeId, VmId};
