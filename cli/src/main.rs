//! `bell`, the administrator's command.
//!
//! ```text
//! args      what the command line says             contexts  which cluster, as whom
//! commands  one function for each command          client    ask and act, over the endpoints
//! output    everything that is printed             watch     follow tasks to their ends
//! console   the serial console of a VM             exit      exit codes, errors, remedies
//! ```
#![forbid(unsafe_code)]

mod args;
mod client;
mod commands;
mod console;
mod contexts;
mod exit;
mod output;
mod parse;
mod spec_file;
mod watch;

use std::process::ExitCode;

use clap::Parser;

use args::Cli;
use exit::{Exit, Failure};
use output::Output;

fn main() -> ExitCode {
    let cli = Cli::parse();
    bellwether_pki::install_crypto_provider();
    let output = Output::new(cli.global.output);
    match run(cli, &output) {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            output.failure(&failure);
            failure.exit.into()
        }
    }
}

fn run(cli: Cli, output: &Output) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Refused, format!("cannot start: {error}")))?;
    runtime.block_on(commands::run(cli, output))
}
