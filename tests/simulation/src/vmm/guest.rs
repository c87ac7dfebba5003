//! The lease page, and the guest that runs as long as the gate is open.

use bellwether_lease::{LeaseView, Verdict, judge};
use bellwether_types::Arbiter;

use super::{GUEST_PACE, Hold, PAGE_POLL, PAGE_POLL_EXPIRED, Phase, This, Vmm, lapse};
use crate::kernel::{MS, Nanos};
use crate::oracle::NET_MAX;
use crate::storage::{DiskRecord, IoError};
use crate::wire::disk_path;

impl Vmm {
    fn page(&self) -> LeaseView {
        self.world.runtime(self.node, |runtime| {
            runtime.pages.get(&(self.vm, self.home)).copied().unwrap_or_default()
        })
    }

    fn verdict(&self) -> Verdict {
        let (arbiter, epoch) = {
            let state = self.state.borrow();
            (state.arbiter, self.epoch().0)
        };
        let arbiter = match arbiter {
            Arbiter::Storage => bellwether_lease::Arbiter::Storage,
            Arbiter::Lease => bellwether_lease::Arbiter::Lease,
        };
        judge(arbiter, epoch, Some(self.page()), self.world.kernel.boottime(self.host()))
    }

    pub(super) fn enforce(&self) -> Verdict {
        let verdict = self.verdict();
        let (runs, held) = {
            let state = self.state.borrow();
            (state.phase == Phase::Running, state.holds.contains(&Hold::Lease))
        };
        match verdict == Verdict::Expired {
            true if runs => self.world.hit("agent", "lease page held"),
            false if runs && held => self.world.hit("agent", "lease came back"),
            _ => {}
        }
        self.set_hold(Hold::Lease, verdict == Verdict::Expired);
        self.set_hold(Hold::Superseded, verdict == Verdict::Superseded);
        verdict
    }
}

/// The lease's thread.
pub(super) async fn watch_page(this: This) {
    loop {
        let verdict = this.enforce();
        let idle = !this.state.borrow().writing;
        match verdict {
            Verdict::Expired if idle => {
                this.tell_held(true);
                this.let_go();
            }
            Verdict::Valid { .. } => lapse::resume(&this),
            Verdict::Expired | Verdict::Superseded => {}
        }
        let pause = match verdict {
            Verdict::Valid { until_ns: Some(deadline) } => deadline
                .saturating_sub(this.world.kernel.boottime(this.host()))
                .clamp(MS, PAGE_POLL),
            Verdict::Valid { until_ns: None } => PAGE_POLL,
            Verdict::Expired | Verdict::Superseded => PAGE_POLL_EXPIRED,
        };
        this.sleep(pause).await;
    }
}

/// The guest and its disk.
pub(super) async fn guest(this: This) {
    loop {
        let state = &this.state;
        this.gate.until(|| state.borrow().holds.is_empty().then_some(())).await;
        this.takes(GUEST_PACE / 2, GUEST_PACE * 3 / 2).await;
        // What stood still may find its deadline passed: a moment that is not counted.
        this.enforce();
        if !this.state.borrow().holds.is_empty() {
            continue;
        }
        this.world.take_writes();
        this.world.oracle.borrow_mut().instruction(this.process);
        // Each submission asks for leave.
        let permitted = matches!(this.enforce(), Verdict::Valid { .. });
        if permitted && !this.state.borrow().broken {
            this.check_deadline();
            write(&this).await;
        }
    }
}

impl Vmm {
    fn note_busy(&self, busy: bool) {
        if let Some(fact) = self.world.oracle.borrow_mut().vmms.get_mut(&self.process) {
            fact.busy = busy;
        }
    }

    /// Under the lease arbiter nothing is submitted after the deadline.
    fn check_deadline(&self) {
        let late = self.page().deadline_ns <= self.world.kernel.boottime(self.host());
        if self.state.borrow().arbiter == Arbiter::Lease && late {
            let text =
                format!("6: {} writes after its lease", self.world.kernel.name_of(self.process));
            self.world.oracle.borrow_mut().fail(text);
        }
    }
}

async fn write(this: &This) {
    let (record, stamp, under_way) = {
        let mut state = this.state.borrow_mut();
        let Some(locks) = &state.locks else { return };
        let number = state.counter + 1;
        let record = DiskRecord { number, epoch: locks.epoch, by: this.process };
        let stamp = locks.disk;
        state.writing = true;
        // No lock guards the proofs of the lease arbiter against what the network holds back.
        let leased = state.arbiter == Arbiter::Lease;
        (record, stamp, if leased { NET_MAX } else { Nanos::MAX })
    };
    this.note_busy(true);
    let target = (disk_path(this.vm), stamp);
    let written = this.world.storage.write_disk(this.host(), target, record, under_way).await;
    this.world.take_writes();
    match written {
        Ok(()) => {
            this.state.borrow_mut().counter = record.number;
            this.world.oracle.borrow_mut().acknowledged(this.vm, record.number);
        }
        // There was no room for the write, and nothing of it is anywhere: the guest tries again.
        Err(IoError::Full) => {}
        // The kernel has forgotten what it could not write: no later flush is believed.
        Err(_) => this.state.borrow_mut().broken = true,
    }
    this.state.borrow_mut().writing = false;
    this.note_busy(false);
    this.gate.notify();
}
