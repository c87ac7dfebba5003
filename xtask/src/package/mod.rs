//! `cargo xtask package`: what users install.
//!
//! ```text
//! contents   which file is in which package       libraries  what the programs need
//! manual     manual pages from --help             deb        a tree becomes a package
//! ```
//!
//! Control files and maintainer scripts are in `deploy/debian/`, units in `deploy/systemd/`.

mod contents;
mod deb;
mod libraries;
mod manual;
mod trial;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{Profile, cargo, is_installed, options, output, root, run};
use contents::{PACKAGES, Package, Source};
use deb::Tree;

const HELP: &str = "\
Make the Debian packages that users install.

Usage: cargo xtask package [--debug] [--check] [--json]

Builds the programs and packs them, without root, into target/package/: bellwether-controller,
bellwether-agent (with VMM and fencer) and bellwether-cli (bell). docs/install.md says what to do with them.
The same commit, toolchain and directory give the same bytes; SOURCE_DATE_EPOCH sets the time that
is used instead of the commit's.

Options:
  --debug  Pack the debug build, which is quicker to make and has failpoints: for the lab
  --check  Install the packages into a scratch directory, and verify the units; lintian if it is there
  --json   Print the paths of the packages as one JSON object on standard output";

const MAINTAINER: &str = "The Bellwether authors <maintainers@bellwether.invalid>";
const ARCHITECTURE: &str = "amd64";
/// The programs that this calls, and the package that has them.
const TOOLS: [(&str, &str); 4] =
    [("dpkg-deb", "dpkg"), ("strip", "binutils"), ("readelf", "binutils"), ("gzip", "gzip")];

/// What is the same for all packages of one run.
struct Release {
    version: String,
    /// Seconds since 1970.
    epoch: String,
    /// What dpkg-deb is told: what is not a release is made to be used at once.
    compression: &'static [&'static str],
    /// Where cargo left the programs.
    programs: PathBuf,
    /// Where trees and packages are made.
    place: PathBuf,
}

pub fn run_command(arguments: &[&str]) -> Result<()> {
    if !options(arguments, &["--debug", "--check", "--json"], HELP)? {
        return Ok(());
    }
    let debug = arguments.contains(&"--debug");
    let (release, packages) = make(if debug { Profile::Dev } else { Profile::Release })?;
    if arguments.contains(&"--check") {
        trial::check(&packages, &release.place.join("trial"))?;
    }
    report(&packages, &release.version, arguments.contains(&"--json"));
    Ok(())
}

/// The packages for the lab, and where they are.
pub fn make_for_lab(profile: Profile) -> Result<PathBuf> {
    Ok(make(profile)?.0.place)
}

fn make(profile: Profile) -> Result<(Release, Vec<PathBuf>)> {
    if let Some((program, package)) = TOOLS.iter().find(|(program, _)| !is_installed(program)) {
        bail!("`{program}` is missing; apt-get install {package}");
    }
    build(profile)?;
    let release = Release::read(profile)?;
    let packages = PACKAGES.iter().map(|package| release.pack(package)).collect::<Result<_>>()?;
    Ok((release, packages))
}

fn report(packages: &[PathBuf], version: &str, json: bool) {
    let paths: Vec<String> = packages.iter().map(|path| path.display().to_string()).collect();
    match json {
        true => println!("{}", serde_json::json!({ "version": version, "packages": paths })),
        false => paths.iter().for_each(|path| println!("{path}")),
    }
}

fn build(profile: Profile) -> Result<()> {
    let mut words = vec!["build", "--locked", "--profile", profile.name(), "--bins"];
    if profile == Profile::Dev {
        // As `cargo xtask test` builds them.
        words.extend(["--workspace", "--tests", "--examples"]);
    } else {
        words.extend(PACKAGES.iter().flat_map(Package::programs).flat_map(|name| ["-p", name]));
    }
    // Whatever is built together asks for the same features of its dependencies: built apart, they
    // would be compiled twice.
    if profile == Profile::Lab {
        words.extend(["-p", "bellwether-lab"]);
    }
    run(&mut cargo(&words))
}

