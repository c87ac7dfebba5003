//! The claim of a VM: a lock on its claim file, and a record in it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use bellwether_types::{Epoch, Handover, VmId};
use uuid::Uuid;

use crate::ofd::{self, Mode};
use crate::record::{self, ClaimRecord, Denied, FILE_LENGTH, SLOT_OFFSETS, Slot};
use crate::retry;

/// How often a claim file may vanish under our hands before we give up.
const VANISHED_MAX: u32 = 16;

/// A VM could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error("claim {}: held by {}", path.display(), holder(by))]
    Held { path: PathBuf, by: Option<ClaimRecord> },
    #[error(
        "claim {}: {ours} is superseded by {stored}; this start command is out of date",
        path.display()
    )]
    Superseded { path: PathBuf, stored: Box<ClaimRecord>, ours: Box<ClaimRecord> },
    #[error(
        "claim {}: belongs to VM {stored}, not to VM {ours}; check the storage path",
        path.display()
    )]
    OtherVm { path: PathBuf, stored: VmId, ours: VmId },
    #[error(
        "claim {}: not a readable claim file, so nobody knows the last epoch; make sure that the \
         VM runs nowhere, then remove the file",
        path.display()
    )]
    Damaged { path: PathBuf },
    #[error("claim {}: {ours} was succeeded by {stored}", path.display())]
    Lost { path: PathBuf, stored: Box<ClaimRecord>, ours: Box<ClaimRecord> },
    #[error("{operation} of claim {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
}

impl ClaimError {
    fn lost(path: &Path, stored: ClaimRecord, ours: ClaimRecord) -> Self {
        Self::Lost { path: path.to_owned(), stored: Box::new(stored), ours: Box::new(ours) }
    }
}

fn holder(by: &Option<ClaimRecord>) -> String {
    by.map_or_else(|| "an unknown runner".to_owned(), |record| record.to_string())
}

/// What a look at a claim file shows, without its lock. It may be out of date at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClaimView {
    /// The last claim that was granted, if there was one.
    pub record: Option<ClaimRecord>,
    /// Whether somebody holds the claim.
    pub held: bool,
}

/// A VM's claim. It is held until this is dropped or the process ends.
///
/// The lock belongs to the open file, which a child process would inherit with the descriptor; it
/// is opened close-on-exec.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    file: File,
    slot: Slot,
    slot_index: usize,
}

/// Where the claim file of a VM is: `<storage>/claims/<vm-id>.claim`.
///
/// The directory is made when the storage is added to the cluster, and never by a claim: where it
/// is missing, the storage is probably not mounted, and a claim on the bare mount point would be
/// worth nothing.
pub fn claim_path(storage: &Path, vm_id: VmId) -> PathBuf {
    storage.join("claims").join(format!("{vm_id}.claim"))
}

impl Claim {
    /// Claims the VM, once, without waiting. When this returns, the record is durable.
    pub fn acquire(path: &Path, ours: ClaimRecord) -> Result<Self, ClaimError> {
        let file = lock_file(path, &ours)?;
        // From here on an error closes the file, which lets the lock go.
        let (slot, slot_index) = read_current(path, &file)?;
        let mut claim = Self { path: path.to_owned(), file, slot, slot_index };
        claim.check(&ours)?;
        claim.write(ours)?;
        Ok(claim)
    }

    /// The same, but while somebody else holds the claim it is tried again, until the deadline.
    pub fn acquire_within(
        path: &Path,
        ours: ClaimRecord,
        deadline: Instant,
    ) -> Result<Self, ClaimError> {
        let held = |error: &ClaimError| matches!(error, ClaimError::Held { .. });
        retry::until(deadline, held, || Self::acquire(path, ours))
    }

