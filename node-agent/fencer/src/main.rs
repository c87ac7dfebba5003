//! The fencer of one Bellwether node.
#![forbid(unsafe_code)]
// Two commands print for a person; the fencer itself logs through `journal`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::ExitCode;

use anyhow::Context;
use bellwether_fencer::cli::{Cli, Command, Report};
use bellwether_fencer::config::FencerConfig;
use bellwether_fencer::control;
use bellwether_fencer::device::{Watchdog, look_up};
use bellwether_fencer::facts::Facts;
use bellwether_fencer::fencer::{Fencer, make_punctual};
use clap::Parser;
use serde_json::{Value, json};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => load(&args.config).and_then(|config| run(&config)),
        Command::Check(args) => load(&args.config.config).map(|config| check(&config, &args)),
        Command::Status(args) => load(&args.config.config).and_then(|it| status(&it, &args)),
        Command::Stop(args) => load(&args.config)
            .and_then(|config| control::stop(&config.directory()).map_err(Into::into)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bellwether-fencer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(path: &std::path::Path) -> anyhow::Result<FencerConfig> {
    Ok(FencerConfig::load(path)?)
}

fn run(config: &FencerConfig) -> anyhow::Result<()> {
    let mut fencer = Fencer::prepare(config)?;
    let punctual = make_punctual(config.priority);
    if config.watchdog {
        let device = &config.watchdog_device;
        fencer.arm(Watchdog::arm(device, config.watchdog_s, config.software_watchdog)?);
    }
    fencer.publish(config, punctual)?;
    notify_ready().context("tell systemd that the fencer is ready")?;
    Ok(fencer.run()?)
}

/// The one message of sd_notify(3) that matters here.
fn notify_ready() -> std::io::Result<()> {
    let Some(place) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match place.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&place)?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address).map(drop)
}

fn check(config: &FencerConfig, args: &Report) {
    let punctual = make_punctual(config.priority);
    let device = config.watchdog_device.display().to_string();
    let (identity, nowayout, problem) = match look_up(&config.watchdog_device) {
        Ok(found) => (found.identity, found.nowayout, None),
        Err(error) => (None, None, Some(error.to_string())),
    };
    print(
        args.json,
        &json!({
            "watchdog": config.watchdog, "device": device, "identity": identity, "nowayout": nowayout,
            "problem": problem, "realtime": punctual.realtime, "locked": punctual.locked,
        }),
    );
}

fn status(config: &FencerConfig, args: &Report) -> anyhow::Result<()> {
    let directory = config.directory();
    let facts = Facts::read(&directory).with_context(|| format!("read {}", directory.display()))?;
    let facts = facts.with_context(|| format!("no fencer runs on {}", directory.display()))?;
    let (watchdog_ms, pet_ms, reason) = match facts.proof() {
        Ok(bound) => (Some(bound.watchdog_ms), Some(bound.pet_ms), None),
        Err(reason) => (None, None, Some(reason.to_string())),
    };
    let mut report = serde_json::to_value(&facts)?;
    report["proof"] = json!({ "watchdog_ms": watchdog_ms, "pet_ms": pet_ms, "reason": reason });
    print(args.json, &report);
    Ok(())
}

/// For a person one line for each key.
fn print(as_json: bool, report: &Value) {
    match report.as_object().filter(|_| !as_json) {
        None => println!("{report}"),
        Some(keys) => keys.iter().for_each(|(key, value)| println!("{key:<14}{value}")),
    }
}
