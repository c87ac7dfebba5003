//! Half a minute of `cargo xtask torture migrate`, under a seed that is the same each time.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Result, ensure};
use bellwether_cluster_tests::torture;

#[tokio::test]
async fn half_a_minute_of_torture() -> Result<()> {
    let rounds = torture::run(20_261_123, Duration::from_secs(30)).await?;
    ensure!(rounds > 1, "only {rounds} rounds");
    Ok(())
}