    /// Takes back, once and without waiting, a claim that its runner let go of while its guest stood
    /// still: only if nobody was granted it in between. Otherwise it is lost, for good. When this
    /// returns, the record has been written anew.
    pub fn retake(path: &Path, ours: ClaimRecord) -> Result<Self, ClaimError> {
        let gone = || io_error("opening", path)(io::ErrorKind::NotFound.into());
        let file = lock_existing(path)?.ok_or_else(gone)?;
        let (slot, slot_index) = read_current(path, &file)?;
        if !slot.claimed || slot.record != ours {
            return Err(ClaimError::lost(path, slot.record, ours));
        }
        let mut claim = Self { path: path.to_owned(), file, slot, slot_index };
        claim.write(ours)?;
        Ok(claim)
    }

    /// Takes the claim on to a higher epoch without ever letting go, as a source does that claims
    /// its sealed VM back. After an error the claim is held still, with the record as it was or,
    /// if the storage failed, as it should be: raise it again or give up the VM.
    pub fn raise(&mut self, epoch: Epoch, nonce: u64) -> Result<(), ClaimError> {
        let ours = ClaimRecord { epoch, nonce, ..self.slot.record };
        self.check(&ours)?;
        self.write(ours)
    }

    /// Records that the VM is sealed and that this runner lets go of it. Durable on return; from then
    /// on only a start under a higher epoch may make the VM run again.
    pub fn hand_over(&mut self, handover: Handover) -> Result<(), ClaimError> {
        self.put(Slot { handover: Some(handover), ..self.next(self.slot.record) })
    }

    /// Erases what an earlier runner handed over, because a guest is about to run: from now on the
    /// disks move on, and that state is of the past. Durable on return.
    pub fn consume_handover(&mut self) -> Result<(), ClaimError> {
        match self.slot.handover {
            None => Ok(()),
            Some(_) => self.put(Slot { handover: None, ..self.next(self.slot.record) }),
        }
    }

    /// What an earlier runner handed over, and no guest has run since.
    pub fn handover(&self) -> Option<Handover> {
        self.slot.handover
    }

    /// Proves that the claim is still held: the file shows our record, and the storage takes it
    /// anew through the descriptor that has the lock. Where the storage took the lock away, the
    /// write fails. That somebody removed the file is no proof against us; a later runner's record
    /// under its name is.
    pub fn renew(&mut self) -> Result<(), ClaimError> {
        let ours = self.slot.record;
        let (found, _) = read_current(&self.path, &self.file)?;
        self.require_ours(found)?;
        self.write(ours)?;
        if still_named(&self.path, &self.file).map_err(io_error("examination", &self.path))? {
            return Ok(());
        }
        match File::open(&self.path) {
            Ok(other) => self.require_ours(read_current(&self.path, &other)?.0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("opening", &self.path)(error)),
        }
    }

    fn require_ours(&self, found: Slot) -> Result<(), ClaimError> {
        let ours = self.slot.record;
        match !found.claimed || found.record == ours {
            true => Ok(()),
            false => Err(ClaimError::lost(&self.path, found.record, ours)),
        }
    }

