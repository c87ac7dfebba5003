//! The benchmark itself works: a small group of real controllers under the load of simulated hosts.

use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

#[test]
fn three_controllers_carry_five_hosts_and_survive_the_loss_of_one() -> Result<()> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bellwether-bench-scale"));
    command.args(["--only", "grpc", "--grpc", "5x50", "--quick", "--json"]);
    let output = command.stderr(Stdio::inherit()).output()?;
    assert!(output.status.success(), "the benchmark failed");
    let result: Value = serde_json::from_slice(&output.stdout)?;
    let cell = result["grpc"]["cells"].get(0).context("there is no cell")?;
    let number = |name: &str| cell[name].as_f64().with_context(|| format!("no {name} in {cell}"));
    for name in ["create_per_s", "start_per_s", "renewals_per_s", "recover_ms", "snapshot_bytes"] {
        assert!(number(name)? > 0.0, "{name} in {cell}");
    }
    assert_eq!(number("failover_hosts")?, 1.0);
    // Many are started at once, and each is placed as things stand at that moment.
    let lost = number("failover_vms")?;
    assert!((8.0..=12.0).contains(&lost), "50 VMs on 5 hosts were not spread evenly: {lost}");
    Ok(())
}
