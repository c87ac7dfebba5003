//! What the main loop counts.

#[derive(Default)]
pub struct Stats {
    pub ticks: u64,
    /// Ticks that did not happen because the guest was not running or too late.
    pub missed: u64,
    pub late_ns_max: u64,
    pub passes: u64,
    pub sleeps: u64,
    /// Time spent asleep.
    pub idle_ns: u64,
}
