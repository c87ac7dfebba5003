//! Getting a vCPU out of the guest from another thread.
//!
//! The kicker sets `immediate_exit` in the vCPU's shared page and then sends a signal. Wherever the
//! vCPU thread is at that instant, it leaves `KVM_RUN` or does not enter it: the flag covers the
//! way in, the signal the time inside. The signal's handler therefore does nothing.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

const PAGE_BYTES: usize = 4096;

/// A mapping of our own of one vCPU's `kvm_run` page, shared between threads.
///
/// It lives independently of the descriptor, so that a kick can never meet an unmapped page.
pub struct RunPage {
    page: NonNull<kvm_run>,
}

// SAFETY: the mapping belongs to no thread; the accesses below are atomic or volatile.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the first page of `vcpu`, which holds all of `kvm_run` but the I/O data.
    pub(super) fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free address, and nobody else knows it.
        let page = unsafe {
            rustix::mm::mmap(ptr::null_mut(), PAGE_BYTES, prot, MapFlags::SHARED, fd, 0)
        }?;
        let page = NonNull::new(page.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { page })
    }

    /// Asks the vCPU to leave, or to not enter, `KVM_RUN`.
    pub fn set_immediate_exit(&self, exit: bool) {
        // SAFETY: the field lies in the mapped page, and a byte is always aligned.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) };
        flag.store(u8::from(exit), Ordering::SeqCst);
    }

    /// The size of one element of the port access that the last exit was about.
    pub(super) fn io_element_size(&self) -> usize {
        // SAFETY: the page is mapped; the kernel writes it only inside KVM_RUN on this thread.
        let size =
            unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.io.size).read_volatile() };
        usize::from(size.max(1))
    }

    /// The suberror of the last exit, which was `KVM_EXIT_INTERNAL_ERROR`.
    pub(super) fn internal_suberror(&self) -> u32 {
        // SAFETY: as in `io_element_size`.
        unsafe {
            (&raw const (*self.page.as_ptr()).__bindgen_anon_1.internal.suberror).read_volatile()
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: this mapping was made in `map` and no reference to it outlives `self`.
        let _unmapped = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), PAGE_BYTES) };
    }
}

/// The descriptor of an eventfd, for waiting for it together with others.
pub fn borrow_event(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the empty handler; once for a process. A write beyond the limit of a file's size must
/// fail, not kill: it gets the empty handler, too.
pub fn install_handler() -> io::Result<()> {
    register_signal_handler(libc::SIGXFSZ, ignore)?;
    register_signal_handler(SIGRTMIN(), ignore).map_err(io::Error::from)
}

/// Interrupts `thread`. An error means that it has ended, which is as good.
pub fn signal<T>(thread: &JoinHandle<T>) {
    let _ended = thread.kill(SIGRTMIN());
}
