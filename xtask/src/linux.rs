//! `cargo xtask linux-guest`: Debian's kernel under our VMM, on a host with a standard KVM.
//!
//! ```text
//! tests/linux/image.sh   Debian's kernel, busybox, our VMM   ->  <target>/linux/{vmlinuz,initrd}
//! QEMU                   that host, AMD-V emulated           ->  <target>/linux/console.log
//! tests/linux/jobs       what it does, one word each; each job that begins must pass
//! ```

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::{cargo, root, run, target_dir};
use crate::setup;

const HELP: &str = "\
Boot Debian's kernel under bellwether-vmm, on a host with a standard KVM: a QEMU machine with
emulated AMD-V, so that this machine needs no KVM. Each job is one thing that guests do there.

Usage: cargo xtask linux-guest [--release] [JOB…]

Jobs (all of them, if none is given):
  boot-1, boot-4   bzImage and initrd, 1 or 4 vCPUs: finds its machine, switches off by ACPI
  boot-pvh         the same with the unpacked vmlinux, through its PVH entry, 2 vCPUs
  reboot           the guest resets the machine
  power-button     the guest hears the power button and shuts down
  restore-1        a guest that checks its memory, registers and clocks is saved and restored, then
  restore-4        once more with pre-copy; 1 or 4 vCPUs
  disk             a guest that works on its disk without a pause is moved twice in the middle of it
  net              two guests on a bridge and a stream between them, while one and then the other moves
  no-bridge        a network card without its bridge is refused

Options:
  --release  With the release build of the VMM: longer to build, quicker in the host

It takes some minutes, needs 1.5 GiB of memory, and installs packages that are missing
(qemu-system-x86, busybox-static, lz4). The first time it downloads 30 MB from the Debian archive. All that was
printed is in <target>/linux/console.log.";

const JOBS: [&str; 10] = [
    "boot-1",
    "boot-4",
    "boot-pvh",
    "reboot",
    "power-button",
    "restore-1",
    "restore-4",
    "disk",
    "net",
    "no-bridge",
];
/// Emulation on a busy machine is slow; this only ends what hangs.
const LONGEST_PER_JOB: Duration = Duration::from_secs(1200);

pub fn run_command(arguments: &[&str]) -> Result<()> {
    if arguments.iter().any(|argument| matches!(*argument, "-h" | "--help" | "help")) {
        println!("{HELP}");
        return Ok(());
    }
    let (options, jobs): (Vec<&str>, Vec<&str>) =
        arguments.iter().partition(|argument| argument.starts_with('-'));
    let release = match options[..] {
        [] => false,
        ["--release"] => true,
        _ => bail!("unknown options `{}`\n\n{HELP}", options.join(" ")),
    };
    if let Some(unknown) = jobs.iter().find(|job| !JOBS.contains(job)) {
        bail!("there is no job `{unknown}`\n\n{HELP}");
    }
    let jobs = if jobs.is_empty() { JOBS.to_vec() } else { jobs };
    setup::ensure_linux_packages()?;
    let place = target_dir(true).join("../linux");
    fs::create_dir_all(&place).with_context(|| format!("make {}", place.display()))?;
    let place = place.canonicalize()?;
    make_image(&place, release)?;
    let console = place.join("console.log");
    boot_host(&place, &console, &jobs)?;
    judge(&fs::read_to_string(&console).unwrap_or_default(), &jobs, &console)
}

fn make_image(place: &Path, release: bool) -> Result<()> {
    let profile: &[&str] = if release { &["--release"] } else { &[] };
    run(&mut cargo(&[&["build", "-p", "bellwether-vmm"][..], profile].concat()))?;
    // It runs where there is no C library.
    let package = ["rustc", "--release", "-p", "bellwether-linux-check", "--bin", "check"];
    run(&mut cargo(&[&package[..], &["--", "-C", "target-feature=+crt-static"]].concat()))?;
    let vmm = target_dir(!release).join("bellwether-vmm");
    let check = target_dir(false).join("check");
    run(Command::new(root().join("tests/linux/image.sh")).args([place, &vmm, &check]))
}

/// Runs the host until it switches itself off.
fn boot_host(place: &Path, console: &Path, jobs: &[&str]) -> Result<()> {
    let file = |name: &str| place.join(name).display().to_string();
    let line = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check longest={} jobs={}",
        LONGEST_PER_JOB.as_secs(),
        jobs.join(",")
    );
    File::create(console).with_context(|| format!("make {}", console.display()))?;
    // A job that hangs is ended in the host, where its logs are; this is for a host that hangs.
    let longest = LONGEST_PER_JOB * (jobs.len() as u32 + 1);
    eprintln!("host: {} jobs; its console is {}", jobs.len(), console.display());
    // Ctrl-C reaches it as well, and it ends at the latest when the longest time is over.
    let mut command = Command::new("timeout");
    command
        .args(["--foreground", "--signal=KILL", &longest.as_secs().to_string()])
        .args(["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"])
        // The emulated AMD-V does not intercept XSETBV, so guests would lose what they enable by it.
        .args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,+svm,+npt,-xsave"])
        .args(["-machine", "q35,usb=off,vmport=off", "-m", "1280", "-smp", "2"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-device", "virtio-rng-pci"])
        // A comma in a name ends it, unless it is doubled.
        .args(["-serial", &format!("file:{}", console.display().to_string().replace(',', ",,"))])
        .args(["-kernel", &file("vmlinuz"), "-initrd", &file("initrd"), "-append", &line])
        .stdin(Stdio::null());
    run(&mut command)
}

/// Every job must have said that it passed.
fn judge(text: &str, jobs: &[&str], console: &Path) -> Result<()> {
    let outcomes = text.lines().filter(|line| line.starts_with("JOB ")).map(str::trim_end);
    outcomes.clone().filter(|line| !line.ends_with("begins")).for_each(|line| println!("{line}"));
    let passed = |job: &&&str| {
        let words = format!("JOB {job} passed ");
        outcomes.clone().any(|line| line.starts_with(&words))
    };
    let failed: Vec<&str> = jobs.iter().filter(|job| !passed(job)).copied().collect();
    match failed.is_empty() {
        true => Ok(()),
        false => {
            bail!("failed: {}; what was printed is in {}", failed.join(", "), console.display())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn a_job_that_says_nothing_has_failed() {
        let console = PathBuf::from("/c");
        let text =
            "JOB boot-1 begins\r\nJOB boot-1 passed after 7 s\r\nJOB reboot FAILED after 3 s\n";
        assert!(judge(text, &["boot-1"], &console).is_ok());
        let failed = judge(text, &["boot-1", "boot-4", "reboot"], &console).unwrap_err();
        assert!(failed.to_string().starts_with("failed: boot-4, reboot;"), "{failed}");
    }

    #[test]
    fn every_job_of_the_help_exists() {
        let jobs = fs::read_to_string(root().join("tests/linux/jobs")).unwrap();
        for job in JOBS {
            assert!(HELP.contains(job), "{job}");
            assert!(jobs.contains(&format!("job_{}()", job.replace('-', "_"))), "{job}");
        }
    }
}
