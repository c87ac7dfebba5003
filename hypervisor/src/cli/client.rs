//! Clients of a running VMM's socket.

use std::io::{Read, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use bellwether_proto::v1::vmm_client::VmmClient;
use bellwether_proto::v1::{
    ConsoleInput, PauseRequest, ResumeRequest, SaveReply, SaveRequest, ShutdownRequest,
    StartRequest, StatusRequest, StopRequest, VmmStatus,
};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::args::{ClientCommand, SaveArgs};
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

async fn client(socket: &Path) -> Result<VmmClient<Channel>> {
    let channel = api::connect(socket).await;
    let channel = channel.with_context(|| {
        format!("no VMM answers at {}; is it running, and is this its socket?", socket.display())
    })?;
    Ok(VmmClient::new(channel))
}

/// The VMM's own words; the status code is for programs.
fn explain(status: tonic::Status) -> anyhow::Error {
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
    let generation = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
    let request = SaveRequest { directory: directory.display().to_string(), generation };
    let mut reply = client.save(request).await.map_err(explain)?.into_inner();
    if let (Some(target), Some(file)) = (target, &mut reply.file) {
        std::fs::rename(&file.path, &target)
            .with_context(|| format!("rename {} to {}", file.path, target.display()))?;
        file.path = target.display().to_string();
    }
    print_saved(&reply)?;
    if args.stop { stop(client).await } else { Ok(()) }
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

fn print_saved(reply: &SaveReply) -> Result<()> {
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
    }))
}

fn print_json(value: &serde_json::Value) -> Result<()> {
    writeln!(std::io::stdout(), "{value:#}")?;
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
