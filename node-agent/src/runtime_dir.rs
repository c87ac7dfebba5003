//! The runtime directory: what an agent must find again after its own death, but not after the
//! host's.
//!
//! ```text
//! <runtime>/agent.lock                        held by the running agent
//! <runtime>/term.<cluster-id>.json            the highest term that was heard of, synced
//! <runtime>/floors/<vm-id>.json               the released epochs, synced before a release answers
//! <runtime>/vms/<vm-id>.<epoch>/              one incarnation, by the epoch of its Prepare
//!     incarnation.json                        written before the process is started
//!     api.sock  lease  exit.json  vmm.log
//! ```
//!
//! A claim back raises the epoch in `incarnation.json` and leaves the directory's name, because the
//! VMM's socket is in it. Only floors and the term are synced: everything else is as dead as its processes after
//! a crash of the host, while a crash of the agent alone loses no written file.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use bellwether_agent_core::{Durable, Released};
use bellwether_types::{Arbiter, BootId, ClusterId, Epoch, StateFileRef, VmId};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// `sun_path` has 108 bytes, the last of them NUL.
const SOCKET_PATH_MAX: usize = 107;
/// How many directories or floors are read at start.
const ENTRIES_MAX: usize = 100_000;

/// What is wrong with the runtime directory.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("{operation} `{}`: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "`{}` is not what this agent wrote: {source}; end all VMMs of this node (or reboot it), \
         then remove the file",
        path.display()
    )]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error(
        "the runtime directory `{}` is too deep: socket paths in it have {len} bytes and the \
         kernel takes {SOCKET_PATH_MAX}; set `runtime_dir` in agent.toml to a shorter path",
        path.display()
    )]
    TooDeep { path: PathBuf, len: usize },
    #[error(
        "another agent runs on `{}`; stop it first, or give this one a `runtime_dir` of its own",
        path.display()
    )]
    InUse { path: PathBuf },
    #[error(transparent)]
    Durable(#[from] bellwether_member::MemberError),
}

impl RuntimeError {
    fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, path: path.into(), source }
    }
}

/// What `incarnation.json` says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct IncarnationRecord {
    pub vm_id: VmId,
    /// The epoch of its Prepare, which names the directory.
    pub home: Epoch,
    /// Its epoch now.
    pub epoch: Epoch,
    pub arbiter: Arbiter,
    pub boot_id: BootId,
    /// None until the process has been started.
    pub pid: Option<u32>,
    pub start_ticks: Option<u64>,
    pub loaded: Option<[u8; 32]>,
    pub loading: Option<[u8; 32]>,
    /// Where the loaded or loading file is; the VMM may still read its memory from it.
    #[serde(default)]
    pub loaded_file: Option<PathBuf>,
    #[serde(default)]
    pub load_us: u64,
    pub may_have_run: bool,
    pub claiming: Option<Epoch>,
    pub claimed_from: Option<Epoch>,
    pub prepare_us: u64,
    /// What it has sealed, as long as its guest has not gone on after it.
    #[serde(default)]
    pub sealed: Option<StateFileRef>,
}

#[derive(Serialize, Deserialize)]
struct FloorRecord {
    floor: Epoch,
    term: u64,
    #[serde(default)]
    seal_task: u64,
    released: Option<ReleasedRecord>,
}

#[derive(Serialize, Deserialize)]
struct ReleasedRecord {
    epoch: Epoch,
    up_to: Epoch,
    reason: String,
    never_ran: Option<Epoch>,
}

/// The runtime directory of a running agent.
#[derive(Debug)]
pub struct RuntimeDir {
    root: PathBuf,
    _lock: File,
}

