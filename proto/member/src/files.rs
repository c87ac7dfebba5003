//! Files that are complete or absent, whatever happens meanwhile.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::MemberError;

/// Writes a file through a temporary sibling, and returns when file and name are on the disk.
///
/// `mode` holds from the first byte on, so a secret is never readable for a moment.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<(), MemberError> {
    let temporary = sibling(path, "tmp");
    let written = write_new(&temporary, bytes, mode)
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|source| MemberError::io("write", path, source));
    if written.is_err() {
        // The error that counts is the one above; a leftover is only untidy.
        let _ = std::fs::remove_file(&temporary);
    }
    written?;
    sync_dir(parent(path))
}

/// Creates a directory that only its owner can enter, with all its parents.
pub fn create_private_dir(path: &Path) -> Result<(), MemberError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| MemberError::io("create the directory", path, source))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    // A leftover of a crashed process with the same number; nobody else uses this name.
    let _ = std::fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(crate) fn sync_dir(path: &Path) -> Result<(), MemberError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| MemberError::io("sync the directory", path, source))
}

/// The directory that holds `path`; a bare name lies in the current one.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn sibling(path: &Path, kind: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or(OsStr::new("bellwether")));
    name.push(format!(".{kind}-{}", std::process::id()));
    parent(path).join(name)
}

/// A directory in the making. It takes its name with [`StagedDir::publish`] or disappears.
pub(crate) struct StagedDir {
    staged: PathBuf,
    target: PathBuf,
    published: bool,
}

impl StagedDir {
    /// Starts one beside `target`, on the same file system, so that publishing is one rename.
    pub(crate) fn new(target: &Path) -> Result<Self, MemberError> {
        create_private_dir(parent(target))?;
        let staged = sibling(target, "new");
        let _ = std::fs::remove_dir_all(&staged);
        DirBuilder::new()
            .mode(0o700)
            .create(&staged)
            .map_err(|source| MemberError::io("create the directory", &staged, source))?;
        Ok(Self { staged, target: target.to_path_buf(), published: false })
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.staged
    }

    /// Makes the whole directory appear under its name, durably.
    ///
    /// rename(2) replaces an empty directory and refuses any other, which is exactly the rule here.
    pub(crate) fn publish(mut self) -> Result<(), MemberError> {
        sync_dir(&self.staged)?;
        std::fs::rename(&self.staged, &self.target).map_err(|source| match source.kind() {
            std::io::ErrorKind::ResourceBusy => MemberError::Refused(format!(
                "{} is a mount point, which cannot be put in place at once; \
                 give a directory below it",
                self.target.display()
            )),
            std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::AlreadyExists => {
                MemberError::DataDirNotEmpty { data_dir: self.target.clone() }
            }
            _ => MemberError::io("put in place", &self.target, source),
        })?;
        self.published = true;
        sync_dir(parent(&self.target))
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if !self.published {
            let _ = std::fs::remove_dir_all(&self.staged);
        }
    }
}

/// Refuses a data directory that already holds something, before anything else is done.
pub(crate) fn check_data_dir_free(data_dir: &Path) -> Result<(), MemberError> {
    if data_dir.join(crate::MEMBER_FILE).exists() {
        return Err(MemberError::AlreadyAMember { data_dir: data_dir.to_path_buf() });
    }
    match std::fs::read_dir(data_dir) {
        Ok(mut entries) => match entries.next() {
            Some(_) => Err(MemberError::DataDirNotEmpty { data_dir: data_dir.to_path_buf() }),
            None => Ok(()),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(MemberError::io("use the data directory", data_dir, source)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, b"old and long", 0o600).unwrap();
        write_atomic(&path, b"new", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_unpublished_directory_disappears_and_a_full_one_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("d");
        drop(StagedDir::new(&target).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

        std::fs::create_dir(&target).unwrap();
        StagedDir::new(&target).unwrap().publish().unwrap();

        std::fs::write(target.join("x"), "x").unwrap();
        let staged = StagedDir::new(&target).unwrap();
        assert!(matches!(staged.publish(), Err(MemberError::DataDirNotEmpty { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
