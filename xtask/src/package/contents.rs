//! What is in which package.
//!
//! | package | on which hosts |
//! |---|---|
//! | `bellwether-controller` | three or five hosts, or a witness: a host with a controller and without an agent |
//! | `bellwether-agent` | the hosts that run VMs |
//! | `bellwether-cli` | wherever an administrator sits |

/// Where a file of a package comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A program of the workspace.
    Program(&'static str),
    /// A file of the repository.
    File(&'static str),
    /// A script of the repository.
    Script(&'static str),
    /// The manual page of a program, of this section, with one line about it.
    Manual(&'static str, u8, &'static str),
    /// What a program prints.
    Output(&'static str, &'static [&'static str]),
}

/// One package.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    pub name: &'static str,
    /// Source and the absolute path at which it is installed.
    pub files: &'static [(Source, &'static str)],
    /// Directories that are there though they are empty.
    pub directories: &'static [&'static str],
}

pub const PACKAGES: [Package; 3] = [CONTROLLER, AGENT, CLI];

const CONTROLLER: Package = Package {
    name: "bellwether-controller",
    files: &[
        (Source::Program("bellwether-controller"), "/usr/bin/bellwether-controller"),
        (Source::Program("bellwether-power"), "/usr/bin/bellwether-power"),
        (
            Source::Manual("bellwether-power", 8, "tries the power switch of a host"),
            "/usr/share/man/man8/bellwether-power.8",
        ),
        (
            Source::Manual("bellwether-controller", 8, "one of the controllers of a cluster"),
            "/usr/share/man/man8/bellwether-controller.8",
        ),
        (
            Source::File("deploy/systemd/bellwether-controller.service"),
            "/usr/lib/systemd/system/bellwether-controller.service",
        ),
        (
            Source::File("deploy/sysusers/bellwether-controller.conf"),
            "/usr/lib/sysusers.d/bellwether-controller.conf",
        ),
        (Source::File("deploy/config/controller.toml"), "/etc/bellwether/controller.toml"),
        (Source::File("docs/install.md"), "/usr/share/doc/bellwether-controller/install.md"),
        (Source::File("docs/fencing.md"), "/usr/share/doc/bellwether-controller/fencing.md"),
        (
            Source::File("docs/failure-model.md"),
            "/usr/share/doc/bellwether-controller/failure-model.md",
        ),
    ],
    directories: &["/var/lib/bellwether"],
};

const AGENT: Package = Package {
    name: "bellwether-agent",
    files: &[
        (Source::Program("bellwether-agent"), "/usr/bin/bellwether-agent"),
        (Source::Program("bellwether-vmm"), "/usr/bin/bellwether-vmm"),
        (Source::Program("bellwether-fencer"), "/usr/bin/bellwether-fencer"),
        (
            Source::Manual("bellwether-agent", 8, "the agent of a node"),
            "/usr/share/man/man8/bellwether-agent.8",
        ),
        (
            Source::Manual("bellwether-vmm", 8, "runs one virtual machine under KVM"),
            "/usr/share/man/man8/bellwether-vmm.8",
        ),
        (
            Source::File("deploy/systemd/bellwether-agent.service"),
            "/usr/lib/systemd/system/bellwether-agent.service",
        ),
        (
            Source::Manual("bellwether-fencer", 8, "ends what runs on without a lease"),
            "/usr/share/man/man8/bellwether-fencer.8",
        ),
        (
            Source::File("deploy/systemd/bellwether-fencer.service"),
            "/usr/lib/systemd/system/bellwether-fencer.service",
        ),
        (Source::File("deploy/config/fencer.toml"), "/etc/bellwether/fencer.toml"),
        (Source::File("docs/fencing.md"), "/usr/share/doc/bellwether-agent/fencing.md"),
        (
            Source::File("deploy/systemd/bellwether-guests.service"),
            "/usr/lib/systemd/system/bellwether-guests.service",
        ),
        (Source::Script("deploy/systemd/stop-guests"), "/usr/lib/bellwether/stop-guests"),
        (Source::File("deploy/config/agent.toml"), "/etc/bellwether/agent.toml"),
        (Source::File("docs/install.md"), "/usr/share/doc/bellwether-agent/install.md"),
        (Source::File("docs/failure-model.md"), "/usr/share/doc/bellwether-agent/failure-model.md"),
    ],
    directories: &["/var/lib/bellwether"],
};

const CLI: Package = Package {
    name: "bellwether-cli",
    files: &[
        (Source::Program("bell"), "/usr/bin/bell"),
        (
            Source::Manual("bell", 1, "administers a Bellwether cluster"),
            "/usr/share/man/man1/bell.1",
        ),
        (
            Source::Output("bell", &["completions", "bash"]),
            "/usr/share/bash-completion/completions/bell",
        ),
        (
            Source::Output("bell", &["completions", "zsh"]),
            "/usr/share/zsh/vendor-completions/_bell",
        ),
        (
            Source::Output("bell", &["completions", "fish"]),
            "/usr/share/fish/vendor_completions.d/bell.fish",
        ),
        (Source::File("docs/install.md"), "/usr/share/doc/bellwether-cli/install.md"),
        (Source::File("cli/README.md"), "/usr/share/doc/bellwether-cli/bell.md"),
    ],
    directories: &[],
};

impl Package {
    /// The programs in it. Each has the name of its crate.
    pub fn programs(&self) -> impl Iterator<Item = &'static str> {
        self.files.iter().filter_map(|(source, _)| match source {
            Source::Program(name) => Some(*name),
            _ => None,
        })
    }

    /// The files that the administrator may change: an upgrade keeps the changes.
    pub fn settings(&self) -> impl Iterator<Item = &'static str> {
        self.files.iter().map(|(_, at)| *at).filter(|at| at.starts_with("/etc/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::root;
    use std::collections::BTreeSet;

    #[test]
    fn every_file_is_there_and_has_one_place() {
        for package in PACKAGES {
            let places: BTreeSet<_> = package.files.iter().map(|(_, at)| at).collect();
            assert_eq!(places.len(), package.files.len(), "{}", package.name);
            for (source, at) in package.files {
                assert!(at.starts_with('/') && !at.ends_with('/'), "{at}");
                if let Source::File(path) | Source::Script(path) = source {
                    assert!(root().join(path).is_file(), "{path} of {}", package.name);
                }
            }
            let control = root().join("deploy/debian").join(package.name).join("control");
            assert!(control.is_file(), "{}", control.display());
        }
    }

    /// Two packages are installed on one host: no file may be in both.
    #[test]
    fn packages_do_not_overlap() {
        let places: Vec<_> = PACKAGES.iter().flat_map(|p| p.files).map(|(_, at)| at).collect();
        assert_eq!(places.iter().collect::<BTreeSet<_>>().len(), places.len());
    }

    /// What a unit starts is in the same package, so that none is installed without its program.
    #[test]
    fn units_start_what_their_package_has() {
        for package in PACKAGES {
            let units = package.files.iter().filter_map(|(source, at)| match source {
                Source::File(path) if at.ends_with(".service") => Some(path),
                _ => None,
            });
            for unit in units {
                let text = std::fs::read_to_string(root().join(unit)).unwrap();
                let commands = text.lines().filter_map(|line| line.strip_prefix("Exec"));
                let programs =
                    commands.filter_map(|line| line.split_once('=')?.1.split(' ').next());
                for program in programs.filter(|program| !program.starts_with("/bin/")) {
                    let has = package.files.iter().any(|(_, at)| *at == program);
                    assert!(has, "{unit} starts {program}, which {} lacks", package.name);
                }
            }
        }
    }
}
