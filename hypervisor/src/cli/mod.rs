//! The command line: a VMM that works alone, the empty VMM that an agent starts, and clients.

mod args;
mod client;
mod disk;
mod host;
mod restore;

pub use args::Args;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::Command;

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let args = Args::parse();
    install_log(&args.log);
    let outcome = match args.command {
        Command::Run(run) => host::run(run),
        Command::Serve(serve) => host::serve(serve),
        Command::Restore(arguments) => restore::restore(arguments),
        Command::Client(client) => client::call(client).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        // A terminal that is gone gets no message.
        let _told = writeln!(std::io::stderr(), "error: {error:#}");
        ExitCode::from(crate::exit::CODE_ERROR)
    })
}

fn install_log(filter: &str) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter);
    // Another subscriber is there only in tests.
    let _installed_before = log.with_ansi(false).try_init();
}
