//! Clients of a running VMM's socket.

use std::io::{Read, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use bellwether_proto::v1::vmm_client::VmmClient;
use bellwether_proto::v1::{
    ConsoleInput, PauseRequest, PreCopyProgress, PreCopyRequest, ResumeRequest, SaveReply,
    SaveRequest, ShutdownRequest, StartRequest, StatusRequest, StopRequest, VmmStatus,
};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::args::{ClientCommand, IfStuck, PreCopyArgs, SaveArgs};
use crate::api;

pub fn call(command: ClientCommand) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the asynchronous runtime")?;
    runtime.block_on(dispatch(command))?;
    // A read of standard input may still be waiting.
    runtime.shutdown_background();
    Ok(())
}

async fn dispatch(command: ClientCommand) -> Result<()> {
    match command {
        ClientCommand::Status(socket) => {
            let status = client(&socket.api_socket).await?.status(StatusRequest {}).await;
            print_status(&status.map_err(explain)?.into_inner())
        }
        ClientCommand::Pause(socket) => {
            let status = client(&socket.api_socket).await?.pause(PauseRequest {}).await;
            print_status(&status.map_err(explain)?.into_inner())
        }
        ClientCommand::Resume(socket) => resume(client(&socket.api_socket).await?).await,
        ClientCommand::Save(args) => save(args).await,
        ClientCommand::Shutdown(socket) => {
            let status = client(&socket.api_socket).await?.shutdown(ShutdownRequest {}).await;
            print_status(&status.map_err(explain)?.into_inner())
        }
        ClientCommand::Stop(socket) => stop(client(&socket.api_socket).await?).await,
        ClientCommand::Console(socket) => console(client(&socket.api_socket).await?).await,
    }
}

pub async fn client(socket: &Path) -> Result<VmmClient<Channel>> {
    let channel = api::connect(socket).await;
    let channel = channel.with_context(|| {
        format!("no VMM answers at {}; is it running, and is this its socket?", socket.display())
    })?;
    Ok(VmmClient::new(channel))
}

/// The VMM's own words; the status code is for programs.
pub fn explain(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

/// Ends a pause, starts what was restored paused, or claims a sealed VM back.
async fn resume(mut client: VmmClient<Channel>) -> Result<()> {
    let status = client.status(StatusRequest {}).await.map_err(explain)?.into_inner();
    let sealed_epoch = status.sealed.and_then(|sealed| sealed.file).map(|file| file.epoch);
    let status = match (status.state.as_str(), sealed_epoch) {
        ("sealed", Some(epoch)) => start(&mut client, epoch + 1).await?,
        ("loaded", _) => start(&mut client, status.epoch + 1).await?,
        _ => client.resume(ResumeRequest {}).await.map_err(explain)?.into_inner(),
    };
    print_status(&status)
}

async fn start(client: &mut VmmClient<Channel>, epoch: u64) -> Result<VmmStatus> {
    let request = StartRequest { epoch, lock_wait_ms: 0, consume_state_file: false };
    let reply = client.start(request).await.map_err(explain)?.into_inner();
    reply.status.context("the VMM answered without a status")
}

async fn save(args: SaveArgs) -> Result<()> {
    let target = args.state_file.as_deref().map(std::path::absolute).transpose()?;
    if let Some(target) = target.as_ref().filter(|target| target.exists()) {
        bail!("{} exists; remove it or give another --state-file", target.display());
    }
    let directory = match (&target, &args.directory) {
        (Some(target), _) => {
            target.parent().context("--state-file has no directory")?.to_path_buf()
        }
        (None, Some(directory)) => std::path::absolute(directory)?,
        (None, None) => bail!("give --state-file or --directory"),
    };
    let mut client = client(&args.socket.api_socket).await?;
    let generation = fresh_generation()?;
    let directory = directory.display().to_string();
    let pre_copy = match args.precopy {
        true => Some(pre_copy(&mut client, &args.pre_copy, &directory, generation).await?),
        false => None,
    };
    let request = SaveRequest { directory, generation };
    let mut reply = client.save(request).await.map_err(explain)?.into_inner();
    if let (Some(target), Some(file)) = (target, &mut reply.file) {
        std::fs::rename(&file.path, &target)
            .with_context(|| format!("rename {} to {}", file.path, target.display()))?;
        file.path = target.display().to_string();
    }
    print_saved(&reply, pre_copy.as_ref())?;
    if args.stop { stop(client).await } else { Ok(()) }
}

/// A number that no earlier save of this VM has.
pub fn fresh_generation() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64)
}

async fn stop(mut client: VmmClient<Channel>) -> Result<()> {
    client.stop(StopRequest {}).await.map_err(explain)?;
    Ok(())
}

