//! The pure core of the controller.
//!
//! The replicated [`State`] changes only through [`State::apply`], which is deterministic: the
//! leader stamps time and identities into every [`Command`]. What to do next is decided by pure
//! functions of the state and of what agents reported: [`reconcile::plan`] starts tasks and gives
//! those that wait a node, [`saga::next_action`] moves one task a step further,
//! [`planner::choose`] finds a node and says why not the others. [`forecast::forecast`] runs all of
//! them on a copy in virtual time. The shell around this crate does the I/O and feeds the results back.
//!
//! ```text
//!   agents' reports --> Observed --\
//!                                   +--> plan ----------> Command --> Raft --> apply --> State
//!   State -------------------------+--> next_action --> order to an agent --> StepEvent --^
//! ```
#![forbid(unsafe_code)]

pub mod answer;
mod apply;
pub mod command;
pub mod config;
pub mod contact;
pub mod explain;
pub mod fence;
pub mod forecast;
pub mod leading;
pub mod observe;
pub mod planner;
pub mod power;
pub mod reconcile;
pub mod saga;
pub mod state;
pub mod state_file;
pub mod task;

pub use command::{Command, Outcome, Rejection, RejectionKind};
pub use config::Timing;
pub use observe::Observed;
pub use state::{Desired, Liveness, Member, Node, Place, Runner, State, Vm};
pub use task::{Attempt, Step, StepEvent, Task, TaskKind};

#[cfg(test)]
mod tests;
