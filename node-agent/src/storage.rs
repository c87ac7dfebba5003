//! The agent's part of the shared storage: two directories, and the state files in one of them.

use std::io;
use std::path::{Path, PathBuf};

use bellwether_member::{STORAGE_MARK, storage_owner};
use bellwether_types::{ClusterId, Epoch, VmId};

/// How many entries of the state directory are looked at.
const ENTRIES_MAX: usize = 1_000_000;

/// What is wrong with the storage.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("the storage `{}` is not an absolute path", path.display())]
    Relative { path: PathBuf },
    #[error(
        "the storage `{}` is not there ({source}); mount it on this node. It is never created here, \
         because an unmounted share would become a local directory",
        path.display()
    )]
    Missing { path: PathBuf, source: io::Error },
    #[error("{operation} `{}`: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the storage `{}` has no `{}`; it is not mounted on this node, or it is not the storage \
         that the cluster was made with",
        path.display(), dir.display()
    )]
    NotOurs { path: PathBuf, dir: PathBuf },
    #[error(
        "the storage `{}` is not that of this node's cluster: its `{mark}` {said}. Mount the \
         cluster's own storage here, or, if this is it, write the cluster's id {ours} into that file",
        path.display()
    )]
    OtherCluster { path: PathBuf, mark: &'static str, said: String, ours: ClusterId },
    #[error(
        "`{}` lies on a file system whose locks are not known to be exclusive between nodes \
         ({class}); use a local file system or NFSv4",
        path.display()
    )]
    NoArbiter { path: PathBuf, class: String },
    #[error(transparent)]
    Mount(#[from] bellwether_claim::MountError),
    #[error(transparent)]
    Claim(#[from] bellwether_claim::ClaimError),
}

/// The directory of the sealed state files.
pub fn state_dir(storage: &Path) -> PathBuf {
    storage.join("state")
}

/// Checks that the storage is there.
pub fn check_root(storage: &Path) -> Result<(), StorageError> {
    if !storage.is_absolute() {
        return Err(StorageError::Relative { path: storage.into() });
    }
    let missing = |source| StorageError::Missing { path: storage.into(), source };
    match std::fs::metadata(storage).map_err(missing)?.is_dir() {
        true => Ok(()),
        false => Err(missing(io::ErrorKind::NotADirectory.into())),
    }
}

/// Checks that this is the cluster's storage and that its locks prove something.
///
/// `bell cluster init` made the directories. An agent never does: on a node where the share is not
/// mounted it would make them on its own disk, and take locks there that nobody else sees.
pub fn require_dirs(storage: &Path, ours: ClusterId) -> Result<(), StorageError> {
    check_root(storage)?;
    require_owner(storage, ours)?;
    for dir in [storage.join("claims"), state_dir(storage)] {
        if !dir.is_dir() {
            return Err(StorageError::NotOurs { path: storage.into(), dir });
        }
    }
    require_arbiter(storage)
}

/// Checks that this is the storage with which this node's cluster was made, and not another one
/// under the same path, nor the bare mount point.
pub fn require_owner(storage: &Path, ours: ClusterId) -> Result<(), StorageError> {
    let mark = STORAGE_MARK;
    let said = match storage_owner(storage) {
        Ok(Some(owner)) if owner == ours => return Ok(()),
        Ok(Some(owner)) => format!("names the cluster {owner}"),
        Ok(None) => "is not there".to_owned(),
        Err(error) => format!("cannot be read: {error}"),
    };
    Err(StorageError::OtherCluster { path: storage.into(), mark, said, ours })
}

/// Refuses a file system whose locks prove nothing between nodes.
pub fn require_arbiter(path: &Path) -> Result<(), StorageError> {
    let class = bellwether_claim::check_mount(path)?;
    match class.is_arbiter() {
        true => Ok(()),
        false => Err(StorageError::NoArbiter { path: path.into(), class: format!("{class:?}") }),
    }
}

/// The epoch in the name `<vm-id>.<epoch>.<generation>.state` of a file of this VM, if it is one.
/// A file that is still being written has no such name.
pub fn state_file_epoch(vm: VmId, path: &Path) -> Option<Epoch> {
    let name = path.file_name()?.to_str()?;
    let numbers = name.strip_prefix(&format!("{vm}."))?.strip_suffix(".state")?;
    let (epoch, generation) = numbers.split_once('.')?;
    generation.parse::<u64>().ok()?;
    epoch.parse().ok().map(Epoch)
}

/// Removes the state files of a VM up to an epoch, except those in use; answers how many.
pub fn remove_states(
    storage: &Path,
    vm: VmId,
    up_to: Epoch,
    in_use: &[PathBuf],
) -> Result<u64, StorageError> {
    check_root(storage)?;
    let dir = state_dir(storage);
    let entries = match std::fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(source) => return Err(StorageError::Io { operation: "read", path: dir, source }),
        Ok(entries) => entries,
    };
    let mut removed = 0;
    for entry in entries.take(ENTRIES_MAX) {
        let entry = entry.map_err(|source| StorageError::Io {
            operation: "read",
            path: dir.clone(),
            source,
        })?;
        let path = entry.path();
        let old = state_file_epoch(vm, &path).is_some_and(|epoch| epoch <= up_to);
        if old && !in_use.contains(&path) {
            removed += u64::from(remove_state(&path)?);
        }
    }
    Ok(removed)
}

