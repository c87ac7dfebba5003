//! The arithmetic of kvm-clock (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).

/// One consistent copy of the page that KVM keeps for a vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct TimeInfo {
    pub tsc_timestamp: u64,
    pub system_time: u64,
    pub tsc_to_system_mul: u32,
    pub tsc_shift: i8,
}

impl TimeInfo {
    /// Nanoseconds at a value of the time stamp counter.
    pub fn ns_at(&self, tsc: u64) -> u64 {
        let delta = tsc.saturating_sub(self.tsc_timestamp);
        let shift = u32::from(self.tsc_shift.unsigned_abs());
        let shifted = match self.tsc_shift {
            0.. => delta.checked_shl(shift).unwrap_or(0),
            _ => delta.checked_shr(shift).unwrap_or(0),
        };
        let scaled = (u128::from(shifted) * u128::from(self.tsc_to_system_mul)) >> 32;
        self.system_time.wrapping_add(scaled as u64)
    }
}

/// Nanoseconds of a number of ticks of a counter with this frequency.
pub fn ticks_to_ns(ticks: u64, hz: u64) -> u64 {
    (u128::from(ticks) * 1_000_000_000 / u128::from(hz.max(1))) as u64
}
