//! A running fencer: everything is made ready once, and then it steps, without allocating.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bellwether_fencer_kernel::{Policy, be_on_time, policy};
use bellwether_lease::{LeaseError, LeasePage};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

use crate::config::FencerConfig;
use crate::control::Control;
use crate::decide::{Dependents, Grant, Petting, Verdict, grant, petting, verdict};
use crate::device::{Watchdog, WatchdogError};
use crate::facts::Facts;
use crate::journal::{Level, log};
use crate::record::start_ticks;
use crate::roster::{Found, Roster};

/// The grant page's name in the fencer's directory.
pub const GRANT_FILE: &str = "grant";
/// So many killed VMMs are remembered, so that each is logged once.
const KILLED_MAX: usize = 64;

/// Why a fencer does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum FencerError {
    #[error("{operation} `{}`: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("another fencer runs on `{}`", path.display())]
    InUse { path: PathBuf },
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Watchdog(#[from] WatchdogError),
    #[error("wait for the next step: {0}")]
    Wait(io::Error),
}

/// How punctual this process is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Punctual {
    pub realtime: bool,
    pub locked: bool,
}

/// Locks this process into memory and takes a real-time priority, or says what it goes without.
pub fn make_punctual(priority: u8) -> Punctual {
    let locked = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    if let Err(error) = locked {
        log(
            Level::Warn,
            format_args!(
                "cannot be locked into memory ({error}): this node yields no fence proof by watchdog; give it CAP_IPC_LOCK"
            ),
        );
    }
    if let Err(error) = be_on_time(priority) {
        log(
            Level::Warn,
            format_args!(
                "cannot be scheduled in real time ({error}): this node yields no fence proof by watchdog; give it CAP_SYS_NICE"
            ),
        );
    }
    Punctual { realtime: matches!(policy(), Ok(Policy::RealTime)), locked: locked.is_ok() }
}

/// CLOCK_BOOTTIME, nanoseconds.
fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

/// The fencer of one node.
#[derive(Debug)]
pub struct Fencer {
    directory: PathBuf,
    grants: LeasePage,
    roster: Roster,
    watchdog: Option<Watchdog>,
    control: Control,
    timer: OwnedFd,
    pet_ns: u64,
    stop_ns: u64,
    seen: Seen,
    _lock: File,
}

/// What was logged last, so that changes are logged and nothing else.
#[derive(Debug)]
struct Seen {
    petting: Option<Petting>,
    grant: Option<Grant>,
    killed: [u32; KILLED_MAX],
    next: usize,
    pet_failed: bool,
}

impl Seen {
    const NOTHING: Self =
        Self { petting: None, grant: None, killed: [0; KILLED_MAX], next: 0, pet_failed: false };
}

impl Fencer {
    /// Makes everything ready but the watchdog, which [`Self::arm`] adds last.
    pub fn prepare(config: &FencerConfig) -> Result<Self, FencerError> {
        let directory = config.directory();
        for path in [&config.runtime_dir.join("vms"), &directory] {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.map_err(at("create", path))?;
        }
        let lock = take_lock(&directory)?;
        let control = Control::create(&directory).map_err(at("make a FIFO in", &directory))?;
        let roster = Roster::new(&config.runtime_dir).map_err(at("read", &config.runtime_dir))?;
        Ok(Self {
            grants: grant_page(&directory.join(GRANT_FILE))?,
            roster,
            watchdog: None,
            control,
            timer: ticking(config.tick()).map_err(FencerError::Wait)?,
            pet_ns: config.pet_ms.saturating_mul(1_000_000),
            stop_ns: config.stop_ms.saturating_mul(1_000_000),
            seen: Seen::NOTHING,
            directory,
            _lock: lock,
        })
    }

    /// From now on the host is reset if this process does not pet.
    pub fn arm(&mut self, watchdog: Watchdog) {
        let facts = watchdog.facts();
        log(
            Level::Info,
            format_args!(
                "armed: device={} identity=\"{}\" period_ms={} hardware={} nowayout={:?}",
                facts.device.display(),
                facts.identity,
                facts.timeout_ms,
                facts.hardware,
                facts.nowayout
            ),
        );
        self.watchdog = Some(watchdog);
    }

    /// Tells the agent.
    pub fn publish(&self, config: &FencerConfig, punctual: Punctual) -> Result<(), FencerError> {
        let stat = std::fs::read("/proc/self/stat").unwrap_or_default();
        let facts = Facts {
            pid: std::process::id(),
            start_ticks: start_ticks(&stat).unwrap_or_default(),
            watchdog: self.watchdog.as_ref().map(|watchdog| watchdog.facts().clone()),
            pet_ms: config.pet_ms,
            stop_ms: config.stop_ms,
            realtime: punctual.realtime,
            locked: punctual.locked,
        };
        facts.write(&self.directory).map_err(at("write facts into", &self.directory))
    }

    /// Steps until it is asked to disarm and may.
    pub fn run(mut self) -> Result<(), FencerError> {
        loop {
            self.step();
            if self.wait()? && self.disarm() {
                return Ok(());
            }
        }
    }

    /// One look at everything, with what follows from it. Allocates nothing.
    pub fn step(&mut self) {
        let now = now_ns();
        let page = self.grants.view();
        let grant = grant(page.map(|view| view.deadline_ns), now, self.pet_ns);
        // A fresh grant needs no look at the VMMs, and should not wait for one.
        let petted_before = grant == Grant::Fresh;
        if petted_before {
            self.pet(page.map_or(0, |view| view.deadline_ns));
        }
        let dependents = self.look(now);
        let petting = petting(grant, dependents);
        if petting == Petting::NobodyDepends && !petted_before {
            self.pet(u64::MAX);
        }
        self.report(grant, petting, dependents);
    }

