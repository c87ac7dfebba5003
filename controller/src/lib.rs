//! The shell of the controller: sockets, clocks and tasks around the pure core.
//!
//! ```text
//!   administrators, agents --> forward (to the leader) --> api --> propose --> Raft
//!                                                           |
//!   leader only:  lead::run --> plan, executors, strays, membership --> orders to agents
//! ```
#![forbid(unsafe_code)]

mod api;
mod clock;
mod config;
mod controller;
mod forward;
mod lead;
mod links;
mod serve;

pub use config::{ConfigError, ControllerConfig};
pub use serve::run;
