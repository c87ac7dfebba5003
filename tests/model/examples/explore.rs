//! Explores one configuration, sound or with a flaw, and prints what it found.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

use bellwether_model::{Config, Epoch, Flaw, configs, explore};

fn main() -> ExitCode {
    match configuration(std::env::args().skip(1)) {
        Ok(config) => {
            println!("{}", explore(config));
            ExitCode::SUCCESS
        }
        Err(problem) => {
            eprintln!("{problem}\n");
            eprintln!(
                "usage: explore CONFIGURATION [FLAW] [nodes=N] [epochs=N] [tasks=N] [faults=N]"
            );
            for config in configs::ALL {
                eprintln!("  {}", config.name.replace(' ', "-"));
            }
            eprintln!("flaws: {:?}", Flaw::ALL);
            ExitCode::from(2)
        }
    }
}

fn configuration(mut arguments: impl Iterator<Item = String>) -> Result<Config, String> {
    let name = arguments.next().ok_or("which configuration?")?;
    let named = |config: &Config| config.name.replace(' ', "-") == name;
    let all = configs::ALL.into_iter();
    let mut config = all.clone().find(named).ok_or(format!("no configuration is named {name}"))?;
    for argument in arguments {
        match argument.split_once('=') {
            Some((what, number)) => {
                let number = number.parse().map_err(|_| format!("{argument}: not a number"))?;
                match what {
                    "nodes" => config.nodes = number,
                    "epochs" => config.epoch_max = Epoch(number),
                    "tasks" => config.tasks_max = number,
                    "faults" => config.faults_max = number,
                    _ => return Err(format!("{what} cannot be set")),
                }
            }
            None => {
                let flaw = Flaw::ALL.iter().find(|flaw| format!("{flaw:?}") == argument);
                config.flaw = Some(*flaw.ok_or(format!("no flaw is named {argument}"))?);
            }
        }
    }
    Ok(config)
}
