//! userfaultfd: the kernel asks us for missing pages (`userfaultfd(2)`, `ioctl_userfaultfd(2)`).
//!
//! The descriptor serves faults of the kernel as well (KVM, and system calls on guest memory), so
//! it needs `/dev/userfaultfd` or, for the system call, `CAP_SYS_PTRACE`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl;

/// `_IO(0xAA, 0x00)` on `/dev/userfaultfd`: gives a userfaultfd; the argument is its flags.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
/// How often a page is offered again that the kernel cannot take at the moment.
const RETRIES_MAX: u32 = 10_000;
const PAGE: usize = 4096;

/// An initialised userfaultfd that can serve missing pages of shared memory.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Userfaultfd {
    /// Opens and initialises one. A jailed VMM does this before it enters the jail.
    pub fn open() -> io::Result<Self> {
        let fd = open_device().or_else(|_| open_syscall())?;
        let this = Self { fd };
        let mut api = sys::uffdio_api {
            api: u64::from(sys::UFFD_API),
            features: u64::from(sys::UFFD_FEATURE_MISSING_SHMEM),
            ioctls: 0,
        };
        // SAFETY: the ioctl reads and writes one uffdio_api, which `api` is.
        unsafe { this.ioctl(ioctl::UFFDIO_API, &mut api) }?;
        Ok(this)
    }

    /// From now on a missing page in this range makes its user wait for us.
    ///
    /// The range must be guest memory mapped by [`crate::GuestRam`], whole pages.
    pub(crate) fn register(&self, start: usize, length: usize) -> io::Result<()> {
        let mut register = sys::uffdio_register {
            range: range(start, length),
            mode: u64::from(sys::UFFDIO_REGISTER_MODE_MISSING),
            ioctls: 0,
        };
        // SAFETY: the ioctl reads and writes one uffdio_register; it changes no memory, only who
        // answers for pages that are not there.
        unsafe { self.ioctl(ioctl::UFFDIO_REGISTER, &mut register) }?;
        let needed = 1u64 << sys::_UFFDIO_COPY | 1 << sys::_UFFDIO_ZEROPAGE;
        if register.ioctls & needed == needed {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, "no UFFDIO_COPY or UFFDIO_ZEROPAGE"))
    }

    /// Missing pages of the range are the kernel's again; whoever waits is woken.
    pub(crate) fn unregister(&self, start: usize, length: usize) -> io::Result<()> {
        // SAFETY: the ioctl reads one uffdio_range and changes no memory.
        unsafe { self.ioctl(ioctl::UFFDIO_UNREGISTER, &mut range(start, length)) }
    }

    /// Wakes whoever waits for a page of the range; a page still missing makes them wait again.
    pub(crate) fn wake(&self, start: usize, length: usize) -> io::Result<()> {
        // SAFETY: the ioctl reads one uffdio_range and changes no memory.
        unsafe { self.ioctl(ioctl::UFFDIO_WAKE, &mut range(start, length)) }
    }

    /// Puts pages into the range and wakes their users. Pages that are there already stay as they
    /// are. `start` is guest memory that is registered; the bytes are whole pages.
    pub(crate) fn copy(&self, start: usize, bytes: &[u8]) -> io::Result<()> {
        let (mut done, mut retries) = (0, 0);
        while done < bytes.len() {
            let rest = &bytes[done..];
            let mut copy = sys::uffdio_copy {
                dst: (start + done) as u64,
                src: rest.as_ptr().expose_provenance() as u64,
                len: rest.len() as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the ioctl reads and writes one uffdio_copy; the kernel reads `rest`, and
            // fills only pages of registered guest memory that are missing, which nobody can have
            // seen; it refuses any other address.
            let outcome = unsafe { self.ioctl(ioctl::UFFDIO_COPY, &mut copy) };
            done += step(outcome, copy.copy, rest.len(), &mut retries)?;
        }
        Ok(())
    }

    /// Fills a missing page with zeros and wakes its users.
    pub(crate) fn zero_page(&self, start: usize) -> io::Result<()> {
        let mut retries = 0;
        loop {
            let mut zero = sys::uffdio_zeropage { range: range(start, PAGE), mode: 0, zeropage: 0 };
            // SAFETY: the ioctl reads and writes one uffdio_zeropage; the kernel fills only a page
            // of registered guest memory that is missing.
            let outcome = unsafe { self.ioctl(ioctl::UFFDIO_ZEROPAGE, &mut zero) };
            match outcome {
                // The page came meanwhile, or the load ended and the range is the kernel's again.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST)) => {
                    return self.wake(start, PAGE);
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
                outcome => {
                    if step(outcome, zero.zeropage, PAGE, &mut retries)? > 0 {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// The address that somebody waits for, once; none if nobody does. One at a time, so that
    /// several fault threads share what several vCPUs wait for.
    pub(crate) fn read_fault(&self) -> io::Result<Option<usize>> {
        let mut buffer = [0u8; MESSAGE];
        let count = match rustix::io::read(&self.fd, &mut buffer) {
            Ok(count) => count,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        Ok(fault_address(&buffer[..count]))
    }

    /// One ioctl on the descriptor.
    ///
    /// # Safety
    /// `argument` must be what the request takes, and the effect on memory must be sound.
    unsafe fn ioctl<T>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        let request = libc::c_ulong::from(request);
        // SAFETY: the descriptor is open, the argument is a valid, exclusive reference; the caller
        // answers for its type and the effect.
        let outcome = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) };
        if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// The size of `struct uffd_msg`: event (1 byte), reserved (7), page fault flags (8), address (8),
/// the rest of the union (8).
const MESSAGE: usize = size_of::<sys::uffd_msg>();

fn fault_address(message: &[u8]) -> Option<usize> {
    let address = message.get(16..24)?.try_into().ok()?;
    let fault = u32::from(*message.first()?) == sys::UFFD_EVENT_PAGEFAULT;
    fault.then(|| u64::from_ne_bytes(address) as usize)
}

fn range(start: usize, length: usize) -> sys::uffdio_range {
    sys::uffdio_range { start: start as u64, len: length as u64 }
}

/// The progress of a copy: what it did, one page if that was there already, or nothing if the
/// kernel asks us to repeat it.
fn step(outcome: io::Result<()>, done: i64, length: usize, retries: &mut u32) -> io::Result<usize> {
    let Err(error) = outcome else { return Ok(length) };
    match error.raw_os_error() {
        Some(libc::EEXIST) => Ok(PAGE.min(length)),
        Some(libc::EAGAIN) if done > 0 => Ok(done as usize),
        Some(libc::EAGAIN | libc::EINTR) if *retries < RETRIES_MAX => {
            *retries += 1;
            std::thread::yield_now();
            Ok(0)
        }
        _ => Err(error),
    }
}

fn open_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the request takes flags by value and gives a new descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    owned(fd)
}

fn open_syscall() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the system call takes flags by value and gives a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    owned(fd as RawFd)
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
