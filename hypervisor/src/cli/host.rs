//! Running a VM in this process: the driver on its thread, API and signals on this one.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use bellwether_types::{NodeId, RestartPolicy, VmId, VmSpec};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::args::{MachineArgs, RunArgs, ServeArgs};
use super::disk::absolute;
use crate::api::Listener;
use crate::driver::{Command, CreateConfig, Driver, Handle, Reply};
use crate::exit;
use crate::kvm::kick;
use crate::lease::Arbiter;
use crate::locks::host_boot_id;
use crate::machine::SerialOutput;

pub fn run(args: RunArgs) -> Result<ExitCode> {
    let vm_id = match &args.vm_id {
        Some(text) => text.parse().with_context(|| format!("--vm-id {text}"))?,
        None => VmId::from_uuid(Uuid::new_v4()),
    };
    let kernel = std::path::absolute(&args.kernel).context("--kernel")?;
    let initrd = args.initrd.as_deref().map(std::path::absolute).transpose().context("--initrd")?;
    let spec = VmSpec { initrd, ..to_spec(&args.machine, kernel, args.memory.0, args.cmdline) };
    let config = to_config(&args.machine, vm_id, spec)?;
    let epoch = args.machine.epoch.unwrap_or(1);
    let wait = Duration::from_millis(args.machine.lock_wait_ms);
    host(&args.machine.api_socket, args.machine.exit_file, move |handle: Handle| async move {
        let is_stdio = config.serial == SerialOutput::Stdout;
        ask(&handle, |reply| Command::Create(Box::new(config), reply)).await?;
        ask(&handle, |reply| Command::Start { epoch, wait, consume: false, reply }).await?;
        if is_stdio {
            feed_stdin(&handle);
        }
        Ok(())
    })
}

pub fn serve(args: ServeArgs) -> Result<ExitCode> {
    host(&Some(args.api_socket), args.exit_file, |_| async { Ok(()) })
}

/// The specification of a VM that works alone.
pub fn to_spec(args: &MachineArgs, kernel: PathBuf, memory_mib: u64, cmdline: String) -> VmSpec {
    VmSpec {
        name: "standalone".into(),
        vcpus: args.vcpus,
        memory_mib,
        kernel,
        initrd: None,
        cmdline,
        disks: args.disks.iter().map(|disk| disk.0.clone()).collect(),
        nics: args.nics.clone(),
        possible_owners: Default::default(),
        priority: 0,
        restart: RestartPolicy::Never,
    }
}

pub fn to_config(args: &MachineArgs, vm_id: VmId, spec: VmSpec) -> Result<CreateConfig> {
    spec.validate()?;
    let claim = args.claim.as_deref().map(std::path::absolute).transpose().context("--claim")?;
    Ok(CreateConfig {
        vm_id,
        spec,
        claim_path: claim,
        node_id: NodeId(0),
        boot_id: host_boot_id(),
        arbiter: Arbiter::None,
        lease_path: None,
        serial: args.serial.clone().map_or(SerialOutput::RingOnly, |serial| serial.0),
    })
}

/// Sends a command to the driver and waits for its answer.
pub async fn ask<T>(handle: &Handle, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
    let (reply, answer) = Reply::new();
    let sent = handle.commands.send(command(reply));
    sent.map_err(|_| anyhow::anyhow!("the VMM is ending"))?;
    Ok(answer.await.context("the VMM is ending")??)
}

/// Runs a VMM: `script` first, then whatever comes over the API, until it ends.
pub fn host<F, Fut>(
    socket: &Option<PathBuf>,
    exit_file: Option<PathBuf>,
    script: F,
) -> Result<ExitCode>
where
    F: FnOnce(Handle) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let socket = socket.as_deref().map(std::path::absolute).transpose().context("--api-socket")?;
    if let Some(path) = exit_path(socket.as_deref(), exit_file)? {
        exit::install(&path);
    }
    kick::install_handler().context("install the signal handler for vCPUs")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the asynchronous runtime")?;
    let reason = runtime.block_on(supervise(socket.as_deref(), script))?;
    // Threads that wait for storage or memory that never comes must not keep the process.
    std::process::exit(i32::from(exit::code_of(&reason)));
}

fn exit_path(socket: Option<&Path>, given: Option<PathBuf>) -> Result<Option<PathBuf>> {
    let beside = socket.and_then(Path::parent).map(|directory| directory.join("exit.json"));
    match given {
        Some(path) => Ok(Some(absolute(&path.to_string_lossy()).map_err(anyhow::Error::msg)?)),
        None => Ok(beside),
    }
}

async fn supervise<F, Fut>(socket: Option<&Path>, script: F) -> Result<String>
where
    F: FnOnce(Handle) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let listener = socket.map(Listener::bind).transpose()?;
    let (driver, commands, handle) = Driver::new();
    let (ended, mut end) = oneshot::channel();
    let (told, hears) = oneshot::channel();
    std::thread::Builder::new()
        .name("driver".into())
        .spawn(move || {
            let reason = driver.run(&commands);
            let _server_gone = told.send(reason.clone());
            let _main_gone = ended.send(reason);
        })
        .context("start the driver's thread")?;
    let signals = tokio::spawn(forward_signals(handle.clone())?);
    let server = tokio::spawn(serve_api(listener, handle.clone(), hears));
    let outcome = script(handle.clone()).await;
    if outcome.is_err() {
        handle.cancel.store(true, Ordering::SeqCst);
        let _ending_already = handle.commands.send(Command::Stop(Reply::new().0));
    }
    let reason = (&mut end).await.context("the driver's thread died")?;
    server.await.context("the API's task died")??;
    signals.abort();
    outcome.map(|()| reason)
}

async fn serve_api(
    listener: Option<Listener>,
    handle: Handle,
    ended: oneshot::Receiver<String>,
) -> Result<()> {
    match listener {
        Some(listener) => listener.serve(handle, ended).await.context("serve the API"),
        None => Ok(()),
    }
}

/// SIGTERM and SIGINT are an ordered stop.
fn forward_signals(handle: Handle) -> Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        handle.cancel.store(true, Ordering::SeqCst);
        let _ending_already = handle.commands.send(Command::Signal);
    })
}

/// Gives standard input to the serial port, until it ends.
fn feed_stdin(handle: &Handle) {
    let Some(machine) = handle.board.view().machine.clone() else { return };
    let feed = move || {
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
            machine.serial.input(&buffer[..count]);
        }
    };
    let started = std::thread::Builder::new().name("stdin".into()).spawn(feed);
    if let Err(error) = started {
        tracing::warn!(%error, "standard input does not reach the guest");
    }
}
