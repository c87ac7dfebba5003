//! The state of the in-kernel interrupt chips, the timer chip and the clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use super::{KvmError, Vm, call};
use crate::clock::wall_ns;

/// What belongs to the VM rather than to a vCPU. Saved as kind `platform`, version 1.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlatformStateV1 {
    /// PIC master, PIC slave, IOAPIC.
    pub chips: [kvm_irqchip; 3],
    pub pit: kvm_pit_state2,
    /// The guest's clock (`KVM_GET_CLOCK`), nanoseconds.
    pub clock_ns: u64,
    /// The host's wall clock (CLOCK_REALTIME) at the same moment, nanoseconds. It is the only clock
    /// that two hosts share.
    pub wall_ns: u64,
}

impl Vm {
    /// Reads the state; all vCPUs are stopped.
    pub fn save_platform(&self) -> Result<PlatformStateV1, KvmError> {
        let clock = self.fd.get_clock().map_err(call("read the clock"))?;
        Ok(PlatformStateV1 {
            chips: [
                self.read_chip(KVM_IRQCHIP_PIC_MASTER)?,
                self.read_chip(KVM_IRQCHIP_PIC_SLAVE)?,
                self.read_chip(KVM_IRQCHIP_IOAPIC)?,
            ],
            pit: self.fd.get_pit2().map_err(call("read the PIT"))?,
            clock_ns: clock.clock,
            wall_ns: wall_ns(),
        })
    }

    /// Sets the chips; after the vCPUs' local APICs.
    pub fn restore_platform(&self, state: &PlatformStateV1) -> Result<(), KvmError> {
        for chip in &state.chips {
            self.fd.set_irqchip(chip).map_err(call("set an interrupt chip"))?;
        }
        self.fd.set_pit2(&state.pit).map_err(call("set the PIT"))
    }

    /// Sets the guest's clock (`KVM_SET_CLOCK`); right before the first `KVM_RUN`, because it runs
    /// from now on. The time that the VM was stopped has passed for the guest, too: its wall clock
    /// is right after a move and after a day on the storage. It never goes back, even if the host's
    /// wall clock did.
    pub fn restore_clock(&self, state: &PlatformStateV1) -> Result<(), KvmError> {
        let stopped_ns = wall_ns().saturating_sub(state.wall_ns);
        let clock = kvm_clock_data {
            clock: state.clock_ns.saturating_add(stopped_ns),
            ..Default::default()
        };
        self.fd.set_clock(&clock).map_err(call("set the clock"))
    }

    fn read_chip(&self, chip_id: u32) -> Result<kvm_irqchip, KvmError> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        self.fd.get_irqchip(&mut chip).map_err(call("read an interrupt chip"))?;
        Ok(chip)
    }
}
