//! Clients that ask the controllers for many things at the same time.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bellwether_cluster_tests::admin::{Admin, Client};
use bellwether_cluster_tests::measure::percentile;
use bellwether_proto::v1;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use tonic::{Code, Status};

/// So many requests are under way at the same time, spread over all controllers.
pub const CLIENTS: usize = 32;
const CONTROLLERS: usize = 3;
/// How long a request is repeated that a controller did not begin, or whose answer was lost.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);

/// How many commands came through, and how fast.
#[derive(Debug)]
pub struct Pace {
    seconds: f64,
    /// Sorted, milliseconds.
    latencies: Vec<f64>,
}

impl Pace {
    pub fn per_s(&self) -> f64 {
        self.latencies.len() as f64 / self.seconds
    }

    pub fn latency_ms(&self) -> Value {
        let at = |part| percentile(&self.latencies, part);
        json!({ "p50": at(0.5), "p99": at(0.99), "max": at(1.0) })
    }
}

/// Asks for `count` things, [`CLIENTS`] at a time, each of a controller in turn.
async fn each<F>(admin: &Admin, count: usize, ask: impl Fn(Client, usize) -> F) -> Result<Pace>
where
    F: Future<Output = Result<(), Status>>,
{
    let begun = Instant::now();
    let one = async |index: usize| -> Result<f64> {
        let (asked, mut lost) = (Instant::now(), false);
        loop {
            let answer = ask(admin.of(1 + index % CONTROLLERS), index).await;
            let code = answer.as_ref().err().map(Status::code);
            match code {
                None => {}
                // An answer was lost, and what it was about had been done.
                Some(Code::AlreadyExists | Code::FailedPrecondition) if lost => {}
                Some(Code::Unavailable | Code::Unknown) if asked.elapsed() < PATIENCE => {
                    lost |= code == Some(Code::Unknown);
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
                Some(_) => answer.with_context(|| format!("request {index}"))?,
            }
            return Ok(asked.elapsed().as_secs_f64() * 1_000.0);
        }
    };
    let asked = stream::iter(0..count).map(one).buffer_unordered(CLIENTS);
    let mut latencies: Vec<f64> = asked.try_collect().await?;
    latencies.sort_by(f64::total_cmp);
    Ok(Pace { seconds: begun.elapsed().as_secs_f64(), latencies })
}

/// Creates VMs that are not started.
pub async fn create(admin: &Admin, count: usize) -> Result<Pace> {
    each(admin, count, async |mut client, index| {
        let spec = Some(spec(index));
        let request = v1::CreateVmRequest { spec, ..v1::CreateVmRequest::default() };
        client.create_vm(request).await.map(drop)
    })
    .await
    .context("create VMs")
}

/// Asks for the start of all VMs; that they are asked for does not mean that they run.
pub async fn start(admin: &Admin, count: usize) -> Result<Pace> {
    each(admin, count, async |mut client, index| {
        let request = v1::StartVmRequest { vm: name(index), node: String::new() };
        client.start_vm(request).await.map(drop)
    })
    .await
    .context("start VMs")
}

/// Changes a rule of so many VMs, one after the other: a command each.
pub async fn touch(client: &Client, count: usize) -> Result<()> {
    for index in 0..count {
        let priority = Some(1 + u32::try_from(index)?);
        let changes = Some(v1::VmChanges { priority, ..v1::VmChanges::default() });
        let request = v1::SetVmRequest { vm: name(index), changes };
        client.clone().set_vm(request).await.context("change the rules of a VM")?;
    }
    Ok(())
}

fn name(index: usize) -> String {
    format!("vm-{index:06}")
}

fn spec(index: usize) -> v1::VmSpec {
    let name = name(index);
    let disk = v1::Disk {
        path: format!("/srv/bellwether/disks/{name}.raw"),
        format: "raw".into(),
        read_only: false,
    };
    v1::VmSpec {
        name,
        vcpus: 1 + (index % 2) as u32,
        memory_mib: 512 << (index % 4),
        kernel: "/srv/bellwether/kernel.elf".into(),
        cmdline: "console=ttyS0 root=/dev/vda".into(),
        disks: vec![disk],
        restart: "restart".into(),
        ..v1::VmSpec::default()
    }
}
