//! Interrupt routing: GSIs 0 to 23 lead to the interrupt chips, those above carry MSIs.
//!
//! The kernel takes the whole table at once and that is slow (milliseconds on some hosts), so a
//! change is staged first and committed once for many.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, call};

/// The first GSI that no interrupt chip has.
const MSI_GSI_FIRST: u32 = 24;

/// Where a message-signalled interrupt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

#[derive(Default)]
struct Table {
    /// The message of each MSI GSI, from `MSI_GSI_FIRST` on.
    messages: Vec<Option<MsiMessage>>,
    changed: bool,
}

/// Hands out GSIs and keeps the kernel's routing table.
pub struct IrqRouter {
    fd: Arc<VmFd>,
    table: Mutex<Table>,
}

impl IrqRouter {
    pub(super) fn new(fd: Arc<VmFd>) -> Self {
        Self { fd, table: Mutex::default() }
    }

    /// A GSI for one MSI vector, with `event` injecting it. It has no route yet.
    pub fn add_msi(&self, event: &EventFd) -> Result<u32, KvmError> {
        let gsi = {
            let mut table = self.lock();
            table.messages.push(None);
            MSI_GSI_FIRST - 1 + u32::try_from(table.messages.len()).unwrap_or(u32::MAX)
        };
        self.add_line(event, gsi)?;
        Ok(gsi)
    }

    /// Lets `event` inject an edge on the GSI of an interrupt chip.
    pub fn add_line(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, gsi).map_err(call("add an irqfd"))
    }

    /// Sets the level of a level-triggered line.
    pub fn set_line(&self, gsi: u32, active: bool) -> Result<(), KvmError> {
        self.fd.set_irq_line(gsi, active).map_err(call("set an interrupt line"))
    }

    /// Notes the route of an MSI GSI; it is in force after [`Self::commit`].
    pub fn stage(&self, gsi: u32, message: Option<MsiMessage>) {
        let mut table = self.lock();
        let slot = gsi.checked_sub(MSI_GSI_FIRST).map(|index| index as usize);
        if let Some(slot) = slot.and_then(|index| table.messages.get_mut(index))
            && *slot != message
        {
            *slot = message;
            table.changed = true;
        }
    }

    /// Puts all staged routes in force, in one call, or in none when nothing changed.
    pub fn commit(&self) -> Result<(), KvmError> {
        let mut table = self.lock();
        if !table.changed {
            return Ok(());
        }
        let mut entries = chip_routes();
        entries.extend(
            (MSI_GSI_FIRST..)
                .zip(&table.messages)
                .filter_map(|(gsi, message)| message.map(|message| msi_route(gsi, message))),
        );
        let count = entries.len();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| KvmError::TooMany { what: "interrupt routes", count })?;
        self.fd.set_gsi_routing(&routing).map_err(call("set the interrupt routing"))?;
        table.changed = false;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The routes that KVM sets by itself, which the first table of ours would otherwise remove.
fn chip_routes() -> Vec<kvm_irq_routing_entry> {
    let pic = |gsi: u32| match gsi {
        0..8 => Some((KVM_IRQCHIP_PIC_MASTER, gsi)),
        8..16 => Some((KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
        _ => None,
    };
    let pics = (0..16).filter_map(|gsi| pic(gsi).map(|(chip, pin)| chip_route(gsi, chip, pin)));
    let ioapic = (0..MSI_GSI_FIRST).map(|gsi| chip_route(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    pics.chain(ioapic).collect()
}

fn chip_route(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = (message.address & 0xffff_ffff) as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}
