//! Tries a power switch by hand.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a person or a script reads it")]

use std::path::Path;
use std::process::ExitCode;

use bellwether_power::agent::describe;
use bellwether_power::cli::{Cli, Command};
use bellwether_power::{PowerState, Switch, SwitchConfig};
use clap::Parser;
use serde_json::{Value, json};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.command) {
        Ok(report) => {
            print(cli.json, &report);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bellwether-power: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> anyhow::Result<Value> {
    match command {
        Command::Describe { agent } => {
            let program = Path::new("/usr/sbin").join(agent);
            Ok(serde_json::to_value(describe(&program)?)?)
        }
        Command::Check { settings } => {
            let (switch, metadata) = Switch::new(SwitchConfig::load(settings)?)?;
            let state = match switch.status()? {
                PowerState::On => "on",
                PowerState::Off => "off",
            };
            Ok(json!({ "agent": metadata.name, "about": metadata.about, "state": state }))
        }
        Command::Off { settings, .. } => {
            let (switch, _) = Switch::new(SwitchConfig::load(settings)?)?;
            let proof = switch.off()?;
            Ok(json!({
                "proof": "power", "agent": proof.agent().display().to_string(),
                "off_ms": proof.off().as_millis(), "confirmed_ms": proof.confirmed().as_millis(),
            }))
        }
        Command::On { settings } => {
            Switch::new(SwitchConfig::load(settings)?)?.0.on()?;
            Ok(json!({ "state": "on" }))
        }
    }
}

/// For a person one line for each key.
fn print(as_json: bool, report: &Value) {
    match report.as_object().filter(|_| !as_json) {
        None => println!("{report}"),
        Some(keys) => keys.iter().for_each(|(key, value)| println!("{key:<14}{value}")),
    }
}
