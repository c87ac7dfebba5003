//! `restore`: a saved VM goes on in this process; with `--tail` one that still runs in another.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bellwether_proto::v1::vmm_client::VmmClient;
use bellwether_proto::v1::{PreCopyProgress, PreCopyRequest, SaveReply, SaveRequest, StopRequest};
use bellwether_statefile::{Header, StateFile};
use bellwether_types::{Epoch, StateFileRef};
use tokio::task::JoinHandle;
use tonic::Streaming;
use tonic::transport::Channel;

use super::args::RestoreArgs;
use super::{client, host};
use crate::api;
use crate::driver::{Command, CreateConfig, Handle};

/// A destination that is no further behind than this loads the rest faster than the guest notices.
const BEHIND_BYTES: u64 = 16 << 20;
/// One that never catches up is not waited for; what it lacks comes on demand.
const CATCH_UP_MAX: Duration = Duration::from_secs(5);

pub fn restore(args: RestoreArgs) -> Result<ExitCode> {
    match (&args.state_file, args.tail.clone()) {
        (_, Some(socket)) => tail(args, &socket),
        (Some(path), None) => {
            let path = std::path::absolute(path).context("--state-file")?;
            sealed(args, &path)
        }
        (None, None) => bail!("give --state-file or --tail"),
    }
}

fn sealed(args: RestoreArgs, path: &Path) -> Result<ExitCode> {
    // The administrator vouches for this file, so what it says of itself is what is expected.
    let inspection = StateFile::inspect(path)?;
    let header = &inspection.header;
    let file = StateFileRef {
        path: path.to_path_buf(),
        hash: inspection.hash,
        epoch: header.identity.epoch,
        bytes: header.file_length,
    };
    let config = config_of(&args, header, path)?;
    let (api_socket, exit_file) = (args.machine.api_socket.clone(), args.machine.exit_file.clone());
    host::host(&api_socket, exit_file, move |handle: Handle| async move {
        host::ask(&handle, |reply| Command::Create(Box::new(config), reply)).await?;
        let epoch = file.epoch;
        host::ask(&handle, |reply| Command::Load { file, reply }).await?;
        start(&args, &handle, epoch).await
    })
}

/// A machine as the header of a state file describes it.
fn config_of(args: &RestoreArgs, header: &Header, path: &Path) -> Result<CreateConfig> {
    let memory_mib = header.regions.iter().map(|region| region.length).sum::<u64>() >> 20;
    // The kernel is in the restored memory already.
    let spec = host::to_spec(&args.machine, path.to_path_buf(), memory_mib, String::new());
    host::to_config(&args.machine, header.identity.vm_id, spec)
}

/// Lets the guest go on, unless it is to wait for `resume`.
async fn start(args: &RestoreArgs, handle: &Handle, saved: Epoch) -> Result<()> {
    if args.paused {
        return Ok(());
    }
    let epoch = args.machine.epoch.unwrap_or(saved.0 + 1);
    let wait = Duration::from_millis(args.machine.lock_wait_ms);
    let consume = args.consume;
    host::ask(handle, |reply| Command::Start { epoch, wait, consume, reply }).await?;
    Ok(())
}

/// Saves the guest of another VMM with pre-copy, loads its memory along with that, and goes on with it
/// here.
fn tail(args: RestoreArgs, socket: &Path) -> Result<ExitCode> {
    let socket = socket.to_path_buf();
    let directory = args.directory.clone().context("--tail needs --directory")?;
    let directory = std::path::absolute(directory)?.display().to_string();
    let generation = client::fresh_generation()?;
    let request = client::pre_copy_request(&args.pre_copy, &directory, generation);
    let request = PreCopyRequest { tell_pieces: true, ..request };
    let (api_socket, exit_file) = (args.machine.api_socket.clone(), args.machine.exit_file.clone());
    host::host(&api_socket, exit_file, move |handle: Handle| async move {
        let mut source = client::client(&socket).await?;
        let stream = source.pre_copy(request).await.map_err(client::explain)?.into_inner();
        let save = SaveRequest { directory, generation };
        let reply = load_along(&args, &handle, &source, stream, save).await?;
        let file = StateFileRef::try_from(reply.file.context("the source named no file")?)?;
        let epoch = file.epoch;
        // The source keeps its VM, stopped, until this one has all of it.
        host::ask(&handle, |reply| Command::Load { file, reply }).await?;
        source.stop(StopRequest {}).await.map_err(client::explain)?;
        start(&args, &handle, epoch).await
    })
}

/// Loads what the source tells of, has it save when it is ready, and goes on to the last piece.
async fn load_along(
    args: &RestoreArgs,
    handle: &Handle,
    source: &VmmClient<Channel>,
    mut stream: Streaming<PreCopyProgress>,
    save: SaveRequest,
) -> Result<SaveReply> {
    let (mut is_created, mut saving, mut ready_since) = (false, None, None);
    while let Some(progress) = stream.message().await.map_err(client::explain)? {
        client::show_progress(&progress)?;
        // The guest stands: what is not here yet is read from the sealed file, not piece by piece.
        if saving.as_ref().is_some_and(JoinHandle::is_finished) {
            break;
        }
        if progress.phase == "ended" && saving.is_none() {
            bail!("{}", progress.reason);
        }
        if !is_created {
            let header = StateFile::inspect(Path::new(&progress.path))?.header;
            let config = Box::new(config_of(args, &header, Path::new(&progress.path))?);
            host::ask(handle, |reply| Command::Create(config, reply)).await?;
            is_created = true;
        }
        let is_ready = progress.phase == "ready";
        let loaded = load_pieces(handle, progress).await?;
        if is_ready && saving.is_none() && has_caught_up(loaded, &mut ready_since) {
            let (mut source, save) = (source.clone(), save.clone());
            saving = Some(tokio::spawn(async move { source.save(save).await }));
        }
    }
    let saving = saving.context("the source is ending")?;
    Ok(saving.await?.map_err(client::explain)?.into_inner())
}

/// Whether a message of a pre-copy that is ready, with so much to load, is the last one to wait for.
fn has_caught_up(loaded: u64, ready_since: &mut Option<Instant>) -> bool {
    let waited = ready_since.get_or_insert_with(Instant::now).elapsed();
    loaded <= BEHIND_BYTES || waited > CATCH_UP_MAX
}

/// Gives the bytes that were loaded.
async fn load_pieces(handle: &Handle, progress: PreCopyProgress) -> Result<u64> {
    if progress.pieces.is_empty() {
        return Ok(0);
    }
    let (path, epoch) = (progress.path.into(), Epoch(progress.epoch));
    let (pieces, generation) = (api::to_pieces(progress.pieces)?, progress.generation);
    let command = |reply| Command::LoadAhead { path, epoch, generation, pieces, reply };
    Ok(host::ask(handle, command).await?.bytes)
}
