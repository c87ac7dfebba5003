//! Could this node run this VM? Looks, and touches nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bellwether_types::{ClusterId, DiskSpec, NicSpec, VmSpec};

use crate::storage;

const SECTOR_BYTES: u64 = 512;
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// A bzImage has this, and this offset.
const LINUX_MAGIC: [u8; 4] = *b"HdrS";
const LINUX_MAGIC_AT: u64 = 0x202;

/// Everything that is wrong, each as a sentence for the administrator.
pub fn problems(spec: &VmSpec, storage_root: &Path, cluster: ClusterId) -> Vec<String> {
    let mut problems = Vec::new();
    let ours = storage::check_root(storage_root)
        .and_then(|()| storage::require_owner(storage_root, cluster));
    if let Err(error) = ours {
        problems.push(error.to_string());
    } else if let Err(error) = arbiter_problem(storage_root) {
        problems.push(error);
    }
    problems.extend(kernel_problem(spec).err());
    problems.extend(initrd_problem(spec).err());
    for disk in &spec.disks {
        problems.extend(disk_problem(spec, disk).err());
    }
    problems.extend(spec.nics.iter().filter_map(|nic| bridge_problem(spec, nic)));
    problems
}

fn kernel_problem(spec: &VmSpec) -> Result<(), String> {
    let (name, path) = (&spec.name, spec.kernel.display());
    let problem = |what: String| format!("VM {name}: kernel `{path}`: {what}");
    let file = open_file(&spec.kernel).map_err(problem)?;
    let mut magic = [0; 4];
    let unreadable = |error| problem(format!("cannot be read: {error}"));
    file.read_exact_at(&mut magic, 0).map_err(unreadable)?;
    if magic != ELF_MAGIC {
        let has_magic = file.read_exact_at(&mut magic, LINUX_MAGIC_AT).is_ok();
        if !has_magic || magic != LINUX_MAGIC {
            let remedy = "give a bzImage (vmlinuz), or an ELF image with a PVH entry";
            return Err(problem(format!("is no kernel; {remedy}")));
        }
    }
    fits_into_memory(&file, spec).map_err(problem)
}

fn initrd_problem(spec: &VmSpec) -> Result<(), String> {
    let Some(initrd) = &spec.initrd else { return Ok(()) };
    let problem = |what: String| format!("VM {}: initrd `{}`: {what}", spec.name, initrd.display());
    let file = open_file(initrd).map_err(problem)?;
    fits_into_memory(&file, spec).map_err(problem)
}

fn fits_into_memory(file: &File, spec: &VmSpec) -> Result<(), String> {
    let bytes = file.metadata().map_err(|error| error.to_string())?.len();
    let (mib, memory_mib) = (bytes >> 20, spec.memory_mib);
    match bytes > memory_mib << 20 {
        true => Err(format!("has {mib} MiB and does not fit into {memory_mib} MiB of memory")),
        false => Ok(()),
    }
}

/// The kernel shows a directory `bridge` for each interface that is one.
fn bridge_problem(spec: &VmSpec, nic: &NicSpec) -> Option<String> {
    let NicSpec { bridge, .. } = nic;
    let is_bridge = Path::new("/sys/class/net").join(bridge).join("bridge").is_dir();
    let remedy = format!("make it (`ip link add {bridge} type bridge`), or give another");
    (!is_bridge).then(|| format!("VM {}: this node has no bridge `{bridge}`; {remedy}", spec.name))
}

fn disk_problem(spec: &VmSpec, disk: &DiskSpec) -> Result<(), String> {
    let (name, path) = (&spec.name, disk.path.display());
    let problem = |what: String| format!("VM {name}: disk `{path}`: {what}");
    let file = open_file(&disk.path).map_err(problem)?;
    if !disk.read_only {
        File::options()
            .write(true)
            .open(&disk.path)
            .map_err(|error| problem(format!("cannot be written: {error}")))?;
    }
    let bytes = file.metadata().map_err(|error| problem(error.to_string()))?.len();
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(problem(format!(
            "has {bytes} bytes; a raw disk is a multiple of {SECTOR_BYTES}, and not empty"
        )));
    }
    file.read_at(&mut [0; 1], 0).map_err(|error| problem(format!("cannot be read: {error}")))?;
    if disk.read_only {
        return Ok(());
    }
    let dir = disk.path.parent().unwrap_or(Path::new("/"));
    arbiter_problem(dir).map_err(problem)
}

/// Regular files only: opening a FIFO would wait for its other end.
fn open_file(path: &Path) -> Result<File, String> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "is not there; is its storage mounted on this node?".into(),
        _ => error.to_string(),
    })?;
    if !metadata.is_file() {
        return Err("is not a regular file".into());
    }
    File::open(path).map_err(|error| format!("cannot be opened: {error}"))
}

/// Whether the locks of this file system prove anything.
fn arbiter_problem(path: &Path) -> Result<(), String> {
    crate::storage::require_arbiter(path).map_err(|error| error.to_string())
}
