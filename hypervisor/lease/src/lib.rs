//! The shared page through which a lease deadline reaches a VMM.
//!
//! The agent maps a file of 4 KiB and writes; the VMMs of the node map it and read, without any
//! call between them, so that a VMM enforces its deadline whether its agent lives or not.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `BWLEASE\n` |
//! | 8 | 8 | version, 1 |
//! | 64 | 32 | slot 0: serial, epoch, deadline, check |
//! | 128 | 32 | slot 1: the same |
//! | 192 | 8 | held: not 0 while the VMM keeps its guest stopped, its I/O drained |
//!
//! All numbers are little-endian 64-bit words. A grant goes into the slot that does not count and
//! then counts because its serial is higher; so a writer that dies, or is preempted, in the middle
//! leaves the previous grant whole. The check word is a hash of the other three: a slot in which it
//! is wrong does not count, and a page in which neither slot counts is corrupt, which a reader must
//! treat as an expired lease.
//!
//! The VMM alone writes *held*, for the fencer, which kills a VMM that goes on after its deadline. It
//! has to be true at any moment: set after the guest has stopped, taken back before it goes on.
//!
//! Epoch 0 with deadline 0 is the page before the first grant. Deadlines are CLOCK_BOOTTIME
//! nanoseconds, so they mean nothing after a reboot: keep the file where a reboot removes it.

mod judge;
mod page;

pub use judge::{Arbiter, Grant, Verdict, grant, judge};

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use page::MappedPage;
pub use page::{PAGE_BYTES, parse};

/// What a page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LeaseView {
    /// The epoch of the VM's runner that the lease is for; 0 before the first grant.
    pub epoch: u64,
    /// Until when it may run, CLOCK_BOOTTIME nanoseconds; 0 for no leave at all.
    pub deadline_ns: u64,
}

/// Why a page cannot be used, or a grant cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("{operation} lease page {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("lease page {path} is corrupt; its lease counts as expired")]
    Corrupt { path: PathBuf },
    #[error("lease page {path} is for epoch {current}; epoch {asked} is older and gets no lease")]
    OlderEpoch { path: PathBuf, current: u64, asked: u64 },
}

/// One lease page, mapped.
#[derive(Debug)]
pub struct LeasePage {
    path: PathBuf,
    page: MappedPage,
    granting: Mutex<()>,
}

