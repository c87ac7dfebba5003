//! Answering page faults: a thread that asks for a missing page waits until it is here.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bellwether_statefile::{AlignedBuf, CHUNK_SIZE, PAGE_SIZE};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::loader::{Claim, Loader, Sink};
use crate::restore::LoadError;
use crate::userfault::Userfaultfd;

/// Serves faults until the load is complete; after a failure, for ever (the process ends it).
pub(crate) fn serve(loader: &Loader) {
    let Sink::Userfault(userfaultfd) = &loader.sink else { return };
    let mut buffer = AlignedBuf::new(CHUNK_SIZE as usize);
    loop {
        match wait(loader, userfaultfd) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return fail(loader, "waiting for page faults", error.into()),
        }
        match userfaultfd.read_fault() {
            Ok(Some(address)) => serve_one(loader, userfaultfd, address, &mut buffer),
            // Another thread was faster.
            Ok(None) => {}
            Err(error) => return fail(loader, "reading page faults", error),
        }
    }
}

/// Waits for faults; false when the load has ended.
fn wait(loader: &Loader, userfaultfd: &Userfaultfd) -> Result<bool, Errno> {
    let (faults, ended) = (userfaultfd.as_fd(), loader.ended.as_fd());
    let mut fds = [
        PollFd::from_borrowed_fd(faults, PollFlags::IN),
        PollFd::from_borrowed_fd(ended, PollFlags::IN),
    ];
    loop {
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(fds[1].revents().is_empty()),
        }
    }
}

fn serve_one(loader: &Loader, fd: &Userfaultfd, address: usize, buffer: &mut AlignedBuf) {
    let started = Instant::now();
    let page = address & !(PAGE_SIZE as usize - 1);
    let Some((chunk, offset)) = chunk_of(loader, page) else {
        let source = std::io::Error::other(format!("address {address:#x} is not guest memory"));
        return fail(loader, "locating a page fault", source);
    };
    let present =
        loader.file.present(chunk).is_some_and(|pages| pages >> (offset / PAGE_SIZE) & 1 == 1);
    if !present {
        loader.faults_zero.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = fd.zero_page(page) {
            fail(loader, "UFFDIO_ZEROPAGE", error);
        }
        return;
    }
    match loader.claim(chunk) {
        Claim::Ours => {
            loader.urgently(|| {
                loader.load(chunk, 1, buffer);
            });
            let micros = started.elapsed().as_micros() as u64;
            loader.faults_loaded.fetch_add(1, Ordering::Relaxed);
            loader.fault_micros_max.fetch_max(micros, Ordering::Relaxed);
        }
        // The page came between the fault and its message.
        Claim::Loaded => {
            if let Err(error) = fd.wake(page, PAGE_SIZE as usize) {
                fail(loader, "UFFDIO_WAKE", error);
            }
        }
        // Who loads it wakes its users; of a damaged chunk nobody is ever woken.
        Claim::Theirs | Claim::Failed => {}
    }
}

/// The chunk of a host address, and the offset in it.
fn chunk_of(loader: &Loader, address: usize) -> Option<(u64, u64)> {
    let inside =
        |host: usize, length: u64| address.checked_sub(host).is_some_and(|o| (o as u64) < length);
    let region = loader.ram.mapped().iter().position(|r| inside(r.host, r.guest.length))?;
    let offset = (address - loader.ram.host_address(region)?) as u64;
    Some((loader.file.layout().chunk_at(region, offset)?, offset % CHUNK_SIZE))
}

fn fail(loader: &Loader, operation: &'static str, source: std::io::Error) {
    loader.fail(LoadError::Userfault { operation, source });
}
