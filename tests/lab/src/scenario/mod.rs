//! Scenarios: what is done to a cluster, and what must hold. docs/lab.md describes the format.

mod library;
mod parse;
mod run;
mod verbs;

pub use library::Library;
pub use parse::{Line, Scenario, Step, WatchdogWay};
pub use run::{Report, Runner};
