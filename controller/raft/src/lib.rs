//! openraft on redb: types, log store, state machine, network.
//!
//! A controller starts a [`RaftHandle`], serves its [`RaftService`] to the other controllers, and
//! proposes commands; what they make of the state is published as [`StateView`]s.
//!
//! Three things are promised. What [`RaftHandle::propose`] acknowledges is on the disks of a quorum.
//! What [`RaftHandle::confirm_leadership`] returns was true at a moment after the call began. What
//! cannot be read is an error, never a guess.
#![forbid(unsafe_code)]

mod codec;
mod config;
mod error;
mod handle;
mod machine;
mod membership;
mod network;
mod server;
mod status;
mod store;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod types;

pub use codec::CodecError;
pub use config::{Limits, RaftConfig, Timers};
pub use error::{
    ConfirmError, InitializeError, LeaderHint, MembershipError, ProposeError, StartError,
    TransferError,
};
pub use handle::{ConfirmedLeadership, RaftHandle};
pub use machine::{AppliedAt, StateMachine, StateView};
pub use network::{Connect, ConnectError};
pub use server::RaftService;
pub use status::{RaftStatus, Role, StatusWatch, Stopped};
pub use store::{DATABASE_FILE, FatalHook, StoreError, abort_process};
pub use types::{Applied, ControllerNode, Proposal, TypeConfig};
