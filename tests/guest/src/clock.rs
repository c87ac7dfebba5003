//! Monotonic nanoseconds since boot.
//!
//! kvm-clock is preferred: the VMM carries it over a save and a restore on another host, while a bare TSC
//! may jump there. (`gates::rdtsc` says why the TSC may be read in ring 3.)

use crate::gates::{self, Cpuid};
use crate::pit;
use crate::pvclock::{TimeInfo, ticks_to_ns};
use core::sync::atomic::{AtomicU32, Ordering, fence};

const HYPERVISOR_LEAF: u32 = 0x4000_0000;
/// KVM moves its leaves here when others (Hyper-V's) are in front.
const HYPERVISOR_LEAF_SECOND: u32 = 0x4000_0100;
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const INVARIANT_TSC: u32 = 1 << 8;
/// Where KVM is not in master-clock mode it corrects the drift of a vCPU's clock by small steps, which
/// Linux, too, hides. A larger step backwards is a broken save or restore.
const STEP_BACK_NS_MAX: u64 = 1_000_000;

/// `pvclock_vcpu_time_info`, written by KVM.
#[repr(C, align(64))]
struct SharedPage {
    version: AtomicU32,
    words: [AtomicU32; 7],
}

static SHARED: SharedPage =
    SharedPage { version: AtomicU32::new(0), words: [const { AtomicU32::new(0) }; 7] };

enum Source {
    Kvm,
    Tsc { hz: u64 },
    Pit { hz: u64 },
}

pub struct Clock {
    source: Source,
    base_ns: u64,
    last_ns: u64,
    pub stepped_back: u64,
    pub stepped_back_ns_max: u64,
}

impl Clock {
    pub fn start() -> Self {
        let source = find_source();
        let base_ns = source.ns();
        Self { source, base_ns, last_ns: 0, stepped_back: 0, stepped_back_ns_max: 0 }
    }

    pub fn name(&self) -> &'static str {
        match self.source {
            Source::Kvm => "kvm",
            Source::Tsc { .. } => "tsc",
            Source::Pit { .. } => "pit",
        }
    }

    /// Never less than the last value; a clock that really went back is fatal.
    pub fn now_ns(&mut self) -> u64 {
        let raw = self.source.ns();
        let now = raw.wrapping_sub(self.base_ns).cast_signed();
        let back = self.last_ns.cast_signed().wrapping_sub(now);
        if back <= 0 {
            self.last_ns = now.cast_unsigned();
            return self.last_ns;
        }
        let back = back.cast_unsigned();
        if back > STEP_BACK_NS_MAX {
            crate::fatal!(
                "clock source={} last_ns={} now_ns={now} back_ns={back}",
                self.name(),
                self.last_ns
            );
        }
        self.stepped_back += 1;
        self.stepped_back_ns_max = self.stepped_back_ns_max.max(back);
        self.last_ns
    }
}

impl Source {
    fn ns(&self) -> u64 {
        match *self {
            Self::Kvm => kvm_ns(),
            Self::Tsc { hz } | Self::Pit { hz } => ticks_to_ns(gates::rdtsc(), hz),
        }
    }
}

fn find_source() -> Source {
    let hypervisor = hypervisor_base();
    if let Some(base) = hypervisor
        && start_kvm_clock(base)
    {
        return Source::Kvm;
    }
    if let Some(hz) = known_tsc_hz(hypervisor) {
        return Source::Tsc { hz };
    }
    match pit::measure_tsc_hz() {
        Some(hz) => Source::Pit { hz },
        None => crate::fatal!("clock no kvm-clock, no TSC frequency, no PIT"),
    }
}

/// The base of KVM's CPUID leaves.
fn hypervisor_base() -> Option<u32> {
    let is_kvm = |leaf: &u32| {
        let Cpuid { eax, ebx, ecx, edx } = gates::cpuid(*leaf);
        let signature = [ebx, ecx, edx] == [0x4b4d_564b, 0x564b_4d56, 0x4d];
        signature && (eax == 0 || eax > *leaf)
    };
    [HYPERVISOR_LEAF, HYPERVISOR_LEAF_SECOND].into_iter().find(is_kvm)
}

fn start_kvm_clock(base: u32) -> bool {
    if gates::cpuid(base + 1).eax & KVM_FEATURE_CLOCKSOURCE2 == 0 {
        return false;
    }
    let page = (&raw const SHARED).expose_provenance() as u64;
    // SAFETY: the feature bit says that the register exists; the page is static, aligned and made of atomics.
    unsafe { gates::wrmsr(MSR_KVM_SYSTEM_TIME_NEW, page | 1) };
    SHARED.version.load(Ordering::Acquire) != 0
}

fn kvm_ns() -> u64 {
    let word = |i: usize| SHARED.words[i].load(Ordering::Relaxed);
    let pair = |i: usize| u64::from(word(i)) | u64::from(word(i + 1)) << 32;
    loop {
        let version = SHARED.version.load(Ordering::Acquire);
        let info = TimeInfo {
            tsc_timestamp: pair(1),
            system_time: pair(3),
            tsc_to_system_mul: word(5),
            tsc_shift: word(6) as i8,
        };
        let ns = info.ns_at(gates::rdtsc());
        fence(Ordering::Acquire);
        if version & 1 == 0 && SHARED.version.load(Ordering::Relaxed) == version {
            return ns;
        }
    }
}

/// The frequency as the processor or the hypervisor states it, for an invariant TSC.
fn known_tsc_hz(hypervisor: Option<u32>) -> Option<u64> {
    let has = |base: u32, leaf: u32| gates::cpuid(base).eax >= leaf;
    let extended = 0x8000_0000;
    if !has(extended, extended + 7) || gates::cpuid(extended + 7).edx & INVARIANT_TSC == 0 {
        return None;
    }
    if let Some(base) = hypervisor
        && has(base, base + 0x10)
        && let khz @ 1.. = gates::cpuid(base + 0x10).eax
    {
        return Some(u64::from(khz) * 1000);
    }
    if has(0, 0x15) {
        let Cpuid { eax, ebx, ecx, .. } = gates::cpuid(0x15);
        if eax != 0 && ebx != 0 && ecx != 0 {
            return Some(u64::from(ecx) * u64::from(ebx) / u64::from(eax));
        }
    }
    let mhz = if has(0, 0x16) { gates::cpuid(0x16).eax & 0xffff } else { 0 };
    (mhz != 0).then(|| u64::from(mhz) * 1_000_000)
}
