//! Which packages of the distribution the programs need, read from the programs themselves.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command::output;

/// The shared libraries that a program may need, and the packages that have them.
const LIBRARIES: [(&str, &str); 4] = [
    ("libc.so.6", "libc6"),
    ("libm.so.6", "libc6"),
    ("ld-linux-x86-64.so.2", "libc6"),
    ("libgcc_s.so.1", "libgcc-s1"),
];

/// The dependencies of these programs, as a control file has them.
pub fn dependencies<'a>(programs: impl Iterator<Item = &'a Path>) -> Result<String> {
    let mut packages = BTreeSet::new();
    let mut glibc = (0, 0);
    for program in programs {
        let text = readelf(program)?;
        for library in needed(&text) {
            match LIBRARIES.iter().find(|(name, _)| *name == library) {
                Some((_, package)) => packages.insert(*package),
                None => bail!(
                    "{} needs {library}, and no package is known for it: add it to {}",
                    program.display(),
                    file!()
                ),
            };
        }
        glibc = glibc.max(glibc_version(&text));
    }
    let with_version = |package: &&str| match *package {
        "libc6" => format!("libc6 (>= {}.{})", glibc.0, glibc.1),
        other => other.to_owned(),
    };
    Ok(packages.iter().map(with_version).collect::<Vec<_>>().join(", "))
}

fn readelf(program: &Path) -> Result<String> {
    output(
        Command::new("readelf")
            .args(["--wide", "--dynamic", "--version-info"])
            .arg(program)
            .env("LC_ALL", "C"),
    )
}

/// The libraries that a program names.
fn needed(readelf: &str) -> impl Iterator<Item = &str> {
    let lines = readelf.lines().filter(|line| line.contains("(NEEDED)"));
    lines.filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0))
}

/// The highest version of the C library of which a symbol is used.
fn glibc_version(readelf: &str) -> (u32, u32) {
    let versions = readelf.split("GLIBC_").skip(1).filter_map(|rest| {
        let end = rest.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(rest.len());
        let mut numbers = rest[..end].split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    });
    versions.max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_version_counts_as_a_number() {
        let text = " 0x0 (NEEDED)  Shared library: [libc.so.6]\n Name: GLIBC_2.9  Flags: none\n \
                    Name: GLIBC_2.34\n Name: GLIBC_2.2.5 ";
        assert_eq!(glibc_version(text), (2, 34));
        assert_eq!(needed(text).collect::<Vec<_>>(), ["libc.so.6"]);
    }

    #[test]
    fn a_real_program_needs_the_c_library() {
        let own = std::env::current_exe().unwrap();
        let dependencies = dependencies(std::iter::once(own.as_path())).unwrap();
        assert!(dependencies.contains("libc6 (>= 2."), "{dependencies}");
    }
}
