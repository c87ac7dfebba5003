//! The vCPU threads.
//!
//! ```text
//!        +--> at the gate --enter--> KVM_RUN <--> serve exits
//!        |        ^                     |  | the guest ended, or KVM failed
//!        |        +------- kicked ------+  v
//!        +----------------------------- tell the owner, hold the gate
//! ```
//!
//! A vCPU is locked while its thread is inside the gate, so that whoever saves or restores it
//! cannot do so while it runs. The threads are never joined: they end with the process.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use crate::gate::{Gate, Hold};
use crate::kvm::kick::{self, RunPage};
use crate::kvm::{GuestBus, GuestEnd, RunOutcome, Vcpu};

/// Hears how the guest ended.
pub type EndSink = Arc<dyn Fn(GuestEnd) + Send + Sync>;

struct Slot {
    vcpu: Arc<Mutex<Vcpu>>,
    run_page: Arc<RunPage>,
}

/// All vCPUs of one VM and their threads.
pub struct Vcpus {
    slots: Vec<Slot>,
    exits: Arc<AtomicU64>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; all wait at the gate.
    pub fn start(
        vcpus: Vec<Vcpu>,
        gate: &Arc<Gate>,
        bus: &Arc<dyn GuestBus>,
        on_end: &EndSink,
    ) -> io::Result<Self> {
        let exits = Arc::new(AtomicU64::new(0));
        let threads = Arc::new(OnceLock::new());
        let (mut slots, mut handles) = (Vec::new(), Vec::new());
        for vcpu in vcpus {
            let name = format!("vcpu{}", vcpu.id);
            let run_page = vcpu.run_page();
            let vcpu = Arc::new(Mutex::new(vcpu));
            let runner = Runner {
                vcpu: Arc::clone(&vcpu),
                run_page: Arc::clone(&run_page),
                gate: Arc::clone(gate),
                bus: Arc::clone(bus),
                exits: Arc::clone(&exits),
                on_end: Arc::clone(on_end),
            };
            handles.push(thread::Builder::new().name(name).spawn(move || runner.run())?);
            slots.push(Slot { vcpu, run_page });
        }
        let _first = threads.set(handles);
        gate.set_kick(kicker(&slots, threads));
        Ok(Self { slots, exits })
    }

    /// How often the guest left for the VMM.
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    /// The vCPUs that are out of the guest now; for what may be left out where one is not.
    pub fn idle(&self) -> impl Iterator<Item = MutexGuard<'_, Vcpu>> {
        self.slots.iter().filter_map(|slot| slot.vcpu.try_lock().ok())
    }

    /// All vCPUs in the order of their ids; the gate is closed and they are out.
    pub fn stopped(&self) -> impl Iterator<Item = MutexGuard<'_, Vcpu>> {
        self.slots.iter().map(|slot| slot.vcpu.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn kicker(
    slots: &[Slot],
    threads: Arc<OnceLock<Vec<JoinHandle<()>>>>,
) -> Box<dyn Fn() + Send + Sync> {
    let pages: Vec<_> = slots.iter().map(|slot| Arc::clone(&slot.run_page)).collect();
    Box::new(move || {
        for (page, thread) in pages.iter().zip(threads.get().into_iter().flatten()) {
            page.set_immediate_exit(true);
            kick::signal(thread);
        }
    })
}

struct Runner {
    vcpu: Arc<Mutex<Vcpu>>,
    run_page: Arc<RunPage>,
    gate: Arc<Gate>,
    bus: Arc<dyn GuestBus>,
    exits: Arc<AtomicU64>,
    on_end: EndSink,
}

impl Runner {
    fn run(self) {
        loop {
            let pass = self.gate.enter(|| self.run_page.set_immediate_exit(false));
            let end = {
                let mut vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
                self.run_until_out(&mut vcpu)
            };
            if let Some(end) = end {
                self.gate.hold(Hold::Ended);
                (self.on_end)(end);
            }
            drop(pass);
        }
    }

    /// Runs the guest until it is kicked (`None`) or has ended.
    fn run_until_out(&self, vcpu: &mut Vcpu) -> Option<GuestEnd> {
        loop {
            let outcome = vcpu.run(self.bus.as_ref());
            self.exits.fetch_add(1, Ordering::Relaxed);
            match outcome {
                Ok(RunOutcome::Continue) => {}
                Ok(RunOutcome::Interrupted) => return None,
                Ok(RunOutcome::Ended(end)) => return Some(end),
                Err(error) => return Some(GuestEnd::Internal(error.to_string())),
            }
        }
    }
}
