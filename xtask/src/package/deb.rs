//! A Debian package from a tree of files, the same bytes from the same tree.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::output;

/// The tree of a package, in the making.
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// Begins a new one; what is there goes.
    pub fn new(root: PathBuf) -> Result<Self> {
        match fs::remove_dir_all(&root) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", root.display()));
            }
            _ => {}
        }
        let tree = Self { root };
        tree.directory("/")?;
        Ok(tree)
    }

    /// Where an absolute path of the installed system is in the tree.
    pub fn path(&self, at: &str) -> PathBuf {
        self.root.join(at.trim_start_matches('/'))
    }

    /// A directory, with those above it.
    pub fn directory(&self, at: &str) -> Result<()> {
        let mut path = self.root.clone();
        for part in std::iter::once("").chain(at.split('/').filter(|part| !part.is_empty())) {
            path.push(part);
            if !path.is_dir() {
                fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
            }
            set_mode(&path, 0o755)?;
        }
        Ok(())
    }

    /// A file with these bytes.
    pub fn file(&self, at: &str, bytes: &[u8], mode: u32) -> Result<()> {
        let path = self.path(at);
        self.directory(at.rsplit_once('/').map_or("", |(above, _)| above))?;
        fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
        set_mode(&path, mode)
    }

    /// All files, sorted, relative to the tree, without the control files.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        collect(&self.root, &mut found)?;
        let relative = found.iter().filter_map(|path| path.strip_prefix(&self.root).ok());
        let mut files: Vec<_> =
            relative.filter(|path| !path.starts_with("DEBIAN")).map(Path::to_owned).collect();
        files.sort();
        Ok(files)
    }

    /// The KiB that it takes when it is installed.
    pub fn kib(&self) -> Result<u64> {
        let mut kib = 0;
        for file in self.files()? {
            kib += fs::metadata(self.root.join(file))?.len().div_ceil(1024);
        }
        Ok(kib)
    }

    /// Makes the package. `epoch` is the time that all files get, seconds since 1970; `compression`
    /// is what dpkg-deb is told about it.
    pub fn pack(&self, deb: &Path, epoch: &str, compression: &[&str]) -> Result<()> {
        let files = self.files()?;
        let sums = output(Command::new("md5sum").arg("--").args(&files).current_dir(&self.root))?;
        self.file("/DEBIAN/md5sums", sums.as_bytes(), 0o644)?;
        let mut build = Command::new("dpkg-deb");
        build.arg("--root-owner-group").args(compression);
        build.arg("--build").args([&self.root, deb]);
        // Standard output belongs to the caller's own result.
        output(build.env("SOURCE_DATE_EPOCH", epoch)).map(drop)
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .with_context(|| format!("set the mode of {}", path.display()))
}

fn collect(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        match path.is_dir() {
            true => collect(&path, found)?,
            false => found.push(path),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROL: &str = "Package: it\nVersion: 1\nArchitecture: amd64\nMaintainer: it <it@it>\n\
                           Description: it\n";

    fn pack(under: &Path, order: [&str; 2]) -> Vec<u8> {
        let tree = Tree::new(under.join("tree")).unwrap();
        for name in order {
            tree.file(&format!("/usr/share/it/{name}"), name.as_bytes(), 0o644).unwrap();
        }
        tree.file("/DEBIAN/control", CONTROL.as_bytes(), 0o644).unwrap();
        let deb = under.join("it.deb");
        tree.pack(&deb, "1750000000", &["-Zgzip"]).unwrap();
        fs::read(deb).unwrap()
    }

    #[test]
    fn the_same_tree_gives_the_same_package() {
        let dir = std::env::temp_dir().join(format!("bellwether-deb-{}", std::process::id()));
        let first = pack(&dir, ["a", "b"]);
        let second = pack(&dir, ["b", "a"]);
        let listing =
            output(Command::new("dpkg-deb").arg("--contents").arg(dir.join("it.deb"))).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert!(first == second, "the order or the time of making shows");
        assert!(listing.contains("root/root") && listing.contains("2025-06-15"), "{listing}");
    }
}
