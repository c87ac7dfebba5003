//! Tests of the core against a model of nodes, storage and faults.

mod formats;
pub mod model;
mod random;
mod rules;
mod scenarios;
mod sealed;
