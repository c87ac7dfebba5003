//! The virtual machine monitor: one process, one VM.
//!
//! ```text
//!   api (tonic, unix socket)          lease thread (timer)
//!            | commands                   | hold / release
//!            v                            v
//!   driver: owns the lifecycle ------>  gate  <----- permit: epoch and deadline
//!            |                          ^   ^
//!            v                   enter  |   |  try_enter, may_submit
//!   machine: kvm, memory, devices -- vCPUs  disk workers
//! ```
//!
//! The VMM knows nothing of clusters. It enforces by itself what a cluster relies on: the claim
//! with its epoch and the disk locks, held for its whole life, and the lease's deadline.
#![deny(unsafe_code)]

pub mod api;
pub mod board;
pub mod boot;
pub mod claim_watch;
pub mod cli;
pub mod clock;
pub mod devices;
pub mod driver;
pub mod exit;
pub mod gate;
#[allow(unsafe_code)]
pub mod kvm;
pub mod layout;
pub mod lease;
pub mod lifecycle;
pub mod locks;
pub mod machine;
pub mod precopy;
pub mod snapshot;
pub mod vcpus;

pub use bellwether_memory::GuestMemory;
