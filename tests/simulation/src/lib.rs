//! Years of failures on the real decision code, under one seed.
#![forbid(unsafe_code)]

mod admin;
mod agent;
mod controller;
pub mod coverage;
mod faults;
mod kernel;
mod narrate;
mod net;
mod oracle;
mod raft;
mod rng;
pub mod run;
pub mod scenario;
pub mod search;
mod storage;
mod sync;
mod vmm;
mod wire;
mod world;

pub use coverage::Coverage;
pub use run::{Line, Run, Verdict, run};
pub use scenario::{Cluster, Event, Fault, Request, Scenario, Timed, VmSetup};
pub use storage::StorageKind;