impl LeasePage {
    /// Creates the page, without a grant, for writing. It must not exist; it appears whole.
    pub fn create(path: &Path) -> Result<Self, LeaseError> {
        let failed = |operation| {
            move |source| LeaseError::Io { operation, path: path.to_path_buf(), source }
        };
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".{}.tmp", std::process::id()));
        let written = write_fresh(Path::new(&partial)).and_then(|()| fs::hard_link(&partial, path));
        let removed = fs::remove_file(&partial);
        written.and(removed).map_err(failed("create"))?;
        Self::open_for_grants(path)
    }

    /// Maps an existing page for reading.
    pub fn open(path: &Path) -> Result<Self, LeaseError> {
        Self::map(path, false)
    }

    /// Maps an existing page for writing: the agent that comes back.
    pub fn open_for_grants(path: &Path) -> Result<Self, LeaseError> {
        Self::map(path, true)
    }

    fn map(path: &Path, writable: bool) -> Result<Self, LeaseError> {
        let failed = |operation| {
            move |source| LeaseError::Io { operation, path: path.to_path_buf(), source }
        };
        let file =
            OpenOptions::new().read(true).write(writable).open(path).map_err(failed("open"))?;
        let bytes = file.metadata().map_err(failed("examine"))?.len();
        if bytes != PAGE_BYTES as u64 {
            return Err(LeaseError::Corrupt { path: path.to_path_buf() });
        }
        let page = MappedPage::map(&file, writable).map_err(failed("map"))?;
        Ok(Self { path: path.to_path_buf(), page, granting: Mutex::new(()) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the page says now.
    pub fn read(&self) -> Result<LeaseView, LeaseError> {
        self.page.read().ok_or_else(|| LeaseError::Corrupt { path: self.path.clone() })
    }

    /// The same without a word about why not; allocates nothing.
    pub fn view(&self) -> Option<LeaseView> {
        self.page.read()
    }

    /// Says for the fencer whether the guest is held. For the VMM, whose page must have been opened
    /// with [`Self::open_for_grants`].
    pub fn set_held(&self, held: bool) -> Result<(), LeaseError> {
        match self.page.set_held(held) {
            true => Ok(()),
            false => Err(LeaseError::Io {
                operation: "write",
                path: self.path.clone(),
                source: io::ErrorKind::PermissionDenied.into(),
            }),
        }
    }

    /// Grants `epoch` leave until `deadline_ns`. Within an epoch the deadline never moves backwards:
    /// an earlier one changes nothing. Returns what the page says afterwards.
    ///
    /// There is one writer; threads of one process may share it. The page must have been opened for
    /// grants.
    pub fn grant(&self, epoch: u64, deadline_ns: u64) -> Result<LeaseView, LeaseError> {
        let _one_at_a_time = self.granting.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.read()?;
        let view = match grant(current, epoch, deadline_ns) {
            Grant::Write(view) => view,
            Grant::Keep => return Ok(current),
            Grant::OlderEpoch => {
                let (current, path) = (current.epoch, self.path.clone());
                return Err(LeaseError::OlderEpoch { path, current, asked: epoch });
            }
        };
        if !self.page.write(view) {
            let source = io::ErrorKind::PermissionDenied.into();
            return Err(LeaseError::Io { operation: "write", path: self.path.clone(), source });
        }
        Ok(view)
    }
}

fn write_fresh(path: &Path) -> io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&page::fresh())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    fn page() -> (tempfile::TempDir, LeasePage) {
        let directory = tempfile::tempdir().unwrap();
        let page = LeasePage::create(&directory.path().join("lease")).unwrap();
        (directory, page)
    }

    #[test]
    fn a_reader_sees_each_grant() {
        let (_directory, writer) = page();
        let reader = LeasePage::open(writer.path()).unwrap();
        assert_eq!(reader.read().unwrap(), LeaseView::default());
        for deadline_ns in [100, 200] {
            writer.grant(3, deadline_ns).unwrap();
            assert_eq!(reader.read().unwrap(), LeaseView { epoch: 3, deadline_ns });
        }
        assert!(reader.grant(4, 300).is_err(), "a reader cannot grant");
    }

    #[test]
    fn an_agent_that_comes_back_goes_on_where_it_was() {
        let (_directory, writer) = page();
        writer.grant(3, 100).unwrap();
        assert!(LeasePage::create(writer.path()).is_err(), "an existing page is not replaced");
        let again = LeasePage::open_for_grants(writer.path()).unwrap();
        assert_eq!(again.grant(3, 50).unwrap().deadline_ns, 100);
        assert!(matches!(again.grant(2, 500), Err(LeaseError::OlderEpoch { current: 3, .. })));
    }

    #[test]
    fn a_torn_grant_leaves_the_previous_one() {
        let (_directory, writer) = page();
        writer.grant(1, 100).unwrap();
        writer.grant(1, 200).unwrap();
        let file = File::options().write(true).open(writer.path()).unwrap();
        let newest = [64u64, 128].into_iter().find(|&slot| {
            let mut serial = [0; 8];
            File::open(writer.path()).unwrap().read_exact_at(&mut serial, slot).unwrap();
            u64::from_le_bytes(serial) == 3
        });
        file.write_all_at(&[0xff; 8], newest.unwrap() + 16).unwrap();
        assert_eq!(writer.read().unwrap().deadline_ns, 100);
    }

    #[test]
    fn a_copy_of_the_bytes_says_the_same() {
        let (_directory, writer) = page();
        let copy = || parse(&fs::read(writer.path()).unwrap().try_into().unwrap());
        assert_eq!(copy(), Some((LeaseView::default(), false)));
        writer.grant(3, 100).unwrap();
        writer.set_held(true).unwrap();
        writer.grant(3, 200).unwrap();
        assert_eq!(copy(), Some((LeaseView { epoch: 3, deadline_ns: 200 }, true)));
        writer.set_held(false).unwrap();
        assert_eq!(copy(), Some((writer.view().unwrap(), false)));
        assert!(LeasePage::open(writer.path()).unwrap().set_held(true).is_err());
        assert_eq!(parse(&[0; PAGE_BYTES]), None);
    }

    #[test]
    fn a_corrupt_page_says_so() {
        let (directory, writer) = page();
        let file = File::options().write(true).open(writer.path()).unwrap();
        file.write_all_at(b"X", 0).unwrap();
        assert!(matches!(writer.read(), Err(LeaseError::Corrupt { .. })));
        let short = directory.path().join("short");
        fs::write(&short, b"BWLEASE\n").unwrap();
        assert!(matches!(LeasePage::open(&short), Err(LeaseError::Corrupt { .. })));
    }

    proptest! {
        #[test]
        fn grants_never_move_backwards(grants in proptest::collection::vec((0u64..4, 0u64..1000), 1..40)) {
            let (_directory, writer) = page();
            let mut last = LeaseView::default();
            for (epoch, deadline) in grants {
                let _refused = writer.grant(epoch, deadline);
                let now = writer.read().unwrap();
                prop_assert!((now.epoch, now.deadline_ns) >= (last.epoch, last.deadline_ns));
                last = now;
            }
        }
    }
}
