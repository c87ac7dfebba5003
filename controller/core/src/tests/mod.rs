//! Tests of the core against a model of nodes, storage and faults.

pub mod model;
mod random;
mod scenarios;
