//! Why a command failed, and which kind of failure that is for whoever asked.

use std::io;
use std::path::PathBuf;

use bellwether_claim::ClaimError;
use bellwether_lease::LeaseError;
use bellwether_memory::{AheadError, PreCopyError, SaveError as MemoryError};
use bellwether_statefile::StateFileError;

use crate::boot::BootError;
use crate::devices::block::DiskError;
use crate::devices::net::TapError;
use crate::lifecycle::Refused;
use crate::locks::LockError;
use crate::machine::MachineError;
use crate::precopy::JobError;
use crate::snapshot::{LoadError, SaveError};

/// Stable kinds; the API maps each to one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request is wrong, whatever the state.
    Invalid,
    /// A file that is named is not there.
    NotFound,
    /// Not possible now, in this state or while somebody else holds a lock.
    Precondition,
    /// An older epoch: the command is out of date.
    Aborted,
    /// No space, no memory.
    Exhausted,
    /// A file's content is not what it must be.
    DataLoss,
    Internal,
}

#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("no machine has been created")]
    NoMachine,
    #[error("a load into this machine failed half-way; stop this VMM and start another")]
    Spoiled,
    #[error("arbiter `lease` needs a lease page: give its path")]
    NoLeasePage,
    #[error("the epoch must be 1 or higher")]
    NoEpoch,
    #[error(
        "the VM is sealed at epoch {held}; to claim it back give a higher epoch than that, not {asked}"
    )]
    EpochNotHigher { held: u64, asked: u64 },
    #[error(
        "the VM is sealed as generation {sealed}, into {path}; generation {asked} was asked for"
    )]
    OtherGeneration { sealed: u64, asked: u64, path: PathBuf },
    #[error(
        "save: another runner may own the VM by now: its lease page shows a higher epoch, or its claim cannot be written"
    )]
    Superseded,
    #[error("save: its memory is still incomplete: {0}")]
    MemoryIncomplete(String),
    #[error("its memory is lost: {0}. Stop the VM, and start it from its disks")]
    MemoryLost(String),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Ahead(#[from] AheadError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(transparent)]
    PreCopy(#[from] JobError),
    #[error("{what}: {source}")]
    Host { what: &'static str, source: io::Error },
}

impl VmmError {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Refused(_) | Self::NoMachine | Self::Spoiled | Self::MemoryIncomplete(_) => {
                Kind::Precondition
            }
            Self::OtherGeneration { .. } => Kind::Precondition,
            Self::NoLeasePage | Self::NoEpoch => Kind::Invalid,
            Self::EpochNotHigher { .. } | Self::Superseded => Kind::Aborted,
            Self::MemoryLost(_) => Kind::DataLoss,
            Self::Machine(error) => machine_kind(error),
            Self::Lock(error) => lock_kind(error),
            Self::Lease(LeaseError::Io { source, .. }) => io_kind(source),
            Self::Lease(_) => Kind::DataLoss,
            Self::Load(LoadError::File(error)) => file_kind(error),
            Self::Load(LoadError::Saved(_)) => Kind::DataLoss,
            Self::Load(LoadError::Shape { .. } | LoadError::Processor { .. }) => Kind::Precondition,
            Self::Load(_) => Kind::Internal,
            Self::Ahead(AheadError::File(error)) => file_kind(error),
            Self::Ahead(AheadError::OtherMemory { .. } | AheadError::NotFresh) => {
                Kind::Precondition
            }
            Self::Ahead(AheadError::Ram(_)) => Kind::Internal,
            Self::Save(error) => save_kind(error),
            Self::PreCopy(error) => pre_copy_kind(error),
            Self::Host { source, .. } => io_kind(source),
        }
    }
}

fn io_kind(error: &io::Error) -> Kind {
    match error.kind() {
        io::ErrorKind::NotFound => Kind::NotFound,
        io::ErrorKind::StorageFull
        | io::ErrorKind::QuotaExceeded
        | io::ErrorKind::FileTooLarge
        | io::ErrorKind::OutOfMemory => Kind::Exhausted,
        _ => Kind::Internal,
    }
}

fn machine_kind(error: &MachineError) -> Kind {
    match error {
        MachineError::Disk(DiskError::Open { source, .. })
        | MachineError::Boot(BootError::Open { source, .. }) => io_kind(source),
        MachineError::Tap(TapError::NoBridge(_)) => Kind::NotFound,
        MachineError::Tap(
            TapError::Open(source)
            | TapError::Make(source)
            | TapError::Plug { source, .. }
            | TapError::Call { source, .. },
        ) => io_kind(source),
        MachineError::NoMac => Kind::Internal,
        MachineError::Disk(_) | MachineError::Boot(_) | MachineError::Ram(_) => Kind::Invalid,
        MachineError::SerialFile { source, .. } | MachineError::Host { source, .. } => {
            io_kind(source)
        }
        MachineError::Kvm(_) => Kind::Internal,
    }
}

fn lock_kind(error: &LockError) -> Kind {
    match error {
        LockError::OlderEpoch { .. } | LockError::Claim(ClaimError::Superseded { .. }) => {
            Kind::Aborted
        }
        LockError::Claim(ClaimError::Damaged { .. }) => Kind::DataLoss,
        LockError::Claim(ClaimError::Io { source, .. }) => io_kind(source),
        _ => Kind::Precondition,
    }
}

fn file_kind(error: &StateFileError) -> Kind {
    match error {
        StateFileError::Io { source, .. } => io_kind(source),
        StateFileError::Invalid { .. } => Kind::DataLoss,
    }
}

fn save_kind(error: &SaveError) -> Kind {
    match error {
        SaveError::File(error)
        | SaveError::Memory(MemoryError::File(error))
        | SaveError::Residue(PreCopyError::File(error)) => file_kind(error),
        SaveError::Sync { source, .. } => io_kind(source),
        SaveError::GuestEnded => Kind::Precondition,
        _ => Kind::Internal,
    }
}

fn pre_copy_kind(error: &JobError) -> Kind {
    match error {
        JobError::File(error) | JobError::Copy(PreCopyError::File(error)) => file_kind(error),
        JobError::Create(error) => save_kind(error),
        JobError::Log(source) | JobError::Thread(source) => io_kind(source),
        JobError::CannotConverge { .. } | JobError::NoSave => Kind::Precondition,
        JobError::Aborted => Kind::Aborted,
        JobError::Copy(_) | JobError::Kvm(_) => Kind::Internal,
    }
}
