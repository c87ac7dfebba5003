//! Years of failures on the real decision code, under one seed.
//!
//! One thread runs a whole cluster on virtual time: controllers, agents, VMMs with guests, the
//! network, the storage, fencers, watchdogs, power switches. What decides is the product's own code: `bellwether-core`
//! (state, sagas, planner, reconciler, what a leader makes of messages and answers),
//! `bellwether-agent-core` (admission, floors, terms, leases, what is told), `bellwether-claim` (the
//! record in the claim) and `bellwether-lease` (what a page means). What carries it, in the product
//! async code on tokio, gRPC, openraft and KVM, is modelled here; docs/simulation.md says how.
//!
//! # A run
//!
//! A [`Scenario`] is data: a [`Cluster`], and [`Timed`] events, which are an administrator's
//! [`Request`]s or [`Fault`]s with their durations. [`run`] carries it out and gives a [`Run`]: the
//! decision log with virtual times, a hash over every event, what was met, and the [`Verdict`]. The
//! same scenario gives the same run, bit for bit.
//!
//! ```
//! use bellwether_simulation::{Cluster, Event, Fault, Scenario, Timed, Verdict, run};
//!
//! let mut scenario = Scenario::calm(Cluster::of(3, &["web"]));
//! let fault = Fault::Power { node: 1, for_ms: 20_000 };
//! scenario.events.push(Timed { at_ms: 5_000, event: Event::Fault(fault) });
//! let result = run(&scenario);
//! assert_eq!(result.verdict, Verdict::Held);
//! assert!(result.log.iter().any(|line| line.text.starts_with("failover of VM web begins")));
//! ```
//!
//! The log of `source == "cluster"` is what `bell event list` would show, `task` is one line for each
//! step of each task, `admin` what a person asked and was told, `fault` what went wrong.
//!
//! # Seeds
//!
//! [`Scenario::random`] is the scenario of a seed. [`search::run_set`] runs many, [`search::minimise`]
//! takes events out of a failing one until each that is left is needed. `cargo xtask sim` is both.
#![forbid(unsafe_code)]

mod admin;
mod agent;
mod controller;
pub mod coverage;
mod faults;
mod fencer;
mod kernel;
mod linear;
mod narrate;
mod net;
mod oracle;
mod raft;
mod random;
mod rng;
pub mod run;
pub mod scenario;
pub mod script;
pub mod search;
mod storage;
mod sync;
pub mod timeline;
mod vmm;
mod wire;
mod world;

pub use coverage::Coverage;
pub use run::{Line, Run, Verdict, run};
pub use scenario::{
    Cluster, Equipment, Event, Fault, NodeSize, Opening, PowerSwitch, Request, Rules, Scenario,
    Timed, VmSetup, Watchdog,
};
pub use storage::StorageKind;
