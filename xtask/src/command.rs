//! Running other programs, and reading this one's options.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The workspace's directory.
pub fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// The cargo that runs this.
pub fn cargo(arguments: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.args(arguments).current_dir(root());
    // It is about xtask itself, and would make cargo in another directory build into the wrong place.
    command.env_remove("CARGO_MANIFEST_DIR");
    command
}

/// The same in the test guest's own workspace.
pub fn guest_cargo(arguments: &[&str]) -> Command {
    let mut command = cargo(arguments);
    command.current_dir(root().join("tests/guest"));
    // The place of the guest is part of the harness' knowledge; one target directory for all would move it.
    command.env_remove("CARGO_TARGET_DIR");
    command
}

/// Where programs are built.
pub fn target_dir(debug: bool) -> PathBuf {
    let profile = if debug { Profile::Dev } else { Profile::Release };
    profile.directory()
}

/// How programs are built.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    Release,
    Dev,
    /// Quicker to make than a release, quicker to run than a debug build.
    Lab,
}

impl Profile {
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Release, Self::Dev, Self::Lab].into_iter().find(|it| it.name() == name)
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dev => "dev",
            Self::Lab => "lab",
        }
    }

    /// Where cargo leaves the programs.
    pub fn directory(self) -> PathBuf {
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into);
        target.join(if self == Self::Dev { "debug" } else { self.name() })
    }
}

/// Runs a program that has to succeed, and says which it is.
pub fn run(command: &mut Command) -> Result<()> {
    let line = describe(command);
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("start `{line}`"))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => bail!("`{line}` ended with {code}"),
        None => bail!("`{line}` was killed"),
    }
}

/// The output of a program that has to succeed.
pub fn output(command: &mut Command) -> Result<String> {
    let line = describe(command);
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("start `{line}`"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => bail!("`{line}` failed"),
    }
}

fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program()).to_string_lossy();
    let words = command.get_args().map(|word| word.to_string_lossy());
    std::iter::once(name).chain(words).collect::<Vec<_>>().join(" ")
}

/// Whether a program is in PATH.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cargo_bin = std::env::var_os("CARGO_HOME").map(|home| PathBuf::from(home).join("bin"));
    std::env::split_paths(&path).chain(cargo_bin).any(|dir| dir.join(program).is_file())
}

/// Shows the help if it is asked for, and refuses options that are not known.
pub fn options(arguments: &[&str], known: &[&str], help: &str) -> Result<bool> {
    if arguments.iter().any(|argument| matches!(*argument, "-h" | "--help")) {
        println!("{help}");
        return Ok(false);
    }
    match arguments.iter().find(|argument| !known.contains(argument)) {
        None => Ok(true),
        Some(unknown) => bail!("unknown option `{unknown}`\n\n{help}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_are_not_known_are_refused() {
        assert!(options(&["--json"], &["--json"], "help").unwrap());
        let refused = options(&["--jsn"], &["--json"], "the help").unwrap_err().to_string();
        assert!(refused.contains("--jsn") && refused.contains("the help"));
        assert!(!options(&["--nonsense", "--help"], &[], "help").unwrap());
    }

    #[test]
    fn a_failing_program_is_named() {
        let failed = run(&mut Command::new("false")).unwrap_err().to_string();
        assert!(failed.contains("`false` ended with 1"), "{failed}");
    }
}
