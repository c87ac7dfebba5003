//! Breaks the product on purpose, one rule at a time, and requires that the simulator notices.
//!
//! Each mutation is a small file in `tests/simulation/mutations/`. It is applied to a copy of the tree
//! that is kept under the target directory with a target directory of its own, so that only what it
//! touches is built again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::command::{cargo, options, output, root, run};
use crate::sim::{PROFILE, PROGRAM, target};

const HELP: &str = "\
Break the product on purpose, one rule at a time: the simulator must notice each time.

Usage: cargo xtask mutate-sim [--list] [--json] [NAME ...]

Each file in tests/simulation/mutations names a source file, the exact text to find in it, what to
put there, how many seeds may be needed, and what breaks. The tool fails if a text is not found
exactly once any more, if a mutation does not compile, or if the simulator does not catch it within
its seeds. The unchanged tree has to hold for 200 seeds first.

Options:
  --list  Print the mutations and what each breaks
  --json  Print the results as one JSON object on standard output";

/// The unchanged tree must hold for so many; `cargo xtask sim` runs more.
const SEEDS_UNCHANGED: u64 = 200;

/// One change of the product that must not go unnoticed.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Mutation {
    name: String,
    file: PathBuf,
    seeds: u64,
    breaks: String,
    find: String,
    replace: String,
}

impl Mutation {
    /// Reads `key: value` lines, then `--- find` and `--- replace` with a text each.
    fn parse(name: &str, text: &str) -> Result<Self> {
        let (head, body) = text.split_once("--- find\n").context("there is no `--- find`")?;
        let (find, replace) =
            body.split_once("--- replace\n").context("there is no `--- replace`")?;
        let value = |key: &str| {
            let of_key = head.lines().find_map(|line| line.strip_prefix(&format!("{key}:")));
            of_key.map(|value| value.trim().to_owned()).with_context(|| format!("no `{key}:`"))
        };
        if find.trim().is_empty() || find == replace {
            bail!("it changes nothing");
        }
        Ok(Self {
            name: name.to_owned(),
            file: value("file")?.into(),
            seeds: value("seeds")?.parse().context("`seeds` is not a number")?,
            breaks: value("breaks")?,
            find: find.trim_end_matches('\n').to_owned(),
            replace: replace.trim_end_matches('\n').to_owned(),
        })
    }

    /// The source with this change in it.
    fn apply(&self, source: &str) -> Result<String> {
        match source.matches(&self.find).count() {
            1 => Ok(source.replacen(&self.find, &self.replace, 1)),
            found => bail!(
                "mutation `{}` does not apply any more: its text is {found} times in {}",
                self.name,
                self.file.display()
            ),
        }
    }
}

pub fn mutate(arguments: &[&str]) -> Result<()> {
    let (flags, names): (Vec<&str>, Vec<&str>) =
        arguments.iter().copied().partition(|argument| argument.starts_with('-'));
    if !options(&flags, &["--list", "--json"], HELP)? {
        return Ok(());
    }
    let all = mutations()?;
    if let Some(unknown) = names.iter().find(|name| !all.iter().any(|it| it.name == **name)) {
        bail!("there is no mutation `{unknown}`; see `cargo xtask mutate-sim --list`");
    }
    let chosen = all.into_iter().filter(|it| names.is_empty() || names.contains(&&*it.name));
    let mut chosen: Vec<Mutation> = chosen.collect();
    if flags.contains(&"--list") {
        chosen
            .iter()
            .for_each(|it| println!("{:<34} {:>5} seeds  {}", it.name, it.seeds, it.breaks));
        return Ok(());
    }
    // All of them are checked before the first is built.
    for mutation in &chosen {
        mutation.apply(&read(&root().join(&mutation.file))?)?;
    }
    // Those of one crate one after the other: what the last one touched has to be built once more.
    chosen.sort_by(|one, other| (&one.file, &one.name).cmp(&(&other.file, &other.name)));
    let mut results = hunt(&chosen)?;
    results.sort_by(|one, other| one.name.cmp(&other.name));
    report(&results, flags.contains(&"--json"))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read `{}`", path.display()))
}

fn mutations() -> Result<Vec<Mutation>> {
    let directory = root().join("tests/simulation/mutations");
    let entries = fs::read_dir(&directory).context("read tests/simulation/mutations")?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    let parse = |path: &PathBuf| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Mutation::parse(&name, &read(path)?).with_context(|| format!("`{}`", path.display()))
    };
    paths.iter().filter(|path| path.extension().is_some_and(|it| it == "txt")).map(parse).collect()
}

/// What became of one mutation.
struct Found {
    name: String,
    breaks: String,
    budget: u64,
    /// The first seed that failed, and what it said.
    caught: Option<(u64, String)>,
    seconds: u64,
}

fn hunt(chosen: &[Mutation]) -> Result<Vec<Found>> {
    let scratch = Scratch::prepare()?;
    scratch.build()?;
    if let Some((seed, what)) = scratch.search(SEEDS_UNCHANGED)? {
        bail!("without any mutation seed {seed} fails already: {what}");
    }
    let mut results = Vec::new();
    for mutation in chosen {
        let begun = Instant::now();
        let path = scratch.tree.join(&mutation.file);
        let source = read(&path)?;
        fs::write(&path, mutation.apply(&source)?)?;
        let caught = scratch.build().and_then(|()| scratch.search(mutation.seeds));
        fs::write(&path, source)?;
        let caught = caught.with_context(|| format!("mutation `{}`", mutation.name))?;
        let seconds = begun.elapsed().as_secs();
        match &caught {
            Some((seed, what)) => eprintln!("{}: seed {seed}: {what}", mutation.name),
            None => eprintln!("{}: NOT CAUGHT in {} seeds", mutation.name, mutation.seeds),
        }
        let (name, breaks) = (mutation.name.clone(), mutation.breaks.clone());
        results.push(Found { name, breaks, budget: mutation.seeds, caught, seconds });
    }
    Ok(results)
}

