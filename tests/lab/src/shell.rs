//! Commands for a lab that is up, one per line: for a person who tries things.

use std::io::{BufRead, Write};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::lab::Lab;
use crate::scenario::{Runner, Scenario, Step};

const HELP: &str = "\
on HOST COMMAND…   run a command in a host; `bell` finds the cluster by itself
run FILE           run a scenario
list               hosts, power, cables
down               the end
help               this
Anything else is a step of a scenario: power off node2, cut storage node1, … (docs/lab.md)";

const COMMAND: Duration = Duration::from_secs(120);

/// Reads commands until the end of the input or `down`.
pub fn run(lab: &mut Lab) -> Result<()> {
    let mut output = std::io::stdout();
    writeln!(output, "{HELP}")?;
    let mut runner = Runner::new(lab);
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.trim() {
            "" => {}
            "down" => break,
            "help" => writeln!(output, "{HELP}")?,
            line => match command(&mut runner, line) {
                Ok(text) => writeln!(output, "{}", text.trim_end())?,
                Err(error) => writeln!(output, "error: {error:#}")?,
            },
        }
        output.flush()?;
    }
    Ok(())
}

fn command(runner: &mut Runner, line: &str) -> Result<String> {
    if line == "list" {
        return list(runner.lab());
    }
    if let Some(file) = line.strip_prefix("run ") {
        let scenario = Scenario::read(file.trim().as_ref())?;
        let report = Runner::new(runner.lab()).run(&scenario);
        return Ok(serde_json::to_string_pretty(&report)?);
    }
    if let Some(rest) = line.strip_prefix("on ") {
        let Some((host, words)) = rest.split_once(' ') else { bail!("on HOST COMMAND…") };
        return shell(runner.lab(), host, words);
    }
    runner.step(&Step::parse(line)?)?;
    Ok("done".to_owned())
}

fn shell(lab: &Lab, host: &str, words: &str) -> Result<String> {
    let outcome = lab.exec(host, &["sh", "-c", words], "", COMMAND)?;
    let mut text = outcome.stdout + &outcome.stderr;
    if outcome.code != 0 {
        text += &format!("(ended with {})", outcome.code);
    }
    Ok(text)
}

fn list(lab: &mut Lab) -> Result<String> {
    let mut text = String::new();
    for host in lab.hosts() {
        let power = lab.power(&host)?;
        text += &format!("{host:<8} {power:?} {}\n", lab.cuts_of(&host).join(", "));
    }
    Ok(text)
}
