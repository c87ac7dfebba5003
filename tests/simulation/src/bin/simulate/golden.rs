//! The scenario files of this crate: run, held against what they say, or written anew.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bellwether_simulation::script::{Played, Script, with_log};
use serde_json::json;

/// Runs files, or all of the crate's own; true when each of them held.
pub fn run(names: &[String], bless: bool, as_json: bool) -> Result<bool> {
    let paths = chosen(names)?;
    let mut results = Vec::new();
    for path in &paths {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let script = Script::parse(&text).with_context(|| path.display().to_string())?;
        let played = script.play();
        let blessed = bless && write_log(path, &text, &played)?;
        if !as_json {
            print(path, &script, &played, blessed);
        }
        let missing = script.recorded.is_none() && !bless;
        let held = match bless {
            true => played.broken.is_none() && played.unmet.is_empty(),
            false => played.held() && !missing,
        };
        if missing && !as_json {
            println!("  it has no log yet; `cargo xtask sim --bless` writes it");
        }
        results.push((path.clone(), played, held));
    }
    let failed = results.iter().filter(|(.., held)| !held).count();
    match as_json {
        true => println!("{}", summary(&results)),
        false => println!("{} scenarios, {failed} not as they say", results.len()),
    }
    Ok(failed == 0)
}

fn chosen(names: &[String]) -> Result<Vec<PathBuf>> {
    if !names.is_empty() {
        return Ok(names.iter().map(PathBuf::from).collect());
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let entries = fs::read_dir(&directory).context("read tests/simulation/golden")?;
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "scenario"));
    paths.sort();
    match paths.is_empty() {
        true => bail!("there is no scenario in {}", directory.display()),
        false => Ok(paths),
    }
}

/// Writes the log of a run into its file; an expectation that is not met is never written over.
fn write_log(path: &Path, text: &str, played: &Played) -> Result<bool> {
    if played.broken.is_some() || !played.unmet.is_empty() {
        return Ok(false);
    }
    let written = with_log(text, &played.log);
    if written != text {
        fs::write(path, &written).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(written != text)
}

fn print(path: &Path, script: &Script, played: &Played, blessed: bool) {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let bad = played.broken.is_some() || !played.unmet.is_empty();
    if !bad && played.differs.is_none() && !blessed {
        return;
    }
    println!("{name}: {}", script.title);
    if let Some(broken) = &played.broken {
        println!("  BROKEN {broken}");
    }
    for unmet in &played.unmet {
        println!("  line {}: `{}`: {}", unmet.line, unmet.expected, unmet.seen);
    }
    match (&played.differs, blessed) {
        (_, true) => println!("  its log was written anew"),
        (Some(differs), false) => {
            let line = |line: &Option<String>| line.clone().unwrap_or_else(|| "(nothing)".into());
            println!("  line {}: the log differs", differs.line);
            println!("    recorded {}", line(&differs.recorded));
            println!("    now      {}", line(&differs.now));
        }
        (None, false) => {}
    }
    if bad {
        played.log.iter().for_each(|line| println!("    {line}"));
    }
}

fn summary(results: &[(PathBuf, Played, bool)]) -> serde_json::Value {
    let row = |(path, played, held): &(PathBuf, Played, bool)| {
        let unmet: Vec<_> = played
            .unmet
            .iter()
            .map(|it| json!({ "line": it.line, "expected": it.expected, "seen": it.seen }))
            .collect();
        json!({
            "file": path.display().to_string(),
            "held": held,
            "broken": played.broken,
            "unmet": unmet,
            "differs_at_line": played.differs.as_ref().map(|it| it.line),
        })
    };
    json!({ "scenarios": results.iter().map(row).collect::<Vec<_>>() })
}