/// Removes one state file; false when it is gone already.
pub fn remove_state(path: &Path) -> Result<bool, StorageError> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(StorageError::Io { operation: "remove", path: path.into(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> VmId {
        VmId::from_uuid(uuid::Uuid::from_u128(5))
    }

    #[test]
    fn a_missing_storage_is_never_created() {
        let dir = tempfile::tempdir().unwrap();
        let storage = dir.path().join("unmounted");
        let refused = require_dirs(&storage, cluster()).unwrap_err();
        assert!(refused.to_string().contains("mount it on this node"), "{refused}");
        assert!(!storage.exists());
        assert!(matches!(
            require_dirs(Path::new("s"), cluster()),
            Err(StorageError::Relative { .. })
        ));
    }

    #[test]
    fn an_empty_mount_point_is_not_taken_for_the_storage() {
        let dir = tempfile::tempdir().unwrap();
        let refused = require_dirs(dir.path(), cluster()).unwrap_err();
        assert!(matches!(refused, StorageError::OtherCluster { .. }), "{refused}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// Two directories of the right names on each host's own disk once passed for shared storage.
    #[test]
    fn only_the_storage_of_the_own_cluster_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join(STORAGE_MARK);
        for name in ["claims", "state"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let refused = || require_dirs(dir.path(), cluster()).unwrap_err().to_string();
        assert!(refused().contains("is not there"), "{}", refused());
        let other = ClusterId::from_uuid(uuid::Uuid::from_u128(10));
        std::fs::write(&mark, format!("{other}\n")).unwrap();
        assert!(refused().contains(&format!("names the cluster {other}")), "{}", refused());
        std::fs::write(&mark, "something else").unwrap();
        assert!(refused().contains("no cluster's id"), "{}", refused());
        std::fs::write(&mark, format!("{}\n", cluster())).unwrap();
        require_owner(dir.path(), cluster()).unwrap();
    }

    fn cluster() -> ClusterId {
        ClusterId::from_uuid(uuid::Uuid::from_u128(9))
    }

    #[test]
    fn only_old_unused_files_of_this_vm_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let storage = dir.path();
        std::fs::create_dir(state_dir(storage)).unwrap();
        let other = VmId::from_uuid(uuid::Uuid::from_u128(6));
        let name = |vm: VmId, rest: &str| state_dir(storage).join(format!("{vm}.{rest}"));
        let old = name(vm(), "1.1.state");
        let used = name(vm(), "2.1.state");
        let kept = [
            used.clone(),
            name(vm(), "3.1.state"),
            name(other, "1.1.state"),
            name(vm(), "1.1.tmp"),
        ];
        for path in kept.iter().chain([&old]) {
            std::fs::write(path, "x").unwrap();
        }
        assert_eq!(remove_states(storage, vm(), Epoch(2), &[used]).unwrap(), 1);
        assert!(!old.exists());
        assert!(kept.iter().all(|path| path.exists()));
    }
}
