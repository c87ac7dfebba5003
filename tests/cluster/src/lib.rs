//! Clusters of real processes on one machine: what the demonstration, the benchmark and the
//! integration tests stand on.
//!
//! ```text
//! Cluster ── Node 1..n ── bellwether-controller, bellwether-agent ── bellwether-vmm …
//!    │                        (own data directories, boot id, loopback address, logs)
//!    ├─ Admin, Bell           what an administrator asks, by gRPC and by the command
//!    ├─ Failpoints            hold or kill any process at a named step
//!    └─ Watch (one per VM)    every incarnation's console and status: what the guest saw, and
//!                             whether it ever ran twice
//! ```
//!
//! The harness kills nothing that it did not start: processes are found by the cluster's own
//! temporary directory in their command line or environment. A second process, the reaper, does
//! the same when the harness itself is gone, so that nothing is left after a panic or a `kill -9`.
#![forbid(unsafe_code)]
// People and test logs read what this prints.
#![allow(clippy::print_stderr)]

pub mod admin;
pub mod bell;
pub mod binaries;
pub mod cases;
pub mod clock;
pub mod cluster;
pub mod failpoints;
pub mod guest;
pub mod journal;
pub mod lines;
pub mod measure;
pub mod migration;
pub mod net;
pub mod node;
pub mod options;
pub mod process;
pub mod storage;
pub mod torture;
pub mod vmm;
pub mod wait;
pub mod watch;

pub use cases::Cases;
pub use cluster::Cluster;
pub use guest::Guest;
pub use options::{Options, StorageKind};
pub use wait::wait_for;
pub use watch::Watch;
