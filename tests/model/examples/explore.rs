//! Explores one configuration, sound or with a flaw, and prints what it found.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

use bellwether_model::{Config, Flaw, configs, explore};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let config = arguments.next().and_then(|name| named(&name));
    let flaw = arguments
        .next()
        .map(|name| Flaw::ALL.iter().copied().find(|flaw| format!("{flaw:?}") == name).ok_or(name));
    match (config, flaw) {
        (Some(config), None) => println!("{}", explore(config)),
        (Some(config), Some(Ok(flaw))) => println!("{}", explore(config.with(flaw))),
        (_, flaw) => {
            if let Some(Err(name)) = flaw {
                eprintln!("no flaw is named {name}");
            }
            eprintln!("usage: explore CONFIGURATION [FLAW]");
            for config in configs::ALL {
                eprintln!("  {}", config.name.replace(' ', "-"));
            }
            eprintln!("flaws: {:?}", Flaw::ALL);
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn named(name: &str) -> Option<Config> {
    configs::ALL.into_iter().find(|config| config.name.replace(' ', "-") == name)
}
