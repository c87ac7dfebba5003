//! Whether the storage under a path can be an arbiter at all.
//!
//! | file system | locks hold among | class |
//! |---|---|---|
//! | ext4, xfs, btrfs, tmpfs, ... | all processes of this kernel, the only one that can mount it | local |
//! | NFSv4, mounted hard, with its locks at the server | all clients | NFSv4 |
//! | NFSv4 with soft, nolock, local_lock, nocto; NFSv3 and older | | refused |
//! | FUSE, CIFS, 9p, cluster file systems | nobody has proven it to us | unproven: use leases |

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// What the locks of a storage are worth.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StorageClass {
    /// Locks hold among the processes of this host, which alone can reach it.
    Local,
    /// The server enforces locks among all its clients, and revokes those of a lost one.
    NfsV4,
    /// Locks may hold on this host only: other hosts must be kept away by leases.
    Unproven { fs_type: String },
}

impl StorageClass {
    /// Whether a lock on this storage decides who runs a VM.
    pub fn is_arbiter(&self) -> bool {
        !matches!(self, Self::Unproven { .. })
    }
}

/// Why a mount is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MountProblem {
    #[error("it is mounted with NFS version {version}; mount it with vers=4.1 or later")]
    OldNfs { version: String },
    #[error("it is mounted with {option:?}, {why}; mount it without")]
    BadOption { option: String, why: &'static str },
    #[error(
        "the nfs module recovers lost locks (nfs.recover_lost_locks=1), so a VMM could write after \
         another has taken over; set it to 0"
    )]
    RecoversLostLocks,
    #[error("its mount is not in /proc/self/mountinfo")]
    NotFound,
    #[error("the file system is {magic:#x} by its magic number but {fs_type:?} in mountinfo")]
    Contradiction { magic: u64, fs_type: String },
}

/// A path cannot be used for claims.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("storage {} cannot decide who runs a VM: {problem}", path.display())]
    Refused { path: PathBuf, problem: MountProblem },
    #[error("{operation} of storage {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
}

/// `NFS_SUPER_MAGIC` of statfs(2).
const NFS_MAGIC: u64 = 0x6969;
/// File systems that one kernel alone mounts.
const LOCAL: [&str; 9] =
    ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "tmpfs", "zfs"];

/// Finds out what locks under this path are worth; refuses mounts on which they are deceptive.
pub fn check_mount(path: &Path) -> Result<StorageClass, MountError> {
    let io_error =
        |operation| move |source| MountError::Io { operation, path: path.to_owned(), source };
    let refused = |problem| MountError::Refused { path: path.to_owned(), problem };
    let directory = std::fs::File::open(path).map_err(io_error("opening"))?;
    let statfs =
        rustix::fs::fstatfs(&directory).map_err(|errno| io_error("statfs")(errno.into()))?;
    let info = format!("/proc/self/fdinfo/{}", directory.as_raw_fd());
    let info = std::fs::read_to_string(info).map_err(io_error("looking up the mount"))?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(io_error("reading the mount table"))?;
    let id = mount_id(&info).ok_or_else(|| refused(MountProblem::NotFound))?;
    let class = classify(&mounts, id, statfs.f_type as u64).map_err(refused)?;
    if class == StorageClass::NfsV4 && recovers_lost_locks() {
        return Err(refused(MountProblem::RecoversLostLocks));
    }
    Ok(class)
}

fn recovers_lost_locks() -> bool {
    let parameter = std::fs::read_to_string("/sys/module/nfs/parameters/recover_lost_locks");
    parameter.is_ok_and(|text| text.trim() == "Y" || text.trim() == "1")
}

/// The mount of an open file, from its `/proc/self/fdinfo`.
fn mount_id(fdinfo: &str) -> Option<u64> {
    let line = fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    line.trim().parse().ok()
}

/// Classifies a mount by the text of `/proc/self/mountinfo` (proc_pid_mountinfo(5)), its number in
/// it, and the magic number of its file system.
pub fn classify(mountinfo: &str, mount: u64, magic: u64) -> Result<StorageClass, MountProblem> {
    let (fs_type, options) = find_mount(mountinfo, mount).ok_or(MountProblem::NotFound)?;
    let nfs = fs_type == "nfs" || fs_type == "nfs4";
    if nfs != (magic == NFS_MAGIC) {
        return Err(MountProblem::Contradiction { magic, fs_type: fs_type.to_owned() });
    }
    if nfs {
        return check_nfs(fs_type, &options).map(|()| StorageClass::NfsV4);
    }
    if LOCAL.contains(&fs_type) {
        return Ok(StorageClass::Local);
    }
    Ok(StorageClass::Unproven { fs_type: fs_type.to_owned() })
}

