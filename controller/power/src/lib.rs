//! Power fencing through any fence agent of the ClusterLabs project: the fence proof `power`.
//!
//! A fence agent is a program. It takes `key=value` lines on standard input, one of them the
//! *action*, and answers with its exit status (the ClusterLabs "Fence Agent API"). The proof is an
//! `off` that succeeded, and after it a `status` that said *off*; nothing less, and a timeout is a
//! failure of either.
//!
//! | module | what |
//! |---|---|
//! | [`metadata`] | **pure**: what an agent says about itself, and whether settings fit it |
//! | [`outcome`] | **pure**: what an exit status means, and when it is a proof |
//! | [`parameters`] | what goes to standard input, and nowhere else |
//! | [`process`] | runs a program that may hang, talk without end, or leave children behind |
//! | [`agent`] | one host's power switch |
//! | [`config`] | its settings file |
//!
//! Everything blocks, for as long as the timeouts say: call it from a thread of its own.
#![forbid(unsafe_code)]

pub mod agent;
pub mod cli;
pub mod config;
pub mod metadata;
pub mod outcome;
pub mod parameters;
pub mod process;

pub use agent::{PowerError, PowerProof, Switch};
pub use config::SwitchConfig;
pub use metadata::Metadata;
pub use outcome::PowerState;
