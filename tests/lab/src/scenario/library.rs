//! The scenarios that come with the source.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::Scenario;

/// The file that names the standard set, a name per line, in the order in which it is run.
const STANDARD: &str = "standard";

pub struct Library {
    directory: PathBuf,
    pub standard: Vec<String>,
}

impl Library {
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(STANDARD);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
        let standard = lines.filter(|line| !line.is_empty()).map(str::to_owned).collect();
        Ok(Self { directory: directory.to_owned(), standard })
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| name.strip_suffix(".scenario").map(str::to_owned))
            .collect();
        names.sort();
        names
    }

    /// One of these by its name, or any other by its path.
    pub fn find(&self, name: &str) -> Result<Scenario> {
        let own = self.path(name);
        match (own.is_file(), Path::new(name).is_file()) {
            (true, _) => Scenario::read(&own),
            (_, true) => Scenario::read(&fs::canonicalize(name)?),
            _ => bail!(
                "there is no scenario `{name}`: give a file, or one of {}",
                self.names().join(", ")
            ),
        }
    }

    /// Names and what each is about.
    pub fn print(&self, output: &mut impl Write) -> Result<()> {
        for name in self.names() {
            let star = if self.standard.contains(&name) { "*" } else { " " };
            let text = fs::read_to_string(self.path(&name))?;
            let about = text.lines().next().and_then(|line| line.strip_prefix("# "));
            writeln!(output, "{star} {name:<28} {}", about.unwrap_or_default())?;
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.scenario"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_can_be_read_says_what_it_is_about_and_the_standard_ones_are_there() {
        let library =
            Library::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")).unwrap();
        for name in library.names() {
            assert!(library.find(&name).unwrap().lines.len() > 2, "{name}");
            assert!(fs::read_to_string(library.path(&name)).unwrap().starts_with("# "), "{name}");
        }
        assert!(!library.standard.is_empty());
        for name in &library.standard {
            library.find(name).unwrap();
        }
        let refused = library.find("power-los").err().unwrap().to_string();
        assert!(refused.contains("power-loss"), "{refused}");
    }
}
