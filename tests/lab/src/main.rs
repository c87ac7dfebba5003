//! `bellwether-lab`, which `cargo xtask lab` builds and starts.
#![forbid(unsafe_code)]
// A person reads what this prints.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use bellwether_lab::cluster;
use bellwether_lab::lab::{Lab, Plan};
use bellwether_lab::machine::Image;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask lab", about = "A cluster of real hosts on this machine")]
struct Arguments {
    /// Directory with vmlinuz, initrd and root.ext4.
    #[arg(long, env = "BELLWETHER_LAB_IMAGE", hide = true)]
    image: PathBuf,
    /// The file with our programs.
    #[arg(long, env = "BELLWETHER_LAB_LAYER", hide = true)]
    layer: PathBuf,
    /// Directory for disks and logs.
    #[arg(long, env = "BELLWETHER_LAB_DIR", hide = true)]
    directory: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot the hosts and make a cluster of them.
    Up {
        #[arg(long, default_value_t = 3)]
        nodes: u8,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let image = Image { base: arguments.image.clone(), layer: arguments.layer.clone() };
    match arguments.command {
        Command::Up { nodes } => up(&Plan { nodes, image, directory: arguments.directory.clone() }),
    }
}

fn up(plan: &Plan) -> Result<()> {
    let mut lab = Lab::make(plan)?;
    for host in lab.hosts() {
        lab.switch_on(&host)?;
    }
    for host in lab.hosts() {
        lab.await_boot(&host)?;
        println!("{:>8.1} s  {host} is up", lab.timeline.now().as_secs_f64());
    }
    cluster::form(&mut lab)?;
    println!("{:>8.1} s  the cluster is formed", lab.timeline.now().as_secs_f64());
    let mut line = String::new();
    while std::io::stdin().read_line(&mut line)? > 0 {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [host, rest @ ..] = &words[..] {
            match lab.exec(
                host,
                &["sh", "-c", &rest.join(" ")],
                "",
                std::time::Duration::from_secs(60),
            ) {
                Ok(outcome) => println!("{}{}[{}]", outcome.stdout, outcome.stderr, outcome.code),
                Err(error) => println!("{error:#}"),
            }
        }
        line.clear();
    }
    Ok(())
}