/// The type and all options of a mount: those of the mount and those of the file system.
///
/// `36 35 98:0 /root /mnt rw,noatime shared:1 - ext4 /dev/sda rw,errors=continue`
fn find_mount(mountinfo: &str, mount: u64) -> Option<(&str, Vec<&str>)> {
    let line = mountinfo
        .lines()
        .find(|line| line.split(' ').next().and_then(|id| id.parse().ok()) == Some(mount))?;
    let (left, right) = line.split_once(" - ")?;
    let mut right = right.split(' ');
    let fs_type = right.next()?;
    let of_fs = right.nth(1)?;
    let of_mount = left.split(' ').nth(5)?;
    Some((fs_type, of_mount.split(',').chain(of_fs.split(',')).collect()))
}

fn check_nfs(fs_type: &str, options: &[&str]) -> Result<(), MountProblem> {
    let value =
        |key: &str| options.iter().find_map(|option| option.strip_prefix(key)?.strip_prefix('='));
    let version = value("vers").or(value("nfsvers")).unwrap_or(fs_type);
    if !(version.starts_with('4') || version == "nfs4") {
        return Err(MountProblem::OldNfs { version: version.to_owned() });
    }
    for option in options {
        let why = match *option {
            "soft" | "softerr" | "softreval" => "so writes are lost when the server is slow",
            "nolock" => "so locks do not leave this host",
            "nocto" => "so this host may see old data after a takeover",
            local if local.starts_with("local_lock=") && local != "local_lock=none" => {
                "so locks do not leave this host"
            }
            _ => continue,
        };
        return Err(MountProblem::BadOption { option: (*option).to_owned(), why });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXT4_MAGIC: u64 = 0xef53;
    const NFS4: &str = "rw,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,hard,proto=tcp,\
                        timeo=600,retrans=2,sec=sys,clientaddr=10.0.0.2,local_lock=none,addr=10.0.0.1";

    fn table(fs_type: &str, options: &str) -> String {
        format!(
            "22 1 0:20 / /proc rw,nosuid shared:5 - proc proc rw\n\
             36 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,errors=remount-ro\n\
             361 36 0:52 / /srv/with\\040space rw,relatime - {fs_type} server:/export {options}\n"
        )
    }

    fn nfs(fs_type: &str, options: &str) -> Result<StorageClass, MountProblem> {
        classify(&table(fs_type, options), 361, NFS_MAGIC)
    }

    #[test]
    fn good_mounts_are_told_apart() {
        assert_eq!(classify(&table("nfs4", NFS4), 36, EXT4_MAGIC), Ok(StorageClass::Local));
        assert_eq!(nfs("nfs4", NFS4), Ok(StorageClass::NfsV4));
        let fuse = classify(&table("fuse.sshfs", "rw,user_id=0"), 361, 0x6573_5546).unwrap();
        assert_eq!(fuse, StorageClass::Unproven { fs_type: "fuse.sshfs".into() });
        assert!(!fuse.is_arbiter() && StorageClass::NfsV4.is_arbiter());
    }

    #[test]
    fn nfs_3_is_refused() {
        let options = NFS4.replace("vers=4.2", "vers=3");
        let problem = nfs("nfs", &options).unwrap_err();
        assert_eq!(problem, MountProblem::OldNfs { version: "3".into() });
        assert!(problem.to_string().contains("mount it with vers=4.1"));
    }

    #[test]
    fn deceptive_options_are_refused() {
        for (from, to) in [
            ("hard", "soft"),
            ("hard", "softerr"),
            ("local_lock=none", "local_lock=all"),
            ("local_lock=none", "local_lock=posix"),
            ("hard", "hard,nolock"),
            ("hard", "hard,nocto"),
        ] {
            let problem = nfs("nfs4", &NFS4.replace(from, to)).unwrap_err();
            assert!(matches!(problem, MountProblem::BadOption { .. }), "{to}: {problem}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert_eq!(classify(&table("nfs4", NFS4), 99, NFS_MAGIC), Err(MountProblem::NotFound));
        assert_eq!(classify("361 garbage", 361, NFS_MAGIC), Err(MountProblem::NotFound));
        assert_eq!(classify("", 361, NFS_MAGIC), Err(MountProblem::NotFound));
        let contradiction = classify(&table("ext4", "rw"), 361, NFS_MAGIC);
        assert!(matches!(contradiction, Err(MountProblem::Contradiction { .. })));
    }

    #[test]
    fn a_real_directory_has_a_class() {
        let directory = tempfile::tempdir().unwrap();
        assert!(check_mount(directory.path()).is_ok());
        assert!(matches!(
            check_mount(Path::new("/does/not/exist")),
            Err(MountError::Io { operation: "opening", .. })
        ));
        assert_eq!(mount_id("pos:\t0\nflags:\t0100000\nmnt_id:\t29\n"), Some(29));
    }
}