impl Release {
    fn read(profile: Profile) -> Result<Self> {
        let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(epoch) => epoch,
            Err(_) => git(&["log", "-1", "--format=%ct"])
                .context("set SOURCE_DATE_EPOCH where there is no git repository")?,
        };
        let programs = profile.directory();
        let place = programs.join(match profile {
            Profile::Lab => "package",
            Profile::Release | Profile::Dev => "../package",
        });
        fs::create_dir_all(&place).with_context(|| format!("make {}", place.display()))?;
        let place = place.canonicalize()?;
        let compression: &[&str] = match profile {
            Profile::Release => &["-Zxz"],
            Profile::Dev | Profile::Lab => &["-Zgzip", "-z1"],
        };
        Ok(Self { version: version(&epoch)?, epoch, compression, programs, place })
    }

    fn pack(&self, package: &Package) -> Result<PathBuf> {
        let tree = Tree::new(self.place.join("tree").join(package.name))?;
        for (source, at) in package.files {
            self.place_file(&tree, *source, at)
                .with_context(|| format!("{at} of {}", package.name))?;
        }
        for directory in package.directories {
            tree.directory(directory)?;
        }
        self.add_documents(&tree, package)?;
        self.add_control(&tree, package)?;
        self.remove_older(package)?;
        let name = format!("{}_{}_{ARCHITECTURE}.deb", package.name, self.version);
        let deb = self.place.join(name);
        tree.pack(&deb, &self.epoch, self.compression)?;
        Ok(deb)
    }

    fn place_file(&self, tree: &Tree, source: Source, at: &str) -> Result<()> {
        match source {
            Source::File(path) => tree.file(at, &fs::read(root().join(path))?, 0o644),
            Source::Script(path) => tree.file(at, &fs::read(root().join(path))?, 0o755),
            Source::Program(name) => {
                tree.file(at, &fs::read(self.programs.join(name))?, 0o755)?;
                run(Command::new("strip").arg("--strip-unneeded").arg(tree.path(at)))
            }
            Source::Output(name, words) => {
                let text = output(Command::new(self.programs.join(name)).args(words))?;
                tree.file(at, text.as_bytes(), 0o644)
            }
            Source::Manual(name, section, about) => {
                let date = self.date("+%Y-%m-%d")?;
                let program = self.programs.join(name);
                let version = &self.version;
                let page =
                    manual::Page { program: &program, name, section, about, version, date: &date };
                tree.file(at, manual::page(&page)?.as_bytes(), 0o644)?;
                compress(tree, at)
            }
        }
    }

    /// What every package has to have below /usr/share/doc.
    fn add_documents(&self, tree: &Tree, package: &Package) -> Result<()> {
        let directory = format!("/usr/share/doc/{}", package.name);
        let copyright = fs::read(root().join("deploy/debian/copyright"))?;
        tree.file(&format!("{directory}/copyright"), &copyright, 0o644)?;
        let changelog = format!(
            "bellwether ({}) unstable; urgency=medium\n\n  * See CHANGELOG.md of the source.\n\n \
             -- {MAINTAINER}  {}\n",
            self.version,
            self.date("-R")?
        );
        let at = format!("{directory}/changelog.gz");
        let plain = at.trim_end_matches(".gz");
        tree.file(plain, changelog.as_bytes(), 0o644)?;
        compress(tree, plain)
    }

    fn add_control(&self, tree: &Tree, package: &Package) -> Result<()> {
        let directory = root().join("deploy/debian").join(package.name);
        let template = fs::read_to_string(directory.join("control"))?;
        let programs: Vec<PathBuf> =
            package.programs().map(|name| self.programs.join(name)).collect();
        let libraries = libraries::dependencies(programs.iter().map(PathBuf::as_path))?;
        let control = self.control(&template, &libraries, tree.kib()?);
        tree.file("/DEBIAN/control", control.as_bytes(), 0o644)?;
        for script in ["postinst", "prerm", "postrm"] {
            if let Ok(text) = fs::read(directory.join(script)) {
                tree.file(&format!("/DEBIAN/{script}"), &text, 0o755)?;
            }
        }
        let settings: String = package.settings().map(|at| format!("{at}\n")).collect();
        match settings.is_empty() {
            true => Ok(()),
            false => tree.file("/DEBIAN/conffiles", settings.as_bytes(), 0o644),
        }
    }

    /// The control file: the template, and what only the build knows behind its first line.
    fn control(&self, template: &str, libraries: &str, kib: u64) -> String {
        let (first, rest) = template.split_once('\n').unwrap_or((template, ""));
        format!(
            "{first}\nSource: bellwether\nVersion: {}\nArchitecture: {ARCHITECTURE}\n\
             Maintainer: {MAINTAINER}\nInstalled-Size: {kib}\nSection: admin\nPriority: optional\n{}",
            self.version,
            rest.replace("${shlibs}", libraries)
        )
    }

    /// Whoever takes `bellwether-agent_*.deb` shall find one.
    fn remove_older(&self, package: &Package) -> Result<()> {
        let prefix = format!("{}_", package.name);
        for entry in fs::read_dir(&self.place)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn date(&self, format: &str) -> Result<String> {
        let at = format!("--date=@{}", self.epoch);
        let text = output(Command::new("date").args(["--utc", &at, format]).env("LC_ALL", "C"))?;
        Ok(text.trim().to_owned())
    }
}

/// The workspace's version; between releases with date and commit, so that each build is newer than
/// the last and older than the release that it leads to.
fn version(epoch: &str) -> Result<String> {
    let base = env!("CARGO_PKG_VERSION");
    if git(&["tag", "--points-at", "HEAD"]).is_ok_and(|tags| tags.contains(&format!("v{base}"))) {
        return Ok(base.to_owned());
    }
    let at = format!("--date=@{epoch}");
    let day = output(Command::new("date").args(["--utc", &at, "+%Y%m%d.%H%M%S"]))?;
    let commit = git(&["rev-parse", "--short=8", "HEAD"]).unwrap_or_else(|_| "unknown".to_owned());
    Ok(format!("{base}~{}.{commit}", day.trim()))
}

fn git(words: &[&str]) -> Result<String> {
    Ok(output(Command::new("git").args(words).current_dir(root()))?.trim().to_owned())
}

fn compress(tree: &Tree, at: &str) -> Result<()> {
    run(Command::new("gzip").args(["-9", "--no-name", "--force"]).arg(tree.path(at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_file_says_what_only_the_build_knows() {
        let release = Release {
            version: "1.2~3".into(),
            epoch: "0".into(),
            compression: &[],
            programs: PathBuf::new(),
            place: PathBuf::new(),
        };
        for package in PACKAGES {
            let path = root().join("deploy/debian").join(package.name).join("control");
            let control = release.control(&fs::read_to_string(path).unwrap(), "libc6 (>= 2.34)", 7);
            let first = format!("Package: {}\nSource: bellwether\nVersion: 1.2~3\n", package.name);
            assert!(control.starts_with(&first), "{control}");
            assert!(control.contains("Depends: libc6 (>= 2.34)"), "{control}");
            assert!(!control.contains("${"), "{control}");
        }
    }
}
