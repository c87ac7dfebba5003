//! Commands for a lab that is up, one per line: for a person who tries things. They come from the
//! lab's own input or through its door; the thread that owns the lab does them one after the other.

use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::door::{Request, refused};
use crate::lab::Lab;
use crate::scenario::{Runner, Scenario, Step};
use crate::wire::Outcome;

pub const HELP: &str = "\
on HOST COMMAND…   run a command in a host; `bell` finds the cluster by itself
run FILE           run a scenario
list               hosts, power, cables
down               the end
help               this
Anything else is a step of a scenario: power off node2, cut storage node1, … (docs/lab.md)";

const COMMAND: Duration = Duration::from_secs(120);

/// Does what is asked until somebody says `down`, or nobody can ask any more.
pub fn serve(lab: &mut Lab, requests: &Receiver<Request>) -> Result<()> {
    let mut runner = Runner::new(lab);
    while let Ok(Request { line, answer }) = requests.recv() {
        let line = line.trim();
        let outcome = match line {
            "" | "down" => Outcome::default(),
            line => command(&mut runner, line).unwrap_or_else(|error| refused(&error)),
        };
        // Whoever asked may have gone meanwhile.
        let _ = answer.send(outcome);
        if line == "down" {
            break;
        }
    }
    Ok(())
}

/// Takes commands from the standard input; its end is `down`.
pub fn read_input(requests: &Sender<Request>) {
    let requests = requests.clone();
    thread::spawn(move || {
        let lines = std::io::stdin().lines().map_while(Result::ok);
        for line in lines.chain(["down".to_owned()]) {
            if ask(&requests, line).is_err() {
                break;
            }
        }
    });
}

/// One command, and what came of it on the screen.
fn ask(requests: &Sender<Request>, line: String) -> Result<()> {
    let (answer, answers) = channel();
    requests.send(Request { line, answer })?;
    let outcome = answers.recv()?;
    let mut output = std::io::stdout().lock();
    output.write_all(outcome.stdout.as_bytes())?;
    output.write_all(outcome.stderr.as_bytes())?;
    Ok(output.flush()?)
}

fn command(runner: &mut Runner, line: &str) -> Result<Outcome> {
    let said = |stdout: String| Ok(Outcome { stdout, ..Outcome::default() });
    match line.split_once(' ') {
        None if line == "help" => said(format!("{HELP}\n")),
        None if line == "list" => said(list(runner.lab())?),
        Some(("list", "--json")) => said(list_json(runner.lab())?),
        Some(("run", file)) => run(runner.lab(), file.trim().as_ref()),
        Some(("on", rest)) => {
            let Some((host, words)) = rest.split_once(' ') else { bail!("on HOST COMMAND…") };
            runner.lab().exec(host, &["sh", "-c", words], "", COMMAND)
        }
        _ => {
            runner.step(&Step::parse(line)?)?;
            said("done\n".to_owned())
        }
    }
}

/// A scenario in the lab that is up; the report as JSON, and a status that says whether it passed.
fn run(lab: &mut Lab, file: &Path) -> Result<Outcome> {
    let scenario = Scenario::read(file)?;
    let report = Runner::new(lab).run(&scenario);
    let code = i32::from(!report.passed);
    let stdout = format!("{}\n", serde_json::to_string(&report)?);
    Ok(Outcome { code, stdout, ..Outcome::default() })
}

fn list(lab: &mut Lab) -> Result<String> {
    let mut text = String::new();
    for host in lab.hosts() {
        let power = lab.power(&host)?.as_str();
        let cuts = match lab.cuts_of(&host) {
            cuts if cuts.is_empty() => String::new(),
            cuts => format!("  cut: {}", cuts.join(", ")),
        };
        text += &format!("{host:<8} {power}{cuts}\n");
    }
    Ok(text)
}

fn list_json(lab: &mut Lab) -> Result<String> {
    let mut hosts = Vec::new();
    for host in lab.hosts() {
        let power = lab.power(&host)?.as_str();
        hosts.push(json!({ "host": host, "power": power, "cut": lab.cuts_of(&host) }));
    }
    let text = serde_json::to_string(&hosts).context("print the hosts")?;
    Ok(text + "\n")
}
