//! Being on time: a process that pets a watchdog competes with nobody.

use std::ffi::c_int;
use std::io;

/// How a process is scheduled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// SCHED_RR or SCHED_FIFO.
    RealTime,
    Other,
}

/// Takes SCHED_RR at this priority, 1 to 99. EPERM without CAP_SYS_NICE or a limit (RLIMIT_RTPRIO)
/// that allows it. Children do not inherit it.
pub fn be_on_time(priority: u8) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: c_int::from(priority) };
    // SAFETY: 0 means the caller, and `param` lives until the call has returned.
    let answer =
        unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &param) };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How this thread is scheduled.
pub fn policy() -> io::Result<Policy> {
    // SAFETY: it takes a number and touches no memory of ours.
    let answer = unsafe { libc::sched_getscheduler(0) };
    match answer & !libc::SCHED_RESET_ON_FORK {
        _ if answer < 0 => Err(io::Error::last_os_error()),
        libc::SCHED_RR | libc::SCHED_FIFO => Ok(Policy::RealTime),
        _ => Ok(Policy::Other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_what_is_read_back() {
        std::thread::spawn(|| match be_on_time(1) {
            Ok(()) => assert_eq!(policy().unwrap(), Policy::RealTime),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EPERM));
                assert_eq!(policy().unwrap(), Policy::Other);
            }
        })
        .join()
        .unwrap();
        assert_eq!(be_on_time(200).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
