//! The packages on trial: installed into a scratch directory, the units verified there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::contents::PACKAGES;
use crate::command::{is_installed, output};

/// Installs, verifies, removes.
pub fn check(packages: &[PathBuf], scratch: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(scratch);
    prepare(scratch)?;
    output(dpkg(scratch).arg("--install").args(packages))?;
    verify_units(scratch)?;
    run_programs(scratch)?;
    let names = PACKAGES.map(|package| package.name);
    output(dpkg(scratch).arg("--purge").args(names))?;
    fs::remove_dir_all(scratch).with_context(|| format!("remove {}", scratch.display()))?;
    match is_installed("lintian") {
        true => lint(packages),
        false => {
            eprintln!(
                "lintian is not installed (apt-get install lintian): its checks are left out"
            );
            Ok(())
        }
    }
}

/// As much of a system as dpkg asks for.
fn prepare(scratch: &Path) -> Result<()> {
    for directory in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "etc"] {
        fs::create_dir_all(scratch.join(directory))?;
    }
    for file in ["var/lib/dpkg/status", "var/lib/dpkg/available"] {
        fs::write(scratch.join(file), "")?;
    }
    Ok(())
}

/// Without root, without the packages that are depended upon, and with maintainer scripts that find
/// the scratch directory in DPKG_ROOT.
fn dpkg(scratch: &Path) -> Command {
    let mut command = Command::new("dpkg");
    command
        .arg(format!("--root={}", scratch.display()))
        .args(["--force-not-root", "--force-script-chrootless", "--force-depends"])
        .args(["--force-bad-path", "--log=/dev/null"]);
    command
}

fn verify_units(scratch: &Path) -> Result<()> {
    if !is_installed("systemd-analyze") {
        bail!("`systemd-analyze` is missing; apt-get install systemd");
    }
    let units = scratch.join("usr/lib/systemd/system");
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(&units)? {
        paths.push(with_programs_of(scratch, &entry?.path())?);
    }
    paths.sort();
    let said =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&paths).output()?;
    let said_text = String::from_utf8_lossy(&said.stderr);
    // It also reads the units of this machine, and complains of those.
    let ours: Vec<&str> = said_text.lines().filter(|line| line.contains("bellwether")).collect();
    match ours.is_empty() {
        true => Ok(()),
        false => bail!("systemd-analyze verify:\n{}", ours.join("\n")),
    }
}

/// The unit with its programs where they are now: verify looks whether they are there.
fn with_programs_of(scratch: &Path, unit: &Path) -> Result<PathBuf> {
    let text = fs::read_to_string(unit)?;
    let here = |program: &str| format!("={}{program}", scratch.display());
    let text = text.replace("=/usr/bin/", &here("/usr/bin/"));
    let text = text.replace("=/usr/lib/bellwether/", &here("/usr/lib/bellwether/"));
    fs::write(unit, text)?;
    Ok(unit.to_owned())
}

/// Each program says its version.
fn run_programs(scratch: &Path) -> Result<()> {
    for name in PACKAGES.iter().flat_map(|package| package.programs()) {
        let said = output(Command::new(scratch.join("usr/bin").join(name)).arg("--version"))?;
        if !said.contains(env!("CARGO_PKG_VERSION")) {
            bail!("`{name} --version` says {said:?}");
        }
    }
    Ok(())
}

fn lint(packages: &[PathBuf]) -> Result<()> {
    let mut lintian = Command::new("lintian");
    lintian.args(["--fail-on", "error,warning", "--allow-root"]).args(packages);
    match lintian.output()? {
        said if said.status.success() => Ok(()),
        said => bail!("lintian:\n{}", String::from_utf8_lossy(&said.stdout)),
    }
}
