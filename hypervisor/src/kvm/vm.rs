//! The virtual machine: memory slots, the in-kernel interrupt chips, and their state.

use std::sync::Arc;

use bellwether_memory::GuestRam;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{Capabilities, KvmError, Vcpu, call, irq::IrqRouter};

/// Three pages that KVM needs on Intel; the top of the 32-bit space is used by nothing else.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// One virtual machine with its interrupt chips and memory.
pub struct Vm {
    pub(super) kvm: Kvm,
    pub(super) fd: Arc<VmFd>,
    pub caps: Capabilities,
    pub irq: Arc<IrqRouter>,
    // Dropped last: the guest's memory must outlive the VM that maps it.
    pub(super) ram: Arc<GuestRam>,
}

impl Vm {
    /// Builds a VM with its memory and interrupt chips, without vCPUs.
    pub fn new(ram: &Arc<GuestRam>) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|source| KvmError::Open(source.into()))?;
        let caps = Capabilities::probe(&kvm)?;
        let fd = Arc::new(kvm.create_vm().map_err(call("create a VM"))?);
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(call("set the identity map"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(call("set the TSS address"))?;
        fd.create_irq_chip().map_err(call("create the interrupt chips"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(call("create the PIT"))?;
        for slot in slots_of(ram) {
            set_slot(&fd, &slot, 0)?;
        }
        let irq = Arc::new(IrqRouter::new(Arc::clone(&fd)));
        Ok(Self { kvm, fd, caps, irq, ram: Arc::clone(ram) })
    }

    /// Creates the vCPU with this index, which is also its APIC id.
    pub fn create_vcpu(&self, id: u8) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(u64::from(id)).map_err(call("create a vCPU"))?;
        Vcpu::new(id, fd, self.caps.xsave_bytes)
    }

    pub(super) fn slots(&self) -> Vec<Slot> {
        slots_of(&self.ram)
    }

    /// Lets a guest write to `address`, of any width and value, signal `event`.
    pub fn add_ioevent(&self, event: &EventFd, address: u64) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        self.fd.register_ioevent(event, &address, NoDatamatch).map_err(call("add an ioeventfd"))
    }

    /// Undoes [`Self::add_ioevent`].
    pub fn remove_ioevent(&self, event: &EventFd, address: u64) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        self.fd
            .unregister_ioevent(event, &address, NoDatamatch)
            .map_err(call("remove an ioeventfd"))
    }
}

/// A memory slot: one region of guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) index: u32,
    pub(super) length: u64,
    start: u64,
    host: usize,
}

fn slots_of(ram: &GuestRam) -> Vec<Slot> {
    let slot = |(index, region): (usize, bellwether_statefile::MemoryRegion)| {
        let host = ram.host_address(index)?;
        Some(Slot { index: index as u32, length: region.length, start: region.start, host })
    };
    ram.regions().into_iter().enumerate().filter_map(slot).collect()
}

/// Makes a slot, or changes its flags.
pub(super) fn set_slot(fd: &VmFd, slot: &Slot, flags: u32) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot: slot.index,
        flags,
        guest_phys_addr: slot.start,
        memory_size: slot.length,
        userspace_addr: slot.host as u64,
    };
    // SAFETY: the slot is a region of the memory that `Vm` holds for as long as it is mapped, and
    // the regions of one `GuestRam` do not overlap.
    unsafe { fd.set_user_memory_region(region) }.map_err(call("set a memory slot"))
}
