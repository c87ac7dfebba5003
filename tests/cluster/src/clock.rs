//! Wall clocks that jump: a library that is loaded into the processes of a node and adds an offset
//! to what they take for the time of day.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Compiles the library. A C compiler is there wherever Rust programs can be linked.
pub fn build_library(root: &Path) -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/fakeclock.c");
    let library = root.join("fakeclock.so");
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-O2", "-Wall", "-o"]).arg(&library).arg(&source);
    let output = command.output().context("start cc")?;
    let problems = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "compile {}: {problems}", source.display());
    Ok(library)
}

/// The wall clock of one node.
#[derive(Clone, Debug)]
pub struct WallClock {
    library: PathBuf,
    file: PathBuf,
}

impl WallClock {
    pub fn create(library: &Path, node_dir: &Path) -> Result<Self> {
        let clock = Self { library: library.to_owned(), file: node_dir.join("clock") };
        File::create(&clock.file).context("create the clock's file")?;
        clock.set(0)?;
        Ok(clock)
    }

    /// From now on the node's clock is so many seconds off. The file is mapped by the processes, so
    /// it is written in place.
    pub fn set(&self, seconds: i64) -> Result<()> {
        let file = File::options().write(true).open(&self.file).context("open the clock's file")?;
        file.write_all_at(&seconds.to_le_bytes(), 0).context("write the clock's file")
    }

    /// What the node's processes need in their environment.
    pub fn environment(&self) -> [(String, String); 2] {
        let path = |path: &Path| path.display().to_string();
        [
            ("LD_PRELOAD".to_owned(), path(&self.library)),
            ("FAKE_CLOCK_FILE".to_owned(), path(&self.file)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_jumps_for_those_that_load_the_library() {
        let dir = std::env::temp_dir().join(format!("bw-clock-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&dir).unwrap();
        let clock = WallClock::create(&build_library(&dir).unwrap(), &dir).unwrap();
        clock.set(3_600).unwrap();
        let seconds = |environment: &[(String, String)]| -> i64 {
            let mut date = Command::new("date");
            date.arg("+%s").envs(environment.iter().cloned());
            String::from_utf8_lossy(&date.output().unwrap().stdout).trim().parse().unwrap()
        };
        let ahead = seconds(&clock.environment()) - seconds(&[]);
        std::fs::remove_dir_all(&dir).unwrap();
        assert!((3_590..=3_610).contains(&ahead), "{ahead} s ahead");
    }
}
