//! The fencer of a node: a small process of its own that acts when agent, controllers or network do
//! not.
//!
//! ```text
//!   agent --- grant page ---> fencer ---> /dev/watchdog      pets under a fresh grant only
//!   agent --- vms/*/ -------> fencer ---> VMMs               SIGKILL to those that do not stop
//!   fencer --- facts.json --> agent ----> controller         which bound this node can promise
//! ```
//!
//! It has no async runtime, is locked into memory, scheduled in real time, and allocates nothing
//! once it runs. It handles no signal: however it ends, an armed watchdog stays armed, and only
//! `bellwether-fencer stop` can disarm it, while no VM depends on it.
//!
//! | module | what |
//! |---|---|
//! | [`decide`] | **pure**, of the agent's core: when to pet, whom to kill |
//! | [`record`] | **pure**: what the agent wrote about a VMM |
//! | [`roster`] | reads the VMMs of this node |
//! | [`victim`] | one VMM's process: identity first, then SIGKILL |
//! | [`device`] | the watchdog |
//! | [`facts`] | what the agent is told |
//! | [`fencer`] | all of it, step by step |
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod control;
pub mod device;
pub mod facts;
pub mod fencer;
pub mod journal;
pub mod record;
pub mod roster;
pub mod text;
pub mod victim;

pub use bellwether_agent_core::fencing as decide;