    /// The record that is in the file.
    pub fn record(&self) -> ClaimRecord {
        self.slot.record
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Looks at a claim file without its lock: for people, and to see whom to wait for.
    pub fn peek(path: &Path) -> Result<ClaimView, ClaimError> {
        let file = File::open(path).map_err(io_error("opening", path))?;
        let held = ofd::is_locked(&file).map_err(io_error("lock test", path))?;
        let (slot, _) = read_current(path, &file)?;
        Ok(ClaimView { record: slot.claimed.then_some(slot.record), held })
    }

    /// Removes the claim file of a VM that is deleted. With it goes the knowledge of its last
    /// epoch, so the VM's id must never be used again.
    pub fn remove(self) -> Result<(), ClaimError> {
        fs::remove_file(&self.path).map_err(io_error("removal", &self.path))?;
        sync_directory(&self.path)
    }

    /// Whether the record in the file lets us in.
    fn check(&self, ours: &ClaimRecord) -> Result<(), ClaimError> {
        let (path, stored) = (self.path.clone(), self.slot.record);
        self.slot.admit(ours).map_err(|denied| match denied {
            Denied::OtherVm => ClaimError::OtherVm { path, stored: stored.vm_id, ours: ours.vm_id },
            Denied::Superseded => {
                ClaimError::Superseded { path, stored: Box::new(stored), ours: Box::new(*ours) }
            }
        })
    }

    fn write(&mut self, record: ClaimRecord) -> Result<(), ClaimError> {
        self.put(self.next(record))
    }

    fn next(&self, record: ClaimRecord) -> Slot {
        self.slot.succeed(self.slot_index, record).0
    }

    /// Writes into the slot that does not count, and makes it durable.
    fn put(&mut self, slot: Slot) -> Result<(), ClaimError> {
        let index = 1 - self.slot_index;
        let offset = SLOT_OFFSETS[index];
        self.file
            .write_all_at(&slot.encode(), offset)
            .map_err(io_error("writing the record", &self.path))?;
        self.file.sync_data().map_err(io_error("fdatasync", &self.path))?;
        (self.slot, self.slot_index) = (slot, index);
        Ok(())
    }
}

/// Opens and locks the file that has this name now, making it if there is none.
fn lock_file(path: &Path, ours: &ClaimRecord) -> Result<File, ClaimError> {
    for _ in 0..VANISHED_MAX {
        match lock_existing(path)? {
            Some(file) => return Ok(file),
            None => create(path, ours)?,
        }
    }
    Err(vanishing(path))
}

/// Opens and locks the file that has this name now; nothing if there is none.
fn lock_existing(path: &Path) -> Result<Option<File>, ClaimError> {
    for _ in 0..VANISHED_MAX {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("opening", path)(error)),
        };
        if !ofd::try_lock(&file, Mode::Write).map_err(io_error("locking", path))? {
            let by = read_current(path, &file).ok().map(|(slot, _)| slot);
            let by = by.filter(|slot| slot.claimed).map(|slot| slot.record);
            return Err(ClaimError::Held { path: path.to_owned(), by });
        }
        // The lock is worth something only if the next contender opens the same file.
        if still_named(path, &file).map_err(io_error("examination", path))? {
            return Ok(Some(file));
        }
    }
    Err(vanishing(path))
}

fn vanishing(path: &Path) -> ClaimError {
    io_error("opening", path)(io::Error::other("it was removed again and again"))
}

fn still_named(path: &Path, file: &File) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes a claim file, complete and durable before it gets its name. If somebody else is faster,
/// theirs is as good.
fn create(path: &Path, ours: &ClaimRecord) -> Result<(), ClaimError> {
    let scratch = path.with_extension(format!("new-{}", Uuid::new_v4()));
    let written =
        OpenOptions::new().write(true).create_new(true).open(&scratch).and_then(|mut file| {
            file.write_all(&record::unclaimed_file(ours))?;
            file.sync_all()
        });
    let linked = written.and_then(|()| fs::hard_link(&scratch, path));
    // A scratch file that stays behind does no harm.
    let _removed = fs::remove_file(&scratch);
    match linked {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io_error("creation", path)(error)),
    }
    sync_directory(path)
}

fn sync_directory(path: &Path) -> Result<(), ClaimError> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))
        .and_then(|directory| directory.sync_all())
        .map_err(io_error("fsync of the directory", path))
}

fn read_current(path: &Path, file: &File) -> Result<(Slot, usize), ClaimError> {
    let mut bytes = vec![0; FILE_LENGTH];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => bytes.clear(),
        outcome => outcome.map_err(io_error("reading", path))?,
    }
    record::current(&bytes).ok_or_else(|| ClaimError::Damaged { path: path.to_owned() })
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ClaimError {
    move |source| ClaimError::Io { operation, path: path.to_owned(), source }
}