fn report(results: &[Found], as_json: bool) -> Result<()> {
    let missed: Vec<&str> =
        results.iter().filter(|it| it.caught.is_none()).map(|it| it.name.as_str()).collect();
    if as_json {
        let row = |it: &Found| {
            let (seed, what) = it.caught.clone().map_or((None, None), |(s, w)| (Some(s), Some(w)));
            json!({ "name": it.name, "breaks": it.breaks, "budget": it.budget, "seed": seed,
                    "what": what, "seconds": it.seconds })
        };
        println!("{}", json!({ "mutations": results.iter().map(row).collect::<Vec<_>>() }));
    } else {
        for it in results {
            let seed = it.caught.as_ref().map_or("-".to_owned(), |(seed, _)| seed.to_string());
            println!("{:<34} seed {seed:>5} of {:>5}  {} s", it.name, it.budget, it.seconds);
        }
        let seconds: u64 = results.iter().map(|it| it.seconds).sum();
        println!("{} mutations, {} min {} s", results.len(), seconds / 60, seconds % 60);
    }
    match missed.is_empty() {
        true => Ok(()),
        false => {
            bail!("{} of {} were not caught: {}", missed.len(), results.len(), missed.join(", "))
        }
    }
}

/// The copy of the tree, and where it is built.
struct Scratch {
    tree: PathBuf,
    target: PathBuf,
}

impl Scratch {
    /// Brings the copy up to date. What has not changed keeps its time, and is not built again.
    fn prepare() -> Result<Self> {
        let base = target()?.join("mutate-sim");
        let scratch = Self { tree: base.join("tree"), target: base.join("target") };
        let mut list = Command::new("git");
        list.args(["ls-files", "-co", "--exclude-standard"]).current_dir(root());
        let names = output(&mut list)?;
        let mut wanted = BTreeSet::new();
        for name in names.lines() {
            let (from, to) = (root().join(name), scratch.tree.join(name));
            let Ok(bytes) = fs::read(&from) else { continue };
            wanted.insert(to.clone());
            if fs::read(&to).is_ok_and(|old| old == bytes) {
                continue;
            }
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&to, bytes).with_context(|| format!("write `{}`", to.display()))?;
        }
        remove_others(&scratch.tree, &wanted)?;
        Ok(scratch)
    }

    fn build(&self) -> Result<()> {
        let mut build =
            cargo(&["build", "--quiet", "--profile", PROFILE, "-p", "bellwether-simulation"]);
        // A mutation may leave something unused.
        build.current_dir(&self.tree).env("CARGO_TARGET_DIR", &self.target);
        build.env("RUSTFLAGS", "-Awarnings").env("CARGO_PROFILE_SIM_INCREMENTAL", "true");
        // Most are caught within seconds, so that building takes longer than running.
        build.env("CARGO_PROFILE_SIM_OPT_LEVEL", "1");
        run(&mut build)
    }

    /// The first seed that fails within so many, and what it says.
    fn search(&self, seeds: u64) -> Result<Option<(u64, String)>> {
        let mut program = Command::new(self.target.join(PROFILE).join(PROGRAM));
        let program = program.args(["--stop", "--json", "--seeds", &seeds.to_string()]).output()?;
        let text = String::from_utf8_lossy(&program.stdout);
        let report: Value = serde_json::from_str(&text).context("read the simulator's report")?;
        let first = report["failures"].get(0);
        Ok(first.map(|failure| {
            let what = failure["what"].as_str().unwrap_or_default().chars().take(160).collect();
            (failure["seed"].as_u64().unwrap_or(0), what)
        }))
    }
}

/// Removes what the tree does not have any more.
fn remove_others(directory: &Path, wanted: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        match path.is_dir() {
            true => remove_others(&path, wanted)?,
            false if !wanted.contains(&path) => fs::remove_file(&path)?,
            false => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
file: a/b.rs
seeds: 20
breaks: one writer
--- find
if old {
--- replace
if false {
";

    #[test]
    fn a_mutation_applies_exactly_once_or_not_at_all() {
        let mutation = Mutation::parse("m", TEXT).unwrap();
        assert_eq!((mutation.seeds, mutation.breaks.as_str()), (20, "one writer"));
        assert_eq!(mutation.apply("x\nif old {\n}").unwrap(), "x\nif false {\n}");
        for source in ["nothing", "if old { if old {"] {
            let refused = mutation.apply(source).unwrap_err().to_string();
            assert!(refused.contains("`m` does not apply any more"), "{refused}");
        }
    }

    #[test]
    fn every_mutation_applies_to_this_tree() {
        let all = mutations().unwrap();
        assert!(all.len() >= 15, "{} mutations", all.len());
        for mutation in all {
            mutation.apply(&read(&root().join(&mutation.file)).unwrap()).unwrap();
        }
    }
}
