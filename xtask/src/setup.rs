//! What a machine needs: a C compiler and linker, Rust's own tools, and `/dev/kvm`.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::command::{cargo, is_installed, options, run as run_command};

const HELP: &str = "\
Install what is missing on this machine.

Usage: cargo xtask setup [--tools]

Installs, only where missing: a C compiler and linker (apt: gcc, libc6-dev), the compiler of ACPI tables
for tests (acpica-tools), and rustfmt and clippy (rustup). `cargo xtask demo`, `test` and `verify` do this themselves.

Options:
  --tools  Also build and install cargo-nextest (runs the tests in parallel) and cargo-deny
           (licences and advisories). This takes some minutes; without them `test` uses
           `cargo test`, and `verify` leaves the licences to CI.";

/// A program, and the Debian package that has it.
const PACKAGES: [(&str, &[&str]); 1] = [("cc", &["gcc", "libc6-dev"])];
/// What only tests need: the reference implementation's compiler of ACPI tables.
const TEST_PACKAGES: [(&str, &[&str]); 1] = [("iasl", &["acpica-tools"])];
/// What only the lab needs.
const LAB_PACKAGES: [(&str, &[&str]); 6] = [
    ("qemu-system-x86_64", &["qemu-system-x86"]),
    ("mmdebstrap", &["mmdebstrap"]),
    ("busybox", &["busybox-static"]),
    ("mke2fs", &["e2fsprogs"]),
    ("xz", &["xz-utils"]),
    ("setpriv", &["util-linux"]),
];
/// What only Linux guests need.
const LINUX_PACKAGES: [(&str, &[&str]); 5] = [
    ("qemu-system-x86_64", &["qemu-system-x86"]),
    ("busybox", &["busybox-static"]),
    ("lz4", &["lz4"]),
    ("strip", &["binutils"]),
    ("setpriv", &["util-linux"]),
];
const COMPONENTS: [(&str, &str); 2] = [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")];
const TOOLS: [&str; 2] = ["cargo-nextest", "cargo-deny"];

pub fn run(arguments: &[&str]) -> Result<()> {
    if !options(arguments, &["--tools"], HELP)? {
        return Ok(());
    }
    ensure_test_packages()?;
    ensure_components();
    if arguments.contains(&"--tools") {
        install_tools();
    }
    match check_kvm() {
        Ok(()) => println!("this machine is ready"),
        // A machine that only builds needs no KVM.
        Err(error) => println!("ready to build, but not to run VMs: {error:#}"),
    }
    Ok(())
}

/// Installs the packages that are missing.
pub fn ensure_packages() -> Result<()> {
    ensure(&PACKAGES)
}

/// The same for tests.
pub fn ensure_test_packages() -> Result<()> {
    ensure_packages()?;
    ensure(&TEST_PACKAGES)
}

/// The same for the lab, with what every build needs.
pub fn ensure_lab_packages() -> Result<()> {
    ensure_packages()?;
    ensure(&LAB_PACKAGES)
}

/// The same for Linux guests.
pub fn ensure_linux_packages() -> Result<()> {
    ensure_packages()?;
    ensure(&LINUX_PACKAGES)
}

fn ensure(packages: &[(&str, &[&str])]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .filter(|(program, _)| !is_installed(program))
        .flat_map(|(_, packages)| packages.iter().copied())
        .collect();
    match missing.is_empty() {
        true => Ok(()),
        false => apt_install(&missing),
    }
}

fn apt_install(packages: &[&str]) -> Result<()> {
    let wanted = packages.join(" ");
    if !is_installed("apt-get") {
        bail!("these packages are missing, and there is no apt-get to install them: {wanted}");
    }
    eprintln!("installing {wanted}");
    let by_hand = || format!("install them by hand: apt-get install {wanted}");
    run_command(&mut apt(&["update", "-q"])).with_context(by_hand)?;
    let mut words = vec!["install", "-q", "-y", "--no-install-recommends"];
    words.extend(packages);
    run_command(&mut apt(&words)).with_context(by_hand)
}

/// Only root may install; sudo must not stop to ask for a password.
fn apt(words: &[&str]) -> Command {
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout == b"0\n");
    let mut command = match is_root {
        true => Command::new("apt-get"),
        false => {
            let mut sudo = Command::new("sudo");
            sudo.args(["-n", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
            sudo
        }
    };
    command.args(words).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    command
}

/// Adds Rust's own tools. Without rustup a distribution's packages have to bring them, and the
/// command that needs one will say so.
pub fn ensure_components() {
    for (program, component) in COMPONENTS {
        if !is_installed(program) && is_installed("rustup") {
            let added = run_command(Command::new("rustup").args(["component", "add", component]));
            if let Err(error) = added {
                eprintln!("warning: {error:#}");
            }
        }
    }
}

fn install_tools() {
    for tool in TOOLS {
        if is_installed(tool) {
            continue;
        }
        if let Err(error) = run_command(&mut cargo(&["install", "--locked", tool])) {
            eprintln!("warning: {tool} could not be installed and is done without: {error:#}");
        }
    }
}

/// Fails, with what to do, on a machine that cannot run VMs.
pub fn check_kvm() -> Result<()> {
    let device = Path::new("/dev/kvm");
    let remedy = match device.exists() {
        false => {
            "This machine offers no KVM. On real hardware switch VT-x or AMD-V on in the firmware and \
             `modprobe kvm-intel` or `kvm-amd`; in a virtual machine switch nested virtualization on; \
             in a container pass --device /dev/kvm"
        }
        true => {
            "Add yourself to the group of the device (`usermod -aG kvm $USER`, then log in again), or be root"
        }
    };
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Ok(()),
        Err(error) => bail!("cannot use {}: {error}\n{remedy}", device.display()),
    }
}