impl RuntimeDir {
    /// Creates what is missing, and locks it against a second agent.
    pub fn open(root: &Path) -> Result<Self, RuntimeError> {
        // The longest epoch and a UUID: no VM is refused later for the length of its path.
        let longest = root.join("vms").join(format!("{}.{}", "x".repeat(36), u64::MAX));
        let len = longest.join("api.sock").as_os_str().len();
        if len > SOCKET_PATH_MAX {
            return Err(RuntimeError::TooDeep { path: root.into(), len });
        }
        for dir in [root.to_owned(), root.join("vms"), root.join("floors")] {
            bellwether_member::create_private_dir(&dir)?;
        }
        let path = root.join("agent.lock");
        let lock = File::options().create(true).write(true).truncate(false).open(&path);
        let lock = lock.map_err(RuntimeError::io("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { root: root.into(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RuntimeError::InUse { path: root.into() }),
            Err(error) => Err(RuntimeError::Io { operation: "lock", path, source: error.into() }),
        }
    }

    /// The directory of one incarnation.
    pub fn home(&self, vm: VmId, home: Epoch) -> Home {
        Home { dir: self.root.join("vms").join(format!("{vm}.{home}")) }
    }

    /// What is known of all VMs that this boot has released.
    pub fn floors(&self) -> Result<Vec<(VmId, Durable)>, RuntimeError> {
        let mut floors = Vec::new();
        for path in entries(&self.root.join("floors"))? {
            let vm = path.file_stem().and_then(|stem| stem.to_str()).and_then(|s| s.parse().ok());
            if let Some(vm) = vm.filter(|_| path.extension().is_some_and(|e| e == "json")) {
                floors.push((vm, read_floor(&path)?));
            }
        }
        Ok(floors)
    }

    /// Makes a floor durable; when it returns, it survives a crash of the agent and of the host.
    pub fn save_floor(&self, vm: VmId, durable: &Durable) -> Result<(), RuntimeError> {
        let path = self.root.join("floors").join(format!("{vm}.json"));
        let released = durable.released.as_ref().map(|it| ReleasedRecord {
            epoch: it.epoch,
            up_to: it.up_to,
            reason: it.reason.clone(),
            never_ran: it.never_ran,
        });
        let Durable { floor, term, seal_task, .. } = *durable;
        let record = FloorRecord { floor, term, seal_task, released };
        let bytes = serde_json::to_vec(&record)
            .map_err(|source| RuntimeError::Damaged { path: path.clone(), source })?;
        Ok(bellwether_member::write_atomic(&path, &bytes, 0o600)?)
    }

    /// The highest term of a cluster that an agent on this directory has heard of; 0 for none.
    pub fn term(&self, cluster: ClusterId) -> Result<u64, RuntimeError> {
        let path = self.term_file(cluster);
        match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(source) => Err(RuntimeError::Io { operation: "read", path, source }),
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|source| RuntimeError::Damaged { path, source }),
        }
    }

    /// Makes a term durable, as a floor is made.
    pub fn save_term(&self, cluster: ClusterId, term: u64) -> Result<(), RuntimeError> {
        let text = term.to_string();
        Ok(bellwether_member::write_atomic(&self.term_file(cluster), text.as_bytes(), 0o600)?)
    }

    /// By cluster: the terms of a new one begin again at 1.
    fn term_file(&self, cluster: ClusterId) -> PathBuf {
        self.root.join(format!("term.{cluster}.json"))
    }

    /// All incarnations that earlier agents left. A directory without a record belongs to one that
    /// was never started, and is removed.
    pub fn incarnations(&self) -> Result<Vec<(Home, IncarnationRecord)>, RuntimeError> {
        let mut found = Vec::new();
        for dir in entries(&self.root.join("vms"))? {
            let home = Home { dir };
            match home.read_record()? {
                Some(record) => found.push((home, record)),
                None => home.remove()?,
            }
        }
        Ok(found)
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, RuntimeError> {
    let read = std::fs::read_dir(dir).map_err(RuntimeError::io("read", dir))?;
    let paths = read.take(ENTRIES_MAX).map(|entry| entry.map(|entry| entry.path()));
    paths.collect::<io::Result<_>>().map_err(RuntimeError::io("read", dir))
}

fn read_floor(path: &Path) -> Result<Durable, RuntimeError> {
    let bytes = std::fs::read(path).map_err(RuntimeError::io("read", path))?;
    let record: FloorRecord = serde_json::from_slice(&bytes)
        .map_err(|source| RuntimeError::Damaged { path: path.into(), source })?;
    let released = record.released.map(|ReleasedRecord { epoch, up_to, reason, never_ran }| {
        Released { epoch, up_to, reason, never_ran }
    });
    let FloorRecord { floor, term, seal_task, .. } = record;
    Ok(Durable { floor, term, seal_task, released })
}

/// The directory of one incarnation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Home {
    dir: PathBuf,
}

