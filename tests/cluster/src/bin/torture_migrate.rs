//! Moves and saves of a VM under faults at random moments.
#![forbid(unsafe_code)]
// A person reads what this prints.
#![allow(clippy::print_stderr)]

use std::time::Duration;

use anyhow::Result;
use bellwether_cluster_tests::torture;
use clap::Parser;

/// Moves and saves of a VM under faults at random moments.
///
/// Each round begins a move or a save, strikes after a random while, heals, and checks: one VMM
/// runs the guest, its memory and its journal are whole, a new attempt succeeds, no file is left.
#[derive(Parser)]
struct Cli {
    /// How long to go on
    #[arg(long, value_name = "N", default_value_t = 10)]
    minutes: u64,
    /// Chooses the faults and their moments [default: from the time of day]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = cli.seed.unwrap_or(now.as_secs());
    torture::run(seed, Duration::from_secs(cli.minutes * 60)).await.map(drop)
}
