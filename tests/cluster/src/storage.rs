//! The cluster's shared storage.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::options::StorageKind;

/// A directory that all nodes share; removed when dropped.
#[derive(Debug)]
pub struct Storage {
    path: PathBuf,
    mounted: bool,
    /// Outside of the cluster's directory, so that it must be removed by itself.
    outside: bool,
}

impl Storage {
    pub fn create(kind: &StorageKind, root: &Path) -> Result<Self> {
        let (path, outside) = match kind {
            StorageKind::Below(dir) => {
                let name = root.file_name().context("the cluster's directory has no name")?;
                (dir.join(name), true)
            }
            _ => (root.join("storage"), false),
        };
        std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        let mut storage = Self { path, mounted: false, outside };
        if let StorageKind::Tmpfs { mib } = kind {
            mount_tmpfs(&storage.path, &format!("size={mib}m"))?;
            storage.mounted = true;
        }
        Ok(storage)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this process may mount file systems: tests that need a full one ask first.
    pub fn can_mount() -> bool {
        let dir = std::env::temp_dir().join(format!("bw-mount-{}", uuid::Uuid::new_v4()));
        let tried = std::fs::create_dir(&dir)
            .context("create a directory")
            .and_then(|()| Self::create(&StorageKind::Tmpfs { mib: 1 }, &dir));
        let can = tried.is_ok();
        drop(tried);
        let _ = std::fs::remove_dir_all(&dir);
        can
    }
}

/// Mounts a file system in memory on a directory. Whoever removes the cluster's directory unmounts it.
pub fn mount_tmpfs(path: &Path, options: &str) -> Result<()> {
    let options = std::ffi::CString::new(options)?;
    mount("bellwether-test", path, "tmpfs", MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("mount a tmpfs on {}", path.display()))
}

impl Drop for Storage {
    fn drop(&mut self) {
        if self.mounted {
            let _ = unmount(&self.path, UnmountFlags::DETACH);
        }
        if self.outside {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
