//! Scenarios: what is done to a cluster, and what must hold. docs/lab.md describes the format.

mod parse;
mod run;
mod verbs;

pub use parse::{Line, Scenario, Step};
pub use run::{Report, Runner};
