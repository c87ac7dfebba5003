//! `cargo xtask lab`: makes what the lab's hosts boot from, and starts the lab.
//!
//! ```text
//! deploy/lab/image.sh   Debian's packages       ->  <target>/lab-hosts/   kept until the recipe changes
//! cargo xtask package   our programs            ->  <target>/package/
//! deploy/lab/layer.sh   ours, over Debian       ->  <target>/lab-hosts/   every time
//! bellwether-lab        machines, networks, cluster, scenarios
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cluster::build_guest;
use crate::command::{Profile, cargo, root, run};
use crate::{package, setup};

const HELP: &str = "\
A cluster of real hosts on this machine: each host is a QEMU machine with Debian's kernel and KVM,
all under software emulation, so that this machine needs neither /dev/kvm nor root.

Usage: cargo xtask lab [--profile PROFILE] <command> [options]

Commands:
  up         Boot hosts, make a cluster of them, and take commands
             [--nodes N]  hosts beside the storage host, 1 to 5; 3 if nothing is said
             [--keep]     leave it running in the background
  run        Run scenarios: `run power-loss freeze-and-thaw`, `run FILE`, `run --standard`, `run --all`
             [--json]     print what was measured
             [--times N]  run each of them so often
  scenarios  Name the scenarios
  image      Only make what the hosts boot from

With a lab that is up (another terminal, or `up --keep`):
  list       Hosts, power, cables
  ssh NODE [COMMAND]  Run a command in a host, or open a root shell there
  console NODE        Watch a host's serial console; Ctrl-] leaves it
  do STEP    Do a step of a scenario: `do power off node2`
  down       End it. Nothing of it is left

Options, before the command:
  --profile PROFILE  How our programs are built: `lab` (the default), `release`, or `dev`, which takes
                     what `cargo xtask test` has built and is slow in the hosts

Example:
  cargo xtask lab up --keep
  cargo xtask lab ssh node1 bell node list
  cargo xtask lab run power-loss
  cargo xtask lab down

Needs about 3 GiB of memory, and packages that it installs if they are missing (qemu-system-x86,
mmdebstrap, busybox-static). The first time it downloads 150 MB of Debian packages; LAB_MIRROR names
another mirror. docs/lab.md explains steps and files.";

/// Directories in which the same bytes must be for an image to be the same.
const RECIPE: &str = "deploy/lab";
/// Commands that boot something.
const BOOTING: [&str; 3] = ["up", "run", "image"];

pub fn run_command(arguments: &[&str]) -> Result<()> {
    // The lab says itself what was wrong, and its exit status is this one's.
    match status_of(arguments)? {
        0 => Ok(()),
        code => std::process::exit(code),
    }
}

/// The scenarios of CI, with programs optimized as far as the build pays for itself: what the tests have
/// built misses its times in emulated hosts when the machine is slow. What fails is tried once more, on
/// new hosts: on a machine that does something else they miss their times now and then.
pub fn standard_set() -> Result<()> {
    let words = ["run", "--standard"];
    if status_of(&words)? == 0 {
        return Ok(());
    }
    eprintln!("the lab's scenarios once more, on new hosts");
    match status_of(&words)? {
        0 => Ok(()),
        code => {
            bail!("the lab's standard scenarios failed twice; the second time with status {code}")
        }
    }
}

/// Carries a command out; returns the exit status.
fn status_of(arguments: &[&str]) -> Result<i32> {
    let (profile, arguments) = match arguments {
        ["--profile", name, rest @ ..] => {
            let known = Profile::parse(name);
            (known.with_context(|| format!("there is no profile `{name}`\n\n{HELP}"))?, rest)
        }
        rest => (Profile::Lab, rest),
    };
    let command = match arguments.first() {
        None => bail!("which command?\n\n{HELP}"),
        Some(&"-h" | &"--help" | &"help") => {
            println!("{HELP}");
            return Ok(0);
        }
        Some(command) => *command,
    };
    let boots = BOOTING.contains(&command) && !arguments.iter().any(|word| is_help(word));
    let place = profile.directory().join("../lab-hosts");
    fs::create_dir_all(&place).with_context(|| format!("make {}", place.display()))?;
    let place = place.canonicalize()?;
    let mut lab = Command::new(profile.directory().join("bellwether-lab"));
    match boots {
        true => {
            setup::ensure_lab_packages()?;
            let image = ensure_image(&place)?;
            make_layer(&place, profile)?;
            if arguments == ["image"] {
                println!("{}", image.display());
                return Ok(0);
            }
            lab.env("BELLWETHER_LAB_IMAGE", image);
        }
        false => build_lab(profile)?,
    }
    let status = lab
        .args(arguments)
        .env("BELLWETHER_LAB_LAYER", place.join("layer.ext4"))
        .env("BELLWETHER_LAB_DIR", place.join("run"))
        .env("BELLWETHER_LAB_SCENARIOS", root().join("tests/lab/scenarios"))
        .status()
        .context("start bellwether-lab")?;
    Ok(status.code().unwrap_or(1))
}

fn is_help(word: &str) -> bool {
    matches!(word, "-h" | "--help")
}

/// The lab's own program, if it was not built together with everything else.
fn build_lab(profile: Profile) -> Result<()> {
    match profile.directory().join("bellwether-lab").is_file() && profile != Profile::Release {
        true => Ok(()),
        false => {
            let words = ["build", "--quiet", "--profile", profile.name(), "-p", "bellwether-lab"];
            run(&mut cargo(&words))
        }
    }
}

/// The part of a host that is Debian's; made anew when its recipe has changed.
fn ensure_image(place: &Path) -> Result<PathBuf> {
    let image = place.join(format!("image-{:016x}", recipe()?));
    if image.join("root.ext4").is_file() {
        return Ok(image);
    }
    let making = place.join("making");
    if making.exists() {
        fs::remove_dir_all(&making)?;
    }
    fs::create_dir_all(&making)?;
    run(Command::new(root().join(RECIPE).join("image.sh")).arg(&making))?;
    // All at once: what is there is complete.
    fs::rename(&making, &image).with_context(|| format!("make {}", image.display()))?;
    Ok(image)
}

/// A number that changes with the recipe of the image.
fn recipe() -> Result<u64> {
    let directory = root().join(RECIPE);
    let names: BTreeSet<&str> = ["image.sh", "init", "masked", "modules", "packages"].into();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for name in names {
        let file = directory.join(name);
        let bytes = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        for byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    Ok(hash)
}

/// Our packages, the test guest and the lab's own program for hosts, over Debian's.
fn make_layer(place: &Path, profile: Profile) -> Result<()> {
    let packages = package::make_for_lab(profile)?;
    build_lab(profile)?;
    build_guest()?;
    let guest = root().join("tests/guest/target/release/bellwether-guest");
    let agent = profile.directory().join("bellwether-lab-agent");
    run(Command::new(root().join(RECIPE).join("layer.sh")).args([place, &packages, &agent, &guest]))
}
