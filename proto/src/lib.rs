//! The wire of Bellwether: generated services and messages, and their conversions to and from
//! domain types. Generated types stop at these conversions.
#![forbid(unsafe_code)]

mod convert;
pub mod rules;

pub use convert::{ConvertError, restart_policy};

/// The generated code of the package `bellwether.v1`.
#[allow(clippy::all, clippy::pedantic, missing_docs)]
pub mod v1 {
    tonic::include_proto!("bellwether.v1");
}
