//! What guests printed, with the lab's time: which incarnation ran when, and which records of
//! their journals they were told to be on the disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::timeline::Timeline;

#[derive(Clone, Default)]
pub struct Watch {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    vms: Mutex<BTreeMap<String, Vm>>,
    changed: Condvar,
}

/// All that was heard of one VM.
#[derive(Clone, Default, Debug)]
pub struct Vm {
    /// By host and epoch.
    pub incarnations: BTreeMap<(String, u64), Incarnation>,
    /// The newest record that a guest said was acknowledged.
    pub acknowledged: u64,
    /// Lines that begin with FATAL.
    pub fatal: Vec<String>,
    /// Lines about failed requests.
    pub io_errors: u64,
    last_tick: Option<Duration>,
    /// The longest time between two ticks, whoever printed them, and when it ended.
    pub longest_silence: Duration,
    pub silence_ended: Duration,
}

#[derive(Clone, Default, Debug)]
pub struct Incarnation {
    pub first_heard: Duration,
    pub last_heard: Duration,
    pub first_tick: Option<Duration>,
    pub last_tick: Option<Duration>,
    pub ticks: u64,
    /// A guest that was moved or restored prints no boot line.
    pub booted: bool,
}

impl Watch {
    pub fn take(&self, host: &str, vm_id: &str, epoch: u64, line: &str, timeline: &Timeline) {
        let now = timeline.now();
        let mut vms = self.lock();
        let vm = vms.entry(vm_id.to_owned()).or_default();
        vm.take(host, epoch, line, now);
        drop(vms);
        self.shared.changed.notify_all();
        // Ticks and records come ten times a second each; what they tell is in the numbers.
        if !line.starts_with("tick ")
            && !line.starts_with("journal ")
            && !line.starts_with("pattern ")
        {
            let short = vm_id.get(..8).unwrap_or(vm_id);
            timeline.note(host, &format!("guest {short}.{epoch}: {line}"));
        }
    }

    /// Measures silence from now on.
    pub fn forget_silence(&self, vm_id: &str) {
        if let Some(vm) = self.lock().get_mut(vm_id) {
            vm.longest_silence = Duration::ZERO;
        }
    }

    pub fn vm(&self, vm_id: &str) -> Vm {
        self.lock().get(vm_id).cloned().unwrap_or_default()
    }

    /// Waits until what was heard of a VM satisfies the condition.
    pub fn wait(&self, vm_id: &str, limit: Duration, is_so: impl Fn(&Vm) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut vms = self.lock();
        loop {
            if vms.get(vm_id).is_some_and(&is_so) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let (guard, _) =
                self.shared.changed.wait_timeout(vms, left).unwrap_or_else(PoisonError::into_inner);
            vms = guard;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vm>> {
        self.shared.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vm {
    fn take(&mut self, host: &str, epoch: u64, line: &str, now: Duration) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if word == "tick" {
            self.heard_tick(now);
        }
        let incarnation = self
            .incarnations
            .entry((host.to_owned(), epoch))
            .or_insert_with(|| Incarnation { first_heard: now, ..Incarnation::default() });
        incarnation.last_heard = now;
        match word {
            "boot" => incarnation.booted = true,
            "tick" => {
                incarnation.ticks += 1;
                incarnation.first_tick.get_or_insert(now);
                incarnation.last_tick = Some(now);
            }
            "journal" => {
                let seq = rest.parse().unwrap_or(0);
                self.acknowledged = self.acknowledged.max(seq);
            }
            "ioerror" => self.io_errors += 1,
            "FATAL" => self.fatal.push(line.to_owned()),
            _ => {}
        }
    }

    fn heard_tick(&mut self, now: Duration) {
        let silence = self.last_tick.map_or(Duration::ZERO, |last| now - last);
        self.last_tick = Some(now);
        if silence > self.longest_silence {
            self.longest_silence = silence;
            self.silence_ended = now;
        }
    }

    /// The guest's latest sign of life, on any host.
    pub fn last_tick(&self) -> Option<Duration> {
        self.last_tick
    }

    /// The latest sign of life on one host.
    pub fn last_tick_on(&self, host: &str) -> Option<Duration> {
        let own = self.incarnations.iter().filter(|((name, _), _)| name == host);
        own.filter_map(|(_, incarnation)| incarnation.last_tick).max()
    }

    /// Boots of this guest's kernel that were heard.
    pub fn boots(&self) -> usize {
        self.incarnations.values().filter(|incarnation| incarnation.booted).count()
    }
}