impl Home {
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    pub fn socket(&self) -> PathBuf {
        self.dir.join("api.sock")
    }
    pub fn lease_page(&self) -> PathBuf {
        self.dir.join("lease")
    }
    pub fn exit_file(&self) -> PathBuf {
        self.dir.join("exit.json")
    }
    pub fn log(&self) -> PathBuf {
        self.dir.join("vmm.log")
    }

    /// Creates the directory, empty.
    pub fn create(&self) -> Result<(), RuntimeError> {
        self.remove()?;
        Ok(bellwether_member::create_private_dir(&self.dir)?)
    }

    pub fn remove(&self) -> Result<(), RuntimeError> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(RuntimeError::Io { operation: "remove", path: self.dir.clone(), source: error })
            }
            _ => Ok(()),
        }
    }

    /// Writes the record: a reader sees the old one or the new one, never a part.
    pub fn write_record(&self, record: &IncarnationRecord) -> Result<(), RuntimeError> {
        let path = self.dir.join("incarnation.json");
        let tmp = self.dir.join(".incarnation.json.tmp");
        let bytes = serde_json::to_vec(record)
            .map_err(|source| RuntimeError::Damaged { path: path.clone(), source })?;
        std::fs::write(&tmp, bytes).map_err(RuntimeError::io("write", &tmp))?;
        std::fs::rename(&tmp, &path).map_err(RuntimeError::io("rename", &path))
    }

    fn read_record(&self) -> Result<Option<IncarnationRecord>, RuntimeError> {
        let path = self.dir.join("incarnation.json");
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(RuntimeError::io("read", &path))?,
        };
        let record = serde_json::from_slice(&bytes)
            .map_err(|source| RuntimeError::Damaged { path, source })?;
        Ok(Some(record))
    }

    /// Why the VMM ended, as it recorded itself; `killed` if it could not.
    pub fn exit_reason(&self) -> String {
        #[derive(Deserialize)]
        struct Exit {
            reason: String,
        }
        let exit = std::fs::read(self.exit_file()).ok();
        let exit = exit.and_then(|bytes| serde_json::from_slice::<Exit>(&bytes).ok());
        exit.map_or_else(|| "killed".to_owned(), |exit| exit.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> VmId {
        VmId::from_uuid(uuid::Uuid::from_u128(9))
    }

    fn record() -> IncarnationRecord {
        IncarnationRecord {
            vm_id: vm(),
            home: Epoch(3),
            epoch: Epoch(4),
            arbiter: Arbiter::Storage,
            boot_id: BootId::from_uuid(uuid::Uuid::from_u128(1)),
            pid: Some(1),
            start_ticks: Some(2),
            loaded: Some([7; 32]),
            loading: None,
            loaded_file: Some("/s/state/f".into()),
            load_us: 6,
            may_have_run: true,
            claiming: None,
            claimed_from: None,
            prepare_us: 5,
            sealed: None,
        }
    }

    #[test]
    fn floors_and_records_are_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let released = Released {
            epoch: Epoch(2),
            up_to: Epoch(3),
            reason: "stopped".into(),
            never_ran: None,
        };
        let durable = Durable { floor: Epoch(3), term: 8, seal_task: 4, released: Some(released) };
        let runtime = RuntimeDir::open(dir.path()).unwrap();
        runtime.save_floor(vm(), &durable).unwrap();
        let home = runtime.home(vm(), Epoch(3));
        home.create().unwrap();
        home.write_record(&record()).unwrap();
        runtime.home(vm(), Epoch(9)).create().unwrap();
        drop(runtime);

        let runtime = RuntimeDir::open(dir.path()).unwrap();
        assert_eq!(runtime.floors().unwrap(), [(vm(), durable)]);
        assert_eq!(runtime.incarnations().unwrap(), [(home.clone(), record())]);
        assert!(!runtime.home(vm(), Epoch(9)).dir().exists(), "never started, so removed");
        assert_eq!(home.exit_reason(), "killed");
    }

    #[test]
    fn a_second_agent_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = RuntimeDir::open(dir.path()).unwrap();
        let second = RuntimeDir::open(dir.path());
        assert!(matches!(second, Err(RuntimeError::InUse { .. })));
    }

    #[test]
    fn a_path_that_no_socket_fits_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(60));
        assert!(matches!(RuntimeDir::open(&deep), Err(RuntimeError::TooDeep { .. })));
    }
}
