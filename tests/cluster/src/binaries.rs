//! Where the programs under test are: beside the program that runs this.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Overrides where the programs are looked for.
pub const BIN_DIR_ENV: &str = "BELLWETHER_BIN_DIR";
/// Overrides where the test guest is.
pub const GUEST_ENV: &str = "BELLWETHER_TEST_GUEST";

/// The programs of one build.
#[derive(Clone, Debug)]
pub struct Binaries {
    pub controller: PathBuf,
    pub agent: PathBuf,
    pub vmm: PathBuf,
    pub bell: PathBuf,
    pub reaper: PathBuf,
    pub guest: PathBuf,
}

impl Binaries {
    /// Those that a cluster needs; without agents the paths of what runs VMs may lead nowhere.
    pub fn find(agents: bool) -> Result<Self> {
        let dir = bin_dir()?;
        let program = |name: &str| {
            let path = dir.join(name);
            let for_vms = matches!(name, "bellwether-agent" | "bellwether-vmm");
            match path.is_file() || (for_vms && !agents) {
                true => Ok(path),
                false => bail!("{} is not built; `cargo xtask test` builds it", path.display()),
            }
        };
        Ok(Self {
            controller: program("bellwether-controller")?,
            agent: program("bellwether-agent")?,
            vmm: program("bellwether-vmm")?,
            bell: program("bell")?,
            reaper: program("bellwether-test-reaper")?,
            guest: if agents { find_guest()? } else { PathBuf::new() },
        })
    }
}

/// Test programs lie in `deps`, one below the others.
fn bin_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(BIN_DIR_ENV) {
        return Ok(dir.into());
    }
    let own = std::env::current_exe().context("find the running program")?;
    let dir = own.parent().context("the running program lies nowhere")?;
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir }.to_owned())
}

fn find_guest() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(GUEST_ENV) {
        return Ok(path.into());
    }
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest/target");
    let candidates = ["release", "x86_64-unknown-linux-gnu/release"]
        .map(|profile| target.join(profile).join("bellwether-guest"));
    let newest = candidates
        .iter()
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max_by_key(|(modified, _)| *modified);
    let (_, path) = newest.with_context(|| {
        format!(
            "the test guest is not built below {}; `cargo xtask test` does it",
            target.display()
        )
    })?;
    path.canonicalize().with_context(|| format!("find {}", path.display()))
}
