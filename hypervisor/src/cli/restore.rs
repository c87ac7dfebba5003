//! `restore`: a saved VM goes on in this process.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use bellwether_statefile::StateFile;
use bellwether_types::StateFileRef;

use super::args::RestoreArgs;
use super::host;
use crate::driver::{Command, Handle};

pub fn restore(args: RestoreArgs) -> Result<ExitCode> {
    let path = std::path::absolute(&args.state_file).context("--state-file")?;
    // The administrator vouches for this file, so what it says of itself is what is expected.
    let inspection = StateFile::inspect(&path)?;
    let header = &inspection.header;
    let memory_mib = header.regions.iter().map(|region| region.length).sum::<u64>() >> 20;
    let identity = header.identity;
    let file = StateFileRef {
        path: path.clone(),
        hash: inspection.hash,
        epoch: identity.epoch,
        bytes: header.file_length,
    };
    // The kernel is in the restored memory already.
    let spec = host::to_spec(&args.machine, path, memory_mib, String::new());
    let config = host::to_config(&args.machine, identity.vm_id, spec)?;
    let epoch = args.machine.epoch.unwrap_or(identity.epoch.0 + 1);
    let wait = Duration::from_millis(args.machine.lock_wait_ms);
    let (consume, paused) = (args.consume, args.paused);
    host::host(&args.machine.api_socket, args.machine.exit_file, move |handle: Handle| async move {
        host::ask(&handle, |reply| Command::Create(Box::new(config), reply)).await?;
        host::ask(&handle, |reply| Command::Load { file, reply }).await?;
        if !paused {
            host::ask(&handle, |reply| Command::Start { epoch, wait, consume, reply }).await?;
        }
        Ok(())
    })
}
