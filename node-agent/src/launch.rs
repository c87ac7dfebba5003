//! Starting a VMM so that it outlives its agent.
//!
//! The VMM gets a session of its own, so that no signal to the agent's session or terminal reaches
//! it. `setsid` has to be called in the new process, which safe Rust cannot do between fork and
//! exec; therefore the agent's own executable is started with a hidden subcommand, which calls it
//! and then becomes the VMM under the same process number.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::runtime_dir::Home;

/// The hidden subcommand.
pub const SHIM: &str = "exec-vmm";
/// A log that has grown beyond this is cut back.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// Which executables make a VMM.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// An agent's executable, for the shim.
    pub shim: PathBuf,
    pub vmm: PathBuf,
}

impl Launcher {
    /// The running agent's own executable serves as the shim, even after an upgrade replaced its
    /// file: the link leads to what is running.
    pub fn new(vmm: PathBuf) -> Self {
        Self { shim: "/proc/self/exe".into(), vmm }
    }

    /// Starts an empty VMM in its directory, and gives its process number.
    #[allow(clippy::zombie_processes, reason = "the owner of the VM reaps it through its pidfd")]
    pub fn spawn(&self, home: &Home) -> io::Result<u32> {
        let log = open_log(&home.log())?;
        let child = Command::new(&self.shim)
            .arg(SHIM)
            .arg("--")
            .arg(&self.vmm)
            .arg("serve")
            .arg("--api-socket")
            .arg(home.socket())
            .arg("--exit-file")
            .arg(home.exit_file())
            .current_dir(home.dir())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(child.id())
    }
}

/// Becomes the VMM; answers only if that fails.
pub fn become_vmm(command: &[OsString]) -> io::Error {
    let Some((program, arguments)) = command.split_first() else {
        return io::Error::new(io::ErrorKind::InvalidInput, "no command was given");
    };
    if let Err(error) = rustix::process::setsid() {
        return error.into();
    }
    Command::new(program).args(arguments).exec()
}

/// Appending matters: a log that was cut back goes on at its new end.
fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Keeps the log bounded: the newest part moves to `vmm.log.1`, and the file starts again. A line
/// that is written in between is lost, which a log may do.
pub fn bound_log(home: &Home) -> io::Result<()> {
    let path = home.log();
    if std::fs::metadata(&path)?.len() <= LOG_BYTES_MAX {
        return Ok(());
    }
    std::fs::copy(&path, path.with_extension("log.1"))?;
    OpenOptions::new().write(true).open(&path)?.set_len(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::runtime_dir::RuntimeDir;
    use bellwether_types::{Epoch, VmId};

    #[test]
    fn a_log_is_bounded_while_it_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::open(dir.path()).unwrap();
        let home = runtime.home(VmId::from_uuid(uuid::Uuid::from_u128(1)), Epoch(1));
        home.create().unwrap();
        let mut log = open_log(&home.log()).unwrap();
        log.write_all(&vec![b'x'; 1 << 21]).unwrap();
        bound_log(&home).unwrap();
        log.write_all(b"after").unwrap();
        assert_eq!(std::fs::read(home.log()).unwrap(), b"after");
    }
}