    /// Looks at all VMMs, and ends those that are overdue.
    fn look(&mut self, now: u64) -> Dependents {
        let (seen, stop_ns) = (&mut self.seen, self.stop_ns);
        self.roster.scan(|found| {
            let verdict = verdict(found.vmm, now, stop_ns);
            if verdict == Verdict::Kill {
                kill(found, seen);
            }
            verdict.dependents()
        })
    }

    fn pet(&mut self, deadline_ns: u64) {
        let Some(watchdog) = &self.watchdog else { return };
        let failed = watchdog.pet().err();
        if let Some(error) = failed.filter(|_| !self.seen.pet_failed) {
            log(
                Level::Error,
                format_args!("cannot pet the watchdog ({error}): the host will be reset"),
            );
        }
        self.seen.pet_failed = failed.is_some();
        // Between the look at the clock and the write anything may have passed: the host was frozen.
        let late_ns = now_ns().saturating_sub(deadline_ns);
        if late_ns > 0 {
            let late_ms = late_ns / 1_000_000;
            log(
                Level::Error,
                format_args!(
                    "petted {late_ms} ms after the grant had ended: was this host frozen?"
                ),
            );
        }
    }

    fn report(&mut self, grant: Grant, petting: Petting, dependents: Dependents) {
        let changed = self.seen.petting != Some(petting) || self.seen.grant != Some(grant);
        (self.seen.petting, self.seen.grant) = (Some(petting), Some(grant));
        if !changed {
            return;
        }
        let armed = self.watchdog.is_some();
        let level = match petting {
            Petting::Held if armed => Level::Error,
            Petting::Held => Level::Warn,
            Petting::Granted | Petting::NobodyDepends => Level::Info,
        };
        let outlook = match (petting, armed) {
            (Petting::Held, true) => "; the host is reset at the end of the watchdog's period",
            _ => "",
        };
        log(
            level,
            format_args!(
                "grant={grant:?} dependents={dependents:?} petting={petting:?} armed={armed}{outlook}"
            ),
        );
    }

    /// Waits for the next tick; true when somebody asks to disarm.
    fn wait(&self) -> Result<bool, FencerError> {
        let mut fds = [
            PollFd::new(&self.timer, PollFlags::IN),
            PollFd::new(self.control.fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(FencerError::Wait(error.into())),
        }
        let mut ticks = [0; 8];
        let _drained = rustix::io::read(&self.timer, &mut ticks);
        Ok(self.control.wants_disarm())
    }

    /// Disarms the watchdog, unless something on this host depends on it; false if it did not.
    pub fn disarm(&mut self) -> bool {
        let refused = match self.look(now_ns()) {
            Dependents::None => self.withdraw().err(),
            dependents => {
                log(Level::Warn, format_args!("not disarmed: dependents={dependents:?}"));
                return false;
            }
        };
        match &refused {
            None => log(Level::Info, format_args!("ends; no watchdog is armed")),
            Some(error) => log(Level::Error, format_args!("not disarmed: {error}")),
        }
        refused.is_none()
    }

    /// Nobody may believe in the watchdog any more when it is disarmed: first the facts go.
    fn withdraw(&mut self) -> Result<(), FencerError> {
        if let Some(watchdog) = &self.watchdog {
            watchdog.may_disarm()?;
        }
        Facts::remove(&self.directory).map_err(at("remove facts from", &self.directory))?;
        if let Some(watchdog) = &self.watchdog {
            watchdog.disarm()?;
        }
        // Closing it is the other half.
        self.watchdog = None;
        Ok(())
    }
}

fn kill(found: &Found, seen: &mut Seen) {
    let killed = found.victim.kill();
    if seen.killed.contains(&found.pid) {
        return;
    }
    seen.killed[seen.next % KILLED_MAX] = found.pid;
    seen.next = seen.next.wrapping_add(1);
    let (pid, deadline_ns) = (found.pid, found.vmm.deadline_ns.unwrap_or(0));
    match killed {
        Ok(()) => log(
            Level::Error,
            format_args!("killed a VMM that did not stop: pid={pid} deadline_ns={deadline_ns}"),
        ),
        Err(error) => log(Level::Error, format_args!("cannot kill a VMM: pid={pid} error={error}")),
    }
}

/// Turns an I/O error into one that names what was done to what.
fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FencerError {
    move |source| FencerError::Io { operation, path: path.into(), source }
}

fn take_lock(directory: &Path) -> Result<File, FencerError> {
    let path = directory.join("lock");
    let lock = File::options().create(true).write(true).truncate(false).open(&path);
    let lock = lock.map_err(at("open", &path))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(FencerError::InUse { path: directory.into() }),
        Err(error) => Err(FencerError::Io { operation: "lock", path, source: error.into() }),
    }
}

/// The page that the agent writes; whoever comes first makes it.
fn grant_page(path: &Path) -> Result<LeasePage, LeaseError> {
    if !path.exists() {
        match LeasePage::create(path) {
            Err(LeaseError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
            }
            other => drop(other?),
        }
    }
    LeasePage::open(path)
}

fn ticking(tick: std::time::Duration) -> io::Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC)?;
    let every = Timespec { tv_sec: 0, tv_nsec: i64::from(tick.subsec_nanos()) };
    let spec = Itimerspec { it_interval: every, it_value: every };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec)?;
    Ok(timer)
}
