//! What the fencer asks of the kernel and no safe interface offers: the watchdog's parameters
//! (Documentation/watchdog/watchdog-api.rst of the kernel), and real-time scheduling.

mod realtime;
mod watchdog;

pub use realtime::{Policy, be_on_time, policy};
pub use watchdog::{Support, get_timeout_s, set_timeout_s, support};