async fn console(mut client: VmmClient<Channel>) -> Result<()> {
    let (to, input) = mpsc::channel(4);
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
            if to.blocking_send(ConsoleInput { data: buffer[..count].to_vec() }).is_err() {
                return;
            }
        }
    })?;
    let stream = client.console(ReceiverStream::new(input)).await.map_err(explain)?;
    let mut output = stream.into_inner();
    let mut stdout = std::io::stdout();
    while let Some(chunk) = output.message().await.map_err(explain)? {
        if chunk.dropped > 0 {
            writeln!(std::io::stderr(), "[{} bytes of earlier output are gone]", chunk.dropped)?;
        }
        stdout.write_all(&chunk.data)?;
        stdout.flush()?;
    }
    Ok(())
}

fn print_status(status: &VmmStatus) -> Result<()> {
    let sealed = status.sealed.as_ref().and_then(|sealed| sealed.file.as_ref());
    print_json(&json!({
        "vm_id": status.vm_id,
        "epoch": status.epoch,
        "state": status.state,
        "reason": status.reason,
        "locked": status.locked,
        "lease_deadline_ns": status.lease_deadline_ns,
        "memory_loaded_bytes": status.memory_loaded_bytes,
        "memory_total_bytes": status.memory_total_bytes,
        "vcpu_exits": status.vcpu_exits,
        "pid": status.pid,
        "sealed": sealed.map(|file| json!({"path": file.path, "hash": hex(&file.hash), "epoch": file.epoch})),
    }))
}

/// Starts a pre-copy, shows its progress, and returns when it is ready.
async fn pre_copy(
    client: &mut VmmClient<Channel>,
    args: &PreCopyArgs,
    directory: &str,
    generation: u64,
) -> Result<PreCopyProgress> {
    let request = pre_copy_request(args, directory, generation);
    let mut stream = client.pre_copy(request).await.map_err(explain)?.into_inner();
    while let Some(progress) = stream.message().await.map_err(explain)? {
        show_progress(&progress)?;
        match progress.phase.as_str() {
            "ready" => return Ok(progress),
            "ended" => bail!("{}", progress.reason),
            "saving" => bail!("somebody else saves this VM"),
            _ => {}
        }
    }
    bail!("the VMM is ending")
}

pub fn pre_copy_request(args: &PreCopyArgs, directory: &str, generation: u64) -> PreCopyRequest {
    PreCopyRequest {
        directory: directory.to_owned(),
        generation,
        downtime_ms: args.downtime_ms,
        finish_anyway: args.if_stuck == IfStuck::Finish,
        rate_bytes_per_s: args.rate_mib_s.map_or(0, |rate| rate << 20),
        ..Default::default()
    }
}

pub fn show_progress(progress: &PreCopyProgress) -> Result<()> {
    let mib = |bytes: u64| bytes >> 20;
    // Before the end of the first round nothing has been measured.
    if progress.bandwidth_bytes_per_s == 0 {
        return Ok(());
    }
    writeln!(
        std::io::stderr(),
        "{} round {}: {} MiB written, {} MiB left, dirtied {} MiB/s, written {} MiB/s, outage now {} ms",
        progress.phase,
        progress.round,
        mib(progress.bytes_written),
        mib(progress.residue_bytes),
        mib(progress.dirty_bytes_per_s),
        mib(progress.bandwidth_bytes_per_s),
        progress.outage_us.div_ceil(1000),
    )?;
    Ok(())
}

fn print_saved(reply: &SaveReply, pre_copy: Option<&PreCopyProgress>) -> Result<()> {
    let (file, timings) =
        (reply.file.clone().unwrap_or_default(), reply.timings.unwrap_or_default());
    print_json(&json!({
        "path": file.path,
        "hash": hex(&file.hash),
        "epoch": file.epoch,
        "bytes": file.bytes,
        "bytes_written": timings.bytes_written,
        "stop_us": timings.stop_us,
        "save_us": timings.save_us,
        "seal_us": timings.seal_us,
        "pre_copy": pre_copy.map(|progress| json!({
            "converged": progress.converged,
            "rounds": progress.round,
            "bytes_written": progress.bytes_written,
            "residue_bytes": progress.residue_bytes,
            "dirty_bytes_per_s": progress.dirty_bytes_per_s,
            "bandwidth_bytes_per_s": progress.bandwidth_bytes_per_s,
            "predicted_outage_us": progress.outage_us,
            "elapsed_us": progress.elapsed_us,
        })),
    }))
}

fn print_json(value: &serde_json::Value) -> Result<()> {
    writeln!(std::io::stdout(), "{value:#}")?;
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
