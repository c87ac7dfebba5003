//! Waiting for conditions.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::time::{MissedTickBehavior, interval};

/// Between two looks. Short against everything that is waited for, long against the cost of a look.
const PACE: Duration = Duration::from_millis(20);

/// Asks again and again until there is an answer. An error of the probe counts as "not yet": while
/// things are killed on purpose, most questions fail for a while; the last one is in the report.
pub async fn wait_for<T>(
    what: &str,
    timeout: Duration,
    mut probe: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = String::from("it is not so");
    while started.elapsed() < timeout {
        pace.tick().await;
        let left = timeout.saturating_sub(started.elapsed());
        match tokio::time::timeout(left, probe()).await {
            Ok(Ok(Some(found))) => return Ok(found),
            Ok(Ok(None)) => "it is not so".clone_into(&mut last),
            Ok(Err(error)) => last = format!("{error:#}"),
            // The time may have ended shortly after the question: the answer before it says more.
            Err(_) => last.push_str(" (and the last question was not answered in time)"),
        }
    }
    bail!("waited {timeout:?} for {what}: {last}")
}

/// The form for conditions that need no question to anybody.
pub async fn wait_until(
    what: &str,
    timeout: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<()> {
    wait_for(what, timeout, async || Ok(condition().then_some(()))).await
}
