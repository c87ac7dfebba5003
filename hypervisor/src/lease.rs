//! The VMM's own enforcement of its leave to run: the lease's deadline and the epoch.
//!
//! A thread sleeps on an absolute CLOCK_BOOTTIME timer until the deadline, and each disk submission
//! asks [`LeaseGuard::permits`]; neither needs the agent, the driver or the network.
//!
//! What the page means is decided by [`judge`]: an expired lease holds the guest (`lease`) until a new
//! grant, a higher epoch than ours holds it for good (`superseded`).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

pub use bellwether_lease::{Arbiter, Verdict, judge};
use bellwether_lease::{LeasePage, LeaseView};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::clock;
use crate::gate::{Gate, Hold};

/// How often the page is looked at while there is no leave, for a grant that comes late.
const EXPIRED_POLL: Duration = Duration::from_millis(20);
/// How often it is looked at for a higher epoch while no deadline is ahead.
const EPOCH_POLL: Duration = Duration::from_millis(200);

/// The leave of one VMM.
pub struct LeaseGuard {
    arbiter: Arbiter,
    page: Option<LeasePage>,
    /// The epoch whose locks we hold; 0 before.
    epoch: AtomicU64,
    gate: Arc<Gate>,
    nudge: OwnedFd,
    /// Taken to change what the page says of the guest, and to let it go on.
    telling: Mutex<()>,
    /// Tells the driver that the locks are to be let go, or taken back.
    changed: Changed,
    /// It has been told, and has not looked yet.
    is_told: AtomicBool,
}

/// Wakes the owner of the locks.
pub type Changed = Box<dyn Fn() + Send + Sync>;

impl LeaseGuard {
    /// Starts the enforcement. Without a page only `Arbiter::Storage` and `Arbiter::None` make sense.
    pub fn start(
        arbiter: Arbiter,
        page: Option<LeasePage>,
        gate: Arc<Gate>,
        changed: Changed,
    ) -> io::Result<Arc<Self>> {
        let nudge = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let has_page = page.is_some();
        let epoch = AtomicU64::new(0);
        let (telling, is_told) = (Mutex::default(), AtomicBool::new(false));
        let guard = Self { arbiter, page, epoch, gate, nudge, telling, changed, is_told };
        let guard = Arc::new(guard);
        if has_page {
            let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC)?;
            let (watcher, permit) = (Arc::clone(&guard), Arc::clone(&guard));
            thread::Builder::new().name("lease".into()).spawn(move || watcher.watch(&timer))?;
            guard.gate.set_permit(Box::new(move || permit.permits()));
        }
        Ok(guard)
    }

    /// Sets the epoch of the locks, and judges anew before it returns.
    pub fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::SeqCst);
        self.enforce();
        self.wake();
    }

    /// The owner of the locks looks at the lease now; what changes later is told anew.
    pub fn heard(&self) {
        self.is_told.store(false, Ordering::SeqCst);
    }

    fn tell_owner(&self) {
        if !self.is_told.swap(true, Ordering::SeqCst) {
            (self.changed)();
        }
    }

    /// The deadline that the page shows, or 0.
    pub fn deadline_ns(&self) -> u64 {
        self.view().map_or(0, |view| view.deadline_ns)
    }

    /// Whether a disk may be touched now. If not, the guest is held as well.
    fn permits(&self) -> bool {
        let permitted = matches!(self.judge(), Verdict::Valid { .. });
        if !permitted {
            self.enforce();
            // The thread may have looked at the page before this hold: it must look again.
            self.wake();
        }
        permitted
    }

    fn judge(&self) -> Verdict {
        judge(self.arbiter, self.epoch.load(Ordering::SeqCst), self.view(), clock::boottime_ns())
    }

    fn view(&self) -> Option<LeaseView> {
        self.page.as_ref().and_then(|page| page.read().ok())
    }

    /// Sets and releases the holds that are ours.
    fn enforce(&self) -> Verdict {
        let verdict = self.judge();
        for (reason, held) in [
            (Hold::Lease, verdict == Verdict::Expired),
            (Hold::Superseded, verdict == Verdict::Superseded),
        ] {
            self.set_hold(reason, held);
        }
        verdict
    }

    fn set_hold(&self, reason: Hold, held: bool) {
        if held == self.gate.is_held(reason) {
            return;
        }
        let epoch = self.epoch.load(Ordering::SeqCst);
        if held {
            self.gate.hold(reason);
            tracing::warn!(epoch, ?reason, deadline_ns = self.deadline_ns(), "the guest is held");
        } else {
            let _telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
            self.tell(false);
            self.gate.release(reason);
            tracing::info!(epoch, ?reason, deadline_ns = self.deadline_ns(), "the guest goes on");
        }
    }

    /// Tells the fencer that there is nothing to kill: no vCPU is in the guest and no disk has a
    /// request outstanding, and neither begins again before this has been taken back.
    fn tell_if_stopped(&self) {
        let _telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        if self.gate.is_held(Hold::Lease) && self.gate.is_still() {
            self.tell(true);
            if !self.gate.is_held(Hold::NotStarted) && !self.gate.is_held(Hold::Unlocked) {
                self.tell_owner();
            }
        }
    }

    fn tell(&self, held: bool) {
        let Some(page) = self.page.as_ref().filter(|_| self.arbiter == Arbiter::Lease) else {
            return;
        };
        if let Err(error) = page.set_held(held) {
            tracing::error!(%error, held, "the fencer cannot be told; it may kill this VMM");
        }
    }

    fn wake(&self) {
        // A full counter has woken it already.
        let _woken = rustix::io::write(&self.nudge, &1u64.to_ne_bytes());
    }

    fn watch(&self, timer: &OwnedFd) {
        loop {
            let verdict = self.enforce();
            if verdict == Verdict::Expired {
                self.tell_if_stopped();
            }
            let wake_at = match verdict {
                Verdict::Valid { until_ns: Some(deadline) }
                    if self.gate.is_held(Hold::Unlocked) =>
                {
                    self.tell_owner();
                    deadline.min(clock::boottime_ns() + EPOCH_POLL.as_nanos() as u64)
                }
                Verdict::Valid { until_ns: Some(deadline) } => deadline,
                Verdict::Valid { until_ns: None } => {
                    clock::boottime_ns() + EPOCH_POLL.as_nanos() as u64
                }
                _ => clock::boottime_ns() + EXPIRED_POLL.as_nanos() as u64,
            };
            if let Err(error) = self.sleep(timer, wake_at) {
                // Without a timer nobody would end an expired lease.
                tracing::error!(%error, "the lease timer failed; the guest is held for good");
                self.gate.hold(Hold::Lease);
                return;
            }
        }
    }

    fn sleep(&self, timer: &OwnedFd, wake_at_ns: u64) -> io::Result<()> {
        let it_value = Timespec {
            tv_sec: (wake_at_ns / 1_000_000_000) as i64,
            tv_nsec: (wake_at_ns % 1_000_000_000) as i64,
        };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = Itimerspec { it_interval: zero, it_value };
        timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &spec)?;
        let (timer, nudge) = (timer.as_fd(), self.nudge.as_fd());
        let mut fds = [PollFd::new(&timer, PollFlags::IN), PollFd::new(&nudge, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut count = [0; 8];
        let _drained = rustix::io::read(nudge, &mut count);
        Ok(())
    }
}
