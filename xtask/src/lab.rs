//! `cargo xtask lab`: makes what the lab's hosts boot from, and starts the lab.
//!
//! ```text
//! deploy/lab/image.sh   Debian's packages       ->  <target>/lab/<recipe>/   kept until the recipe changes
//! cargo xtask package   our programs            ->  <target>/package/
//! deploy/lab/layer.sh   ours, over Debian       ->  <target>/lab/layer.ext4  every time
//! bellwether-lab        machines, networks, cluster, scenarios
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cluster::build_guest;
use crate::command::{cargo, root, run, target_dir};
use crate::{package, setup};

const HELP: &str = "\
A cluster of real hosts on this machine: each host is a QEMU machine with Debian's kernel and KVM,
all under software emulation, so that this machine needs neither /dev/kvm nor root.

Usage: cargo xtask lab <command> [options]

Commands:
  up         Boot three hosts and a storage host, make a cluster, and take commands
  run        Run scenarios: `run power-loss freeze-and-thaw`, `run FILE`, `run --standard [--json]`
  scenarios  Name the standard scenarios
  image      Only make what the hosts boot from

Options, before the command:
  --debug    Pack the debug build of our programs: quicker to make, much slower in the hosts

Needs about 3 GiB of memory, and packages that it installs if they are missing (qemu-system-x86,
mmdebstrap, busybox-static). The first time it downloads 150 MB of Debian packages; LAB_MIRROR names
another mirror. docs/lab.md explains steps and files.";

/// Directories in which the same bytes must be for an image to be the same.
const RECIPE: &str = "deploy/lab";

pub fn run_command(arguments: &[&str]) -> Result<()> {
    let debug = arguments.first() == Some(&"--debug");
    let arguments = if debug { &arguments[1..] } else { arguments };
    match arguments.first() {
        None => bail!("which command?\n\n{HELP}"),
        Some(&"-h" | &"--help" | &"help") => {
            println!("{HELP}");
            return Ok(());
        }
        Some(_) => {}
    }
    setup::ensure_lab_packages()?;
    let target = target_dir(debug).join("..");
    let place = target.join("lab");
    fs::create_dir_all(&place).with_context(|| format!("make {}", place.display()))?;
    let place = place.canonicalize()?;
    let image = ensure_image(&place)?;
    let program = build(debug)?;
    make_layer(&place, &target.join("package"), &program)?;
    if arguments == ["image"] {
        println!("{}", image.display());
        return Ok(());
    }
    let scenarios = root().join("tests/lab/scenarios");
    run(Command::new(&program)
        .args(arguments)
        .env("BELLWETHER_LAB_IMAGE", &image)
        .env("BELLWETHER_LAB_LAYER", place.join("layer.ext4"))
        .env("BELLWETHER_LAB_DIR", place.join("run"))
        .env("BELLWETHER_LAB_SCENARIOS", scenarios))
}

/// The packages, the test guest and the lab itself. Returns the lab's program.
fn build(debug: bool) -> Result<PathBuf> {
    let (options, words): (&[&str], &[&str]) = match debug {
        true => (&["--debug"], &["build", "-p", "bellwether-lab"]),
        false => (&[], &["build", "--release", "-p", "bellwether-lab"]),
    };
    package::run_command(options)?;
    run(&mut cargo(words))?;
    build_guest()?;
    Ok(target_dir(debug).join("bellwether-lab"))
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

fn make_layer(place: &Path, packages: &Path, program: &Path) -> Result<()> {
    let guest = root().join("tests/guest/target/release/bellwether-guest");
    let agent = program.with_file_name("bellwether-lab-agent");
    let script = root().join(RECIPE).join("layer.sh");
    run(Command::new(script).args([place, packages, &agent, &guest]))
}
