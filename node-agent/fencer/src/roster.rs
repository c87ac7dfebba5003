//! The VMMs of this node, as the agent has written them down, read anew each time.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use bellwether_lease::{PAGE_BYTES, parse as parse_lease};
use rustix::fs::{CWD, Mode, OFlags, RawDir, openat};
use rustix::io::Errno;

use crate::decide::{Dependents, Vmm};
use crate::record::{self, Record};
use crate::text::Text;
use crate::victim::Victim;

/// Longer than any record: two hashes of 32 numbers, and some more.
const RECORD_MAX: usize = 4096;
/// How often a page is read whose writer is at work.
const PAGE_TRIES: usize = 3;

/// The directory of the VMMs, and all the memory that reading it takes.
#[derive(Debug)]
pub struct Roster {
    path: CString,
    entries: Box<[MaybeUninit<u8>]>,
    record: Box<[u8; RECORD_MAX]>,
    page: Box<[u8; PAGE_BYTES]>,
}

/// A VMM that depends on the lease and lives.
#[derive(Debug)]
pub struct Found {
    pub pid: u32,
    pub vmm: Vmm,
    pub victim: Victim,
}

impl Roster {
    /// Of a runtime directory.
    pub fn new(runtime: &Path) -> std::io::Result<Self> {
        let path = runtime.join("vms");
        Ok(Self {
            path: CString::new(path.as_os_str().as_bytes())?,
            entries: vec![MaybeUninit::uninit(); 32 << 10].into_boxed_slice(),
            record: Box::new([0; RECORD_MAX]),
            page: Box::new([0; PAGE_BYTES]),
        })
    }

    /// Looks at all VMMs. `each` sees those under the lease arbiter that may have let a guest run and
    /// whose process is not gone, and says who of them depends on the lease.
    pub fn scan(&mut self, mut each: impl FnMut(&Found) -> Dependents) -> Dependents {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(directory) = openat(CWD, self.path.as_c_str(), flags, Mode::empty()) else {
            return Dependents::Unknown;
        };
        let Self { entries, record, page, .. } = self;
        let mut dependents = Dependents::None;
        let mut listing = RawDir::new(&directory, entries);
        while let Some(entry) = listing.next() {
            let Ok(entry) = entry else { return Dependents::Unknown };
            let name = entry.file_name();
            if name.to_bytes().starts_with(b".") {
                continue;
            }
            let reader = Reader { directory: &directory, name };
            dependents = dependents.and(match reader.look(record, page) {
                Ok(Some(found)) => each(&found),
                Ok(None) => Dependents::None,
                Err(_) => Dependents::Unknown,
            });
        }
        dependents
    }
}

/// One entry of the directory.
struct Reader<'a> {
    directory: &'a OwnedFd,
    name: &'a CStr,
}

impl Reader<'_> {
    fn look(
        &self,
        record: &mut [u8; RECORD_MAX],
        page: &mut [u8; PAGE_BYTES],
    ) -> Result<Option<Found>, Errno> {
        let Some(bytes) = self.read("incarnation.json", record)? else {
            // It has never been started, or has just been removed.
            return Ok(None);
        };
        let Record { process, lease, may_have_run } = record::parse(bytes).ok_or(Errno::INVAL)?;
        if !lease || !may_have_run {
            return Ok(None);
        }
        // The agent notes the process before it sends a start.
        let (pid, started) = process.ok_or(Errno::INVAL)?;
        let Some(victim) = Victim::find(pid, started)? else { return Ok(None) };
        Ok(Some(Found { pid, vmm: self.lease(page), victim }))
    }

    /// A page that nobody can read says nothing in favour of its VMM.
    fn lease(&self, page: &mut [u8; PAGE_BYTES]) -> Vmm {
        for _ in 0..PAGE_TRIES {
            let whole =
                matches!(self.read("lease", page), Ok(Some(bytes)) if bytes.len() == PAGE_BYTES);
            if let Some((lease, held)) = parse_lease(page).filter(|_| whole) {
                return Vmm { deadline_ns: Some(lease.deadline_ns), held };
            }
        }
        Vmm { deadline_ns: None, held: false }
    }

    /// A file of this VMM; `None` if it is not there.
    fn read<'b>(&self, file: &str, into: &'b mut [u8]) -> Result<Option<&'b [u8]>, Errno> {
        let name = self.name.to_str().map_err(|_| Errno::ILSEQ)?;
        let path = Text::<160>::new(format_args!("{name}/{file}"));
        let path = path.as_c_str().ok_or(Errno::NAMETOOLONG)?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match openat(self.directory, path, flags, Mode::empty()) {
            Ok(file) => read_all(&file, into).map(Some),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Reads to the end, or until `into` is full.
fn read_all<'b>(file: &OwnedFd, into: &'b mut [u8]) -> Result<&'b [u8], Errno> {
    let mut length = 0;
    while length < into.len() {
        match rustix::io::read(file, &mut into[length..])? {
            0 => break,
            count => length += count,
        }
    }
    Ok(&into[..length])
}
