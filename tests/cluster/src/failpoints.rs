//! The test's side of dynamic failpoints (`BELLWETHER_FAILPOINTS=dir:PATH`): any point of any
//! process of the cluster can be armed and let go while it runs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::wait::wait_for;

/// The directory that all processes of a cluster look into at each point.
#[derive(Clone, Debug)]
pub struct Failpoints {
    dir: PathBuf,
}

impl Failpoints {
    pub fn create(dir: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self { dir })
    }

    pub fn variable(&self) -> String {
        format!("dir:{}", self.dir.display())
    }

    /// Whoever comes to the point waits there.
    pub fn hold(&self, point: &str) -> Result<Hold> {
        let hold = Hold { dir: self.dir.clone(), point: point.to_owned() };
        hold.forget_reached()?;
        write(&hold.file("hold"), "")?;
        Ok(hold)
    }

    /// Whoever comes to the point first is killed there.
    pub fn kill(&self, point: &str) -> Result<()> {
        write(&self.dir.join(format!("{point}.kill")), "")
    }

    /// The step fails at the point until [`Failpoints::clear`].
    pub fn fail(&self, point: &str, text: &str) -> Result<()> {
        write(&self.dir.join(format!("{point}.error")), text)
    }

    /// Disarms everything.
    pub fn clear(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            match std::fs::remove_file(&path) {
                // A process that takes its own kill file away was quicker.
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Written under another name first: who sees it can read the whole of it.
fn write(path: &Path, text: &str) -> Result<()> {
    let tmp = path.with_extension("new");
    std::fs::write(&tmp, text).with_context(|| format!("write {}", tmp.display()))?;
    std::fs::rename(&tmp, path).with_context(|| format!("arm {}", path.display()))
}

/// A point that is armed. Dropping it lets everybody go.
#[derive(Debug)]
pub struct Hold {
    dir: PathBuf,
    point: String,
}

impl Hold {
    fn file(&self, kind: &str) -> PathBuf {
        self.dir.join(format!("{}.{kind}", self.point))
    }

    fn forget_reached(&self) -> Result<()> {
        match std::fs::remove_file(self.file("reached")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The process that waits at the point now, if one does.
    pub fn reached(&self) -> Option<u32> {
        std::fs::read_to_string(self.file("reached")).ok()?.trim().parse().ok()
    }

    /// Waits until a process has come to the point.
    pub async fn wait_reached(&self, timeout: Duration) -> Result<u32> {
        let what = format!("somebody to reach {}", self.point);
        wait_for(&what, timeout, async || Ok(self.reached())).await
    }

    pub fn let_go(self) {}
}

impl Drop for Hold {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.file("hold"));
    }
}
