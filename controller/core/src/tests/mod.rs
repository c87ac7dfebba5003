//! Tests of the core against a model of nodes, storage and faults.

mod fence;
mod forecast;
mod formats;
pub mod model;
mod packing;
mod pre_copy;
mod random;
mod rules;
mod scenarios;
mod sealed;
